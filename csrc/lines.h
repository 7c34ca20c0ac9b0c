// Asks the processor for what a binding is about to touch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "stable.h"

namespace dgls {

// Cache lines of tensors, learned once. A block that computes leaves none of its weights' objects
// in the caches, and setting `data` goes through some twenty lines of each, one after the other:
// asked for together they come at the same time. Only hints: an address that is no longer right
// costs a line, and nothing is read through it once it was learned.
class Lines {
 public:
  // Whether torch's object is where both ways to it say: `_cdata`, and the handle of the same
  // tensor. Else nothing may be added.
  static bool can_learn(PyObject* tensor, const Tensor& same);

  // Adds the lines of a plain tensor's objects: Python's, torch's, and what that one points to.
  void add(PyObject* tensor);

  // Asks for all of them; blocks for none.
  void fetch() const;

 private:
  void add(uintptr_t address, size_t bytes);

  // Addresses of first lines, the number of lines in the bits below.
  std::vector<uintptr_t> ranges_;
};

}  // namespace dgls
