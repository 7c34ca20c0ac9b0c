// Binding and unbinding.
#include "block.h"

#include <algorithm>

#include "attribute.h"

namespace dgls {
namespace {

bool set(const Target& target, PyObject* value) {
  static const Attribute& data = *new Attribute("data");
  return target.is_dict ? PyDict_SetItem(target.object.get(), target.key.get(), value) == 0
                        : data.set(target.object.get(), value);
}

}  // namespace

Block::~Block() {
  if (state && state->active == this) state->active = nullptr;
}

bool Block::forget_stolen(unsigned long thread) {
  const auto found = std::find(stolen_from.begin(), stolen_from.end(), thread);
  if (found == stolen_from.end()) return false;
  stolen_from.erase(found);
  return true;
}

void Block::let_go() {
  std::vector<std::vector<Ref>>().swap(views);
  std::vector<Tensor>().swap(held_masters);
  std::vector<Tensor>().swap(held_views);
  std::vector<Target>().swap(targets);
  std::vector<Lines>().swap(view_lines);
  on_rebuild = Ref();
  increment_versions = Ref();
  state.reset();
}

bool Block::is_for(PyObject* module_object) const {
  return PyWeakref_GetObject(module.get()) == module_object;
}

void Block::note_lines() {
  const auto plain = std::find_if(targets.begin(), targets.end(), [](const Target& target) {
    return target.parameter.has_value();
  });
  learns_lines = plain != targets.end() && Lines::can_learn(plain->object.get(), *plain->parameter);
  if (!learns_lines) return;
  for (const Target& target : targets) {
    if (!target.is_dict) parameter_lines.add(target.object.get());
    master_lines.add(target.master.get());
  }
}

bool Block::bind(uint32_t at) {
  if (layout != state->layout || at >= views.size() || views[at].size() != targets.size()) {
    PyErr_Format(PyExc_RuntimeError,
                 "dgls: the plan changed while block '%s' began: the model is used in two threads "
                 "at once",
                 name.c_str());
    return false;
  }
  view_lines[at].fetch();
  if (!note_bound(at)) return false;
  is_bound = true;
  owner = PyThread_get_thread_ident();
  for (size_t i = 0; i < targets.size(); ++i) {
    if (!set(targets[i], views[at][i].get())) {
      KeepError keep;
      unbind();
      PyErr_Clear();
      return false;
    }
  }
  state->active = this;
  return true;
}

bool Block::unbind() {
  is_bound = false;
  if (state->active == this) state->active = nullptr;
  bool ok = true;
  for (const Target& target : targets) {
    if (set(target, target.master.get())) continue;
    if (!ok) PyErr_Clear();
    ok = false;
  }
  return ok;
}

bool Block::take_back() {
  if (!is_bound) return true;
  stolen_from.push_back(owner);
  const bool ok = unbind();
  if (state->is_foreign()) return ok;
  try {
    // On the stream on which it began: its kernels may still read the arena.
    state->engine->exit(stream);
  } catch (const std::exception& error) {
    if (ok) PyErr_SetString(PyExc_RuntimeError, error.what());
    return false;
  }
  return ok;
}

}  // namespace dgls
