// One hooked block: what is bound where.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "lines.h"
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

// Keeps an exception that is already set while more Python runs.
class KeepError {
 public:
  KeepError() { PyErr_Fetch(&type_, &value_, &trace_); }
  ~KeepError() {
    if (type_ != nullptr) PyErr_Restore(type_, value_, trace_);
  }
  KeepError(const KeepError&) = delete;
  KeepError& operator=(const KeepError&) = delete;

 private:
  PyObject* type_ = nullptr;
  PyObject* value_ = nullptr;
  PyObject* trace_ = nullptr;
};

// A tensor whose version tells of a change in place.
struct Watched {
  Ref tensor;
  // The version that the device has.
  long long version = 0;
  // How often the hooks themselves moved the version; owned by the state.
  uint64_t* bumps = nullptr;
};

// How one tensor of a block is bound: as the attribute `data` of a parameter, whose identity then
// never changes, or, where a tensor of another kind has to take its place (meta parameters,
// wrapper subclasses), as an entry of the module's dict of parameters.
struct Target {
  Ref object;
  Ref key;
  bool is_dict = false;
  Ref master;
  // The parameter as torch's C functions take it: they say where its bytes lie without Python.
  // `data` may be set, it stays the same tensor. Only of plain parameters: a subclass may have its
  // say in what an op is given.
  std::optional<Tensor> parameter;
  // Where the master's bytes lie; 0 if only the object is known.
  unsigned long long address = 0;
  // Its bytes come from a file: a change of the master does not reach them.
  bool is_filed = false;
  std::vector<Watched> watched;
};

struct Block {
  std::shared_ptr<State> state;
  uint32_t index;
  std::string name;
  Ref module;  // a weak reference: the module owns the hook
  Ref on_rebuild;
  Ref increment_versions;
  std::vector<Target> targets;
  std::vector<std::vector<Ref>> views;  // by position of the program
  // What is bound, once more: masters (after the parameters), and views. Since 2.11 torch counts
  // the first reference from C++ on the Python object too, and so takes the GIL and gives it back
  // twice each time that it looks at a tensor which only Python knows: a fourth of each binding.
  std::vector<Tensor> held_masters;
  std::vector<Tensor> held_views;
  // What binding and unbinding touch; nothing where that cannot be learned.
  bool learns_lines = false;
  Lines parameter_lines;
  Lines master_lines;
  std::vector<Lines> view_lines;  // by position of the program
  uint64_t layout = 0;            // the state's, when the views were made
  bool is_open = true;
  bool is_bound = false;
  unsigned long owner = 0;  // the thread that it is bound for
  // Threads whose use was taken back while it ran: another block began, or the engine was closed.
  std::vector<unsigned long> stolen_from;
  bool had_grad_mode = false;
  uint32_t position = 0;
  // Versions of what stands in for masters, when it was bound.
  std::vector<long long> bound_versions;
  uint64_t stream = 0;

  ~Block();

  // Whether the hook was called for the module that it was made for, and not for a copy.
  bool is_for(PyObject* module_object) const;

  // Binds the views of a position; on failure all masters are bound and an exception is set.
  bool bind(uint32_t at);

  // Binds the masters; goes on after a failure, then reports it.
  bool unbind();

  // Ends a use that never ended by itself: an exception that is no Exception left the block.
  bool take_back();

  // Sets an exception if grad mode is on and a parameter requires grad.
  bool allows_grad_mode();

  // Learns what binding the parameters and unbinding them touch.
  void note_lines();

  // Takes the masters as they are now for what the device will have.
  bool note_masters();

  // Sets `changed` if a master was changed in place; sets an exception if one was replaced, or
  // streams from a file that the change did not reach.
  bool check_masters(bool& changed);

  // Takes the versions of what is about to be bound.
  bool note_bound(uint32_t at);

  // Whether the block wrote to its weights while it ran: the write went to the arena and is lost.
  // Sets an exception then.
  bool wrote_weights();

  // Makes backward refuse what it saved of the weights: they are about to be overwritten.
  bool invalidate_saved();

  // Whether a tensor in the block's output lies in the arena, where the next block's weights come
  // to lie; sets an exception then.
  bool returns_weights(const State& in, PyObject* output, int depth) const;

  // Drops all that it holds: a copy of the model may keep the hook, and must not keep the arena.
  void let_go();

  // Forgets that a use of this thread was taken back; whether one was.
  bool forget_stolen(unsigned long thread);
};

}  // namespace dgls
