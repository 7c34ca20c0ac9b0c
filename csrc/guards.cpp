// What a block's hooks refuse, rather than compute with the wrong weights.
#include "attribute.h"
#include "block.h"

namespace dgls {
namespace {

bool address_of(PyObject* tensor, unsigned long long& address) {
  static PyObject* const name = PyUnicode_InternFromString("data_ptr");
  PyObject* number = PyObject_CallMethodObjArgs(tensor, name, nullptr);
  if (number == nullptr) return false;
  address = PyLong_AsUnsignedLongLong(number);
  Py_DECREF(number);
  return PyErr_Occurred() == nullptr;
}

// Where the bytes of what is bound outside of the forward lie.
bool address_of(const Target& target, unsigned long long& address) {
  if (!target.parameter) return address_of(target.object.get(), address);
  void* data = nullptr;
  if (aoti_torch_get_data_ptr(target.parameter->get(), &data) != 0) {
    PyErr_SetString(PyExc_RuntimeError, "dgls: torch could not say where a weight lies");
    return false;
  }
  address = reinterpret_cast<uintptr_t>(data);
  return true;
}

bool version_of(PyObject* tensor, long long& version) {
  static const Attribute& attribute = *new Attribute("_version");
  PyObject* number = attribute.get(tensor);
  if (number == nullptr) return false;
  version = PyLong_AsLongLong(number);
  Py_DECREF(number);
  return version != -1 || PyErr_Occurred() == nullptr;
}

// The version of a tensor, without what the hooks themselves added to it.
bool version_of(const Watched& watched, long long& version) {
  if (!version_of(watched.tensor.get(), version)) return false;
  version -= static_cast<long long>(*watched.bumps);
  return true;
}

}  // namespace

bool Block::note_masters() {
  for (Target& target : targets) {
    if (!target.is_dict && !address_of(target, target.address)) return false;
    for (Watched& watched : target.watched) {
      watched.bumps = &state->bumps[watched.tensor.get()];
      if (!version_of(watched, watched.version)) return false;
    }
  }
  return true;
}

bool Block::check_masters(bool& changed) {
  for (Target& target : targets) {
    unsigned long long address = 0;
    if (!target.is_dict && !address_of(target, address)) return false;
    if (target.is_dict
            ? PyDict_GetItem(target.object.get(), target.key.get()) != target.master.get()
            : address != target.address) {
      PyErr_Format(PyExc_RuntimeError,
                   "dgls: a weight of block '%s' was replaced by another tensor while it streams; "
                   "detach() first, change the model, and stream it again",
                   name.c_str());
      return false;
    }
    for (Watched& watched : target.watched) {
      long long version = 0;
      if (!version_of(watched, version)) return false;
      if (version == watched.version) continue;
      if (target.is_filed) {
        PyErr_Format(PyExc_RuntimeError,
                     "dgls: a weight of block '%s' was changed in place, but it streams from a "
                     "file; detach() first, or stream from the tensors",
                     name.c_str());
        return false;
      }
      watched.version = version;
      changed = true;
    }
  }
  return true;
}

bool Block::note_bound(uint32_t at) {
  position = at;
  bound_versions.clear();
  for (size_t i = 0; i < targets.size(); ++i) {
    if (!targets[i].is_dict || targets[i].watched.empty()) continue;
    bound_versions.push_back(0);
    if (!version_of(views[at][i].get(), bound_versions.back())) return false;
  }
  return true;
}

bool Block::wrote_weights() {
  long long version = 0;
  bool wrote = false;
  auto bound = bound_versions.begin();
  for (size_t i = 0; i < targets.size(); ++i) {
    if (targets[i].is_dict) {
      if (targets[i].watched.empty()) continue;
      if (!version_of(views[position][i].get(), version)) return true;
      wrote |= version != *bound++;
      continue;
    }
    for (Watched& watched : targets[i].watched) {
      if (!version_of(watched, version)) return true;
      wrote |= version != watched.version;
      watched.version = version;
    }
  }
  if (wrote) {
    PyErr_Format(PyExc_RuntimeError,
                 "dgls: block '%s' changes its weights while it runs, and weights are not copied "
                 "back; exclude the block",
                 name.c_str());
  }
  return wrote;
}

bool Block::invalidate_saved() {
  PyObject* done = PyObject_CallNoArgs(increment_versions.get());
  if (done == nullptr) return false;
  Py_DECREF(done);
  if (!state) return true;
  for (const Target& target : targets) {
    if (target.is_dict) continue;
    for (const Watched& watched : target.watched) ++*watched.bumps;
  }
  return true;
}

bool Block::returns_weights(const State& in, PyObject* output, int depth) const {
  if (output == Py_None || depth > 4) return false;
  if (PyTuple_Check(output) || PyList_Check(output)) {
    const Py_ssize_t size = PySequence_Size(output);
    for (Py_ssize_t i = 0; i < size; ++i) {
      PyObject* item = PySequence_GetItem(output, i);
      const bool found = item != nullptr && returns_weights(in, item, depth + 1);
      Py_XDECREF(item);
      if (found) return true;
    }
    PyErr_Clear();
    return false;
  }
  if (PyDict_Check(output)) {
    PyObject *key = nullptr, *value = nullptr;
    for (Py_ssize_t at = 0; PyDict_Next(output, &at, &key, &value);) {
      const Ref held(value);
      if (returns_weights(in, value, depth + 1)) return true;
    }
    return false;
  }
  unsigned long long address = 0;
  if (!address_of(output, address)) PyErr_Clear();  // no tensor, or one without an address
  const auto first = reinterpret_cast<uintptr_t>(in.arena.data_ptr());
  if (address < first || address - first >= static_cast<uint64_t>(in.arena.numel())) {
    return false;
  }
  PyErr_Format(PyExc_RuntimeError,
               "dgls: block '%s' returns a view of one of its weights, which are about to make way "
               "for others; exclude the block, or return a copy",
               name.c_str());
  return true;
}

bool Block::allows_grad_mode() {
  static const Attribute& attribute = *new Attribute("requires_grad");
  had_grad_mode = grad_mode_is_on();
  if (!had_grad_mode) return true;
  for (const Target& target : targets) {
    PyObject* tensor = target.is_dict ? target.master.get() : target.object.get();
    PyObject* requires_grad = attribute.get(tensor);
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
