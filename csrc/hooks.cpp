// The hooks as METH_FASTCALL builtins bound to a capsule, and the functions that make them.
#include "hooks.h"

#include <algorithm>
#include <chrono>
#include <exception>
#include <optional>
#include <thread>

#include "block.h"

namespace dgls {
namespace {

constexpr const char* kCapsule = "dgls_torch.block";

Block* block_of(PyObject* capsule) {
  return static_cast<Block*>(PyCapsule_GetPointer(capsule, kCapsule));
}

void free_block(PyObject* capsule) {
  delete block_of(capsule);
}

// Runs `body`; a C++ exception becomes RuntimeError.
template <typename Body>
bool guarded(Body body) {
  try {
    body();
    return true;
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return false;
  }
}

// As `guarded`, without the GIL: for what may block. To give it up and take it back costs more than
// most calls.
template <typename Body>
bool without_gil(Body body) {
  std::exception_ptr thrown;
  PyThreadState* thread = PyEval_SaveThread();
  try {
    body();
  } catch (...) {
    thrown = std::current_exception();
  }
  PyEval_RestoreThread(thread);
  return guarded([&] {
    if (thrown) std::rethrow_exception(thrown);
  });
}

// Whether the interpreter is about to end, which is a fact of the process and not of an engine;
// guarded by the GIL.
bool process_ends = false;

// How long a thread may take to end that waits for the end of the process; and how long another one
// waits at most that waits for this thread.
constexpr std::chrono::seconds kLastWait{5};

// For a thread whose block was shut while it waited for weights. When the process ends that is a
// daemon: Python has waited for all others. An exception would be its undoing: its frames go, torch
// frees their tensors without the GIL and takes it back in a destructor, where Python ends the
// thread by unwinding, and that aborts the process. Out of here it can be unwound.
void wait_for_end(const std::shared_ptr<State>& held) {
  // Kept for good: who is unwound has no GIL, and must not free tensors either.
  static_cast<void>(new std::shared_ptr<State>(held));
  PyThreadState* thread = PyEval_SaveThread();
  std::this_thread::sleep_for(kLastWait);
  PyEval_RestoreThread(thread);
}

// Says that this thread is in a pre-hook, while it may wait without the GIL and nothing is bound.
class Entering {
 public:
  explicit Entering(State& state) : state_(state), thread_(PyThread_get_thread_ident()) {
    state_.entering.push_back(thread_);
  }
  ~Entering() {
    std::vector<unsigned long>& all = state_.entering;
    all.erase(std::find(all.begin(), all.end(), thread_));
  }
  Entering(const Entering&) = delete;
  Entering& operator=(const Entering&) = delete;

