// Forward hooks: bind a block's tensors to the arena before it runs, to the masters afterwards.
#pragma once

#include "stable.h"

namespace dgls {

// The Python module dgls_torch._C.
PyObject* make_module();

}  // namespace dgls
