// Binding and unbinding.
#include "block.h"

namespace dgls {
namespace {

PyObject* name_of_data() {
  static PyObject* const name = PyUnicode_InternFromString("data");
  return name;
}

bool set(const Target& target, PyObject* value) {
  return (target.is_dict ? PyDict_SetItem(target.object.get(), target.key.get(), value)
                         : PyObject_SetAttr(target.object.get(), name_of_data(), value)) == 0;
}

// Keeps an exception that is already set while more Python runs.
class KeepError {
 public:
  KeepError() { PyErr_Fetch(&type_, &value_, &trace_); }
  ~KeepError() {
    if (type_ != nullptr) PyErr_Restore(type_, value_, trace_);
  }

 private:
  PyObject* type_ = nullptr;
  PyObject* value_ = nullptr;
  PyObject* trace_ = nullptr;
};

}  // namespace

Block::~Block() {
  if (state->active == this) state->active = nullptr;
}

bool Block::is_for(PyObject* module_object) const {
  return PyWeakref_GetObject(module.get()) == module_object;
}

bool Block::bind(uint32_t position) {
  if (position >= views.size() || views[position].size() != targets.size()) {
    PyErr_Format(PyExc_RuntimeError, "dgls: block '%s' has no views for position %u", name.c_str(),
                 static_cast<unsigned>(position));
    return false;
  }
  is_bound = true;
  for (size_t i = 0; i < targets.size(); ++i) {
    if (!set(targets[i], views[position][i].get())) {
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
  is_stolen = true;
  const bool ok = unbind();
  try {
    // On the stream on which it began: its kernels may still read the arena.
    state->engine->exit(stream);
  } catch (const std::exception& error) {
    if (ok) PyErr_SetString(PyExc_RuntimeError, error.what());
    return false;
  }
  return ok;
}

bool Block::allows_grad_mode() {
  had_grad_mode = grad_mode_is_on();
  if (!had_grad_mode) return true;
  for (const Target& target : targets) {
    PyObject* tensor = target.is_dict ? target.master.get() : target.object.get();
    PyObject* requires_grad = PyObject_GetAttrString(tensor, "requires_grad");
    if (requires_grad == nullptr) return false;
    const bool trains = PyObject_IsTrue(requires_grad) == 1;
    Py_DECREF(requires_grad);
    if (!trains) continue;
    PyErr_Format(PyExc_RuntimeError,
                 "dgls_torch streams weights for inference only, but grad mode is on and block "
                 "'%s' has parameters that require grad; run under torch.inference_mode() or "
                 "torch.no_grad(), or call model.requires_grad_(False)",
                 name.c_str());
    return false;
  }
  return true;
}

}  // namespace dgls