 private:
  State& state_;
  const unsigned long thread_;
};

// Another use never ended: an exception such as KeyboardInterrupt left its block, or blocks run
// inside each other. Either way its masters are bound again.
bool take_back_active(State& state) {
  return state.active == nullptr || state.active->take_back();
}

// Also where an earlier one was broken off before the views were made.
bool rebuild_if_wanted(Block& block) {
  const bool is_stale = block.layout != block.state->layout;
  if (!is_stale && !block.state->engine->wants_rebuild()) return true;
  PyObject* done = PyObject_CallNoArgs(block.on_rebuild.get());
  Py_XDECREF(done);
  return done != nullptr;
}

PyObject* before_forward(PyObject* capsule, PyObject* const* args, Py_ssize_t count) {
  Block* block = block_of(capsule);
  if (block == nullptr) return nullptr;
  if (count < 1 || !block->is_open || !block->is_for(args[0])) Py_RETURN_NONE;
  const std::shared_ptr<State> held = block->state;  // another thread may detach meanwhile
  State& state = *held;
  if (state.is_foreign()) {
    PyErr_SetString(PyExc_RuntimeError, kForked);
    return nullptr;
  }
  block->parameter_lines.fetch();
  block->forget_stolen(PyThread_get_thread_ident());
  bool changed = false;
  if (!take_back_active(state) || !block->allows_grad_mode() || !block->check_masters(changed) ||
      !rebuild_if_wanted(*block)) {
    return nullptr;
  }
  uint32_t position = 0;
  const auto enter = [&] {
    if (changed) state.engine->reload(block->index);
    block->stream = current_stream(state.stream_device);
    position = state.engine->enter(block->index, block->stream);
  };
  const bool may_block = changed || state.engine->may_block(block->index);
  std::optional<Entering> mark;
  if (!guarded([&] { mark.emplace(state); })) return nullptr;
  const bool entered = may_block ? without_gil(enter) : guarded(enter);
  if (!block->is_open && process_ends) wait_for_end(held);
  // Whoever shuts a block waits for the end of this use, but not for ever. The engine's own error
  // says less then.
  const bool is_gone = block->state == nullptr;
  if (is_gone) PyErr_SetString(PyExc_RuntimeError, "dgls: detached in another thread");
  if (!entered) return nullptr;
  if (is_gone || !block->bind(position)) {
    try {
      state.engine->exit(block->stream);
    } catch (const std::exception&) {
      // The exception of the binding is the one to tell.
    }
    return nullptr;
  }
  Py_RETURN_NONE;
}

PyObject* after_forward(PyObject* capsule, PyObject* const* args, Py_ssize_t count) {
  Block* block = block_of(capsule);
  if (block == nullptr) return nullptr;
  if (count < 1 || !block->is_for(args[0])) Py_RETURN_NONE;
  const unsigned long thread = PyThread_get_thread_ident();
  if (!block->is_bound || block->owner != thread) {
    // Unless its use was stolen it never began, and the pre-hook has said why.
    if (!block->forget_stolen(thread)) Py_RETURN_NONE;
    return PyErr_Format(PyExc_RuntimeError,
                        "dgls: block '%s' was still running when another block began or the "
                        "engine was closed; blocks cannot run inside each other or in two threads "
                        "at once: exclude one of them",
                        block->name.c_str());
  }
  const std::shared_ptr<State> held = block->state;
  State& state = *held;
  block->parameter_lines.fetch();
  block->master_lines.fetch();
  const bool wrote = block->wrote_weights();
  bool ok = !wrote;
  {
    const KeepError keep;
    ok = block->unbind() && ok;
  }
  if (state.is_foreign()) {
    if (ok) PyErr_SetString(PyExc_RuntimeError, kForked);
    return nullptr;
  }
  ok = ok && (count < 3 || !block->returns_weights(state, args[2], 0));
  ok = ok && (!block->had_grad_mode || block->invalidate_saved());
  const bool exited = guarded([&] {
    block->stream = current_stream(state.stream_device);
    state.engine->exit(block->stream);
    if (wrote) state.engine->reload(block->index);
  });
  if (!ok || !exited) return nullptr;
  Py_RETURN_NONE;
}

PyMethodDef kBefore = {"dgls_before_forward",
                       reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(before_forward)),
                       METH_FASTCALL, "Binds the block's tensors to the arena."};
PyMethodDef kAfter = {"dgls_after_forward",
                      reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(after_forward)),
                      METH_FASTCALL, "Binds the block's masters."};

// `parameters`: those of the targets that are plain ones, in their order.
bool read_targets(PyObject* list, const std::vector<Tensor>& parameters,
                  std::vector<Target>& targets) {
  size_t next = 0;
  const Py_ssize_t count = PyList_Size(list);
  if (count < 0) return false;
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject *object = nullptr, *key = nullptr, *master = nullptr, *watched = nullptr;
    int is_filed = 0, is_handed = 0;
    if (!PyArg_ParseTuple(PyList_GetItem(list, i), "OOOO!pp", &object, &key, &master, &PyList_Type,
                          &watched, &is_filed, &is_handed)) {
      return false;
    }
    Target target;
    target.object = Ref(object);
    target.key = Ref(key);
    target.is_dict = key != Py_None;
    target.master = Ref(master);
    target.is_filed = is_filed != 0;
    for (Py_ssize_t j = 0; j < PyList_Size(watched); ++j) {
      target.watched.push_back({Ref(PyList_GetItem(watched, j))});
    }
    if (is_handed != 0) {
      if (next == parameters.size()) {
        PyErr_SetString(PyExc_RuntimeError, "dgls: fewer tensors were handed over than announced");
        return false;
      }
      target.parameter = parameters[next++];
    }
    targets.push_back(std::move(target));
  }
  return true;
}

