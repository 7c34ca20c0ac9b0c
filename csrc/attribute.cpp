// Finds the descriptors of torch.Tensor once.
#include "attribute.h"

namespace dgls {
namespace {

PyObject* type_named(const char* module_name, const char* name) {
  PyObject* module = PyImport_ImportModule(module_name);
  PyObject* type = module == nullptr ? nullptr : PyObject_GetAttrString(module, name);
  Py_XDECREF(module);
  PyErr_Clear();
  return type;
}

}  // namespace

// What is not found is left null: then every access goes by name. Nothing is ever given back:
// attributes live as long as the process.
Attribute::Attribute(const char* name)
    : name_(PyUnicode_InternFromString(name)),
      tensor_type_(type_named("torch", "Tensor")),
      parameter_type_(type_named("torch.nn", "Parameter")) {
  if (tensor_type_ != nullptr) descriptor_ = PyObject_GetAttr(tensor_type_, name_);
  if (descriptor_ == nullptr) {
    PyErr_Clear();
    return;
  }
  PyTypeObject* const type = Py_TYPE(descriptor_);
  get_ = reinterpret_cast<descrgetfunc>(PyType_GetSlot(type, Py_tp_descr_get));
  set_ = reinterpret_cast<descrsetfunc>(PyType_GetSlot(type, Py_tp_descr_set));
}

bool Attribute::is_plain(PyObject* tensor) const {
  PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(tensor));
  return type == parameter_type_ || type == tensor_type_;
}

PyObject* Attribute::get(PyObject* tensor) const {
  if (get_ == nullptr || !is_plain(tensor)) return PyObject_GetAttr(tensor, name_);
  return get_(descriptor_, tensor, reinterpret_cast<PyObject*>(Py_TYPE(tensor)));
}

bool Attribute::set(PyObject* tensor, PyObject* value) const {
  if (set_ == nullptr || !is_plain(tensor)) return PyObject_SetAttr(tensor, name_, value) == 0;
  return set_(descriptor_, tensor, value) == 0;
}

}  // namespace dgls
