// One hooked block: what is bound where.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "state.h"

namespace dgls {

// A strong reference.
class Ref {
 public:
  Ref() = default;
  explicit Ref(PyObject* borrowed) : object_(borrowed) { Py_XINCREF(object_); }
  Ref(const Ref& other) : Ref(other.object_) {}
  Ref(Ref&& other) noexcept : object_(other.object_) { other.object_ = nullptr; }
  Ref& operator=(Ref other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }
  ~Ref() { Py_XDECREF(object_); }
  PyObject* get() const { return object_; }

 private:
  PyObject* object_ = nullptr;
};

// How one tensor of a block is bound: as the attribute `data` of a parameter, whose identity then
// never changes, or, where a tensor of another kind has to take its place (meta parameters,
// wrapper subclasses), as an entry of the module's dict of parameters.
struct Target {
  Ref object;
  Ref key;
  bool is_dict;
  Ref master;
};

struct Block {
  std::shared_ptr<State> state;
  uint32_t index;
  std::string name;
  Ref module;  // a weak reference: the module owns the hook
  Ref on_rebuild;
  Ref increment_version;
  std::vector<Target> targets;
  std::vector<std::vector<Ref>> views;  // by position of the program
  bool is_open = true;
  bool is_bound = false;
  // Taken back while it ran: another block began, or the engine was closed.
  bool is_stolen = false;
  bool had_grad_mode = false;
  uint64_t stream = 0;

  ~Block();

  // Whether the hook was called for the module that it was made for, and not for a copy.
  bool is_for(PyObject* module_object) const;

  // Binds the views of a position; on failure all masters are bound and an exception is set.
  bool bind(uint32_t position);

  // Binds the masters; goes on after a failure, then reports it.
  bool unbind();

  // Ends a use that never ended by itself: an exception that is no Exception left the block.
  bool take_back();

  // Sets an exception if grad mode is on and a parameter requires grad.
  bool allows_grad_mode();
};

}  // namespace dgls