PyObject* make_hooks(PyObject*, PyObject* args) {
  long long engine = 0;
  unsigned index = 0;
  const char* name = nullptr;
  PyObject *module = nullptr, *targets = nullptr, *on_rebuild = nullptr, *increment = nullptr;
  if (!PyArg_ParseTuple(args, "LIsOOOO", &engine, &index, &name, &module, &targets, &on_rebuild,
                        &increment)) {
    return nullptr;
  }
  std::unique_ptr<Block> block;
  std::vector<Tensor> handed;
  try {
    block = std::make_unique<Block>();
    block->state = find_state(engine);
    handed = take_handed(*block->state);
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
  block->index = index;
  block->name = name;
  block->on_rebuild = Ref(on_rebuild);
  block->increment_versions = Ref(increment);
  PyObject* weak = PyWeakref_NewRef(module, nullptr);
  if (weak == nullptr) return nullptr;
  block->module = Ref(weak);
  Py_DECREF(weak);
  if (!read_targets(targets, handed, block->targets) || !block->note_masters()) return nullptr;
  block->held_masters = std::move(handed);
  block->note_lines();
  PyObject* capsule = PyCapsule_New(block.get(), kCapsule, free_block);
  if (capsule == nullptr) return nullptr;
  block.release();
  PyObject* before = PyCFunction_New(&kBefore, capsule);
  PyObject* after = PyCFunction_New(&kAfter, capsule);
  return Py_BuildValue("NNN", before, after, capsule);
}

PyObject* set_views(PyObject*, PyObject* args) {
  PyObject *capsule = nullptr, *positions = nullptr;
  if (!PyArg_ParseTuple(args, "OO", &capsule, &positions)) return nullptr;
  Block* block = block_of(capsule);
  if (block == nullptr) return nullptr;
  std::vector<std::vector<Ref>> views;
  const Py_ssize_t count = PyList_Size(positions);
  if (count < 0) return nullptr;
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* list = PyList_GetItem(positions, i);
    views.emplace_back();
    if (list == Py_None) continue;
    const Py_ssize_t size = PyList_Size(list);
    if (size < 0) return nullptr;
    for (Py_ssize_t j = 0; j < size; ++j) views.back().push_back(Ref(PyList_GetItem(list, j)));
  }
  block->view_lines.assign(views.size(), Lines());
  for (size_t i = 0; block->learns_lines && i < views.size(); ++i) {
    for (const Ref& view : views[i]) block->view_lines[i].add(view.get());
  }
  block->views.swap(views);
  block->held_views.clear();
  if (block->state) {
    block->held_views = take_handed(*block->state);
    block->layout = block->state->layout;
  }
  Py_RETURN_NONE;
}

PyObject* shut(PyObject*, PyObject* capsule) {
  Block* block = block_of(capsule);
  if (block == nullptr) return nullptr;
  block->is_open = false;
  Py_RETURN_NONE;
}

PyObject* end_process(PyObject*, PyObject*) {
  process_ends = true;
  Py_RETURN_NONE;
}

// The block's masters are bound for good; its hooks do nothing from now on.
PyObject* unhook(PyObject*, PyObject* capsule) {
  Block* block = block_of(capsule);
  if (block == nullptr) return nullptr;
  block->is_open = false;
  const bool ok = block->take_back();
  block->let_go();
  if (!ok) return nullptr;
  Py_RETURN_NONE;
}

PyObject* take_back(PyObject*, PyObject* number) {
  const long long engine = PyLong_AsLongLong(number);
  if (engine == -1 && PyErr_Occurred()) return nullptr;
  try {
    if (!take_back_active(*find_state(engine))) return nullptr;
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
  Py_RETURN_NONE;
}

PyObject* is_foreign_engine(PyObject*, PyObject* number) {
  const long long engine = PyLong_AsLongLong(number);
  if (engine == -1 && PyErr_Occurred()) return nullptr;
  return PyBool_FromLong(is_foreign(engine) ? 1 : 0);
}

PyObject* runner(PyObject*, PyObject* number) {
  const long long engine = PyLong_AsLongLong(number);
  if (engine == -1 && PyErr_Occurred()) return nullptr;
  try {
    const std::shared_ptr<State> state = find_state(engine);
    unsigned long thread = state->active == nullptr ? 0 : state->active->owner;
    if (thread == 0 && !process_ends && !state->entering.empty()) thread = state->entering.front();
    return PyLong_FromUnsignedLong(thread);
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

PyMethodDef kMethods[] = {
    {"make_hooks", make_hooks, METH_VARARGS,
     "make_hooks(engine, block, name, module, targets, on_rebuild, increment_versions) -> "
     "(before, after, capsule). A target is (parameter, None, master, watched, is_filed, "
     "is_handed) or (dict, key, master, watched, is_filed, False); torch.ops.dgls._hand_over took "
     "the parameters with is_handed, in their order."},
    {"set_views", set_views, METH_VARARGS,
     "set_views(capsule, views): one list of tensors, or None, for each position."},
    {"shut", shut, METH_O, "shut(capsule): the block begins no new use."},
    {"end_process", end_process, METH_NOARGS,
     "end_process(): from now on a thread whose block is shut while it waits for weights waits for "
     "the end of the process, for five seconds at most, and then raises."},
    {"unhook", unhook, METH_O, "unhook(capsule): masters are bound, the hooks do nothing."},
    {"runner", runner, METH_O,
     "runner(engine): the thread whose block is bound to the arena now, or, unless the process "
     "ends, waits for its weights; or 0."},
    {"is_foreign", is_foreign_engine, METH_O,
     "is_foreign(engine): whether this process is a fork of the one that made it."},
    {"take_back", take_back, METH_O,
     "take_back(engine): ends a use that an exception left unfinished."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef kModule = {PyModuleDef_HEAD_INIT,
                       "_C",
                       "Hooks of dgls_torch.",
                       -1,
                       kMethods,
                       nullptr,
                       nullptr,
                       nullptr,
                       nullptr};

}  // namespace

PyObject* make_module() {
  return PyModule_Create(&kModule);
}

}  // namespace dgls
