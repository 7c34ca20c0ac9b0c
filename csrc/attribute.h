// Attributes of tensors, without the look-up of their names: a fifth of each binding.
#pragma once

#include "stable.h"

namespace dgls {

// An attribute that torch.Tensor defines in C. Tensors and parameters have just that one; a
// subclass may have its own, which is then used.
class Attribute {
 public:
  explicit Attribute(const char* name);
  Attribute(const Attribute&) = delete;
  Attribute& operator=(const Attribute&) = delete;

  // A new reference, or null with an exception set.
  PyObject* get(PyObject* tensor) const;

  // Whether it was set; else an exception is.
  bool set(PyObject* tensor, PyObject* value) const;

  // Whether a tensor is of torch.Tensor or torch.nn.Parameter itself.
  bool is_plain(PyObject* tensor) const;

 private:
  PyObject* name_ = nullptr;
  PyObject* tensor_type_ = nullptr;
  PyObject* parameter_type_ = nullptr;
  PyObject* descriptor_ = nullptr;
  descrgetfunc get_ = nullptr;
  descrsetfunc set_ = nullptr;
};

}  // namespace dgls
