// Where a tensor's objects lie, and the processor's hint.
#include "lines.h"

#include <algorithm>
#include <cstring>

#include "attribute.h"

#ifdef _MSC_VER
#include <intrin.h>
#endif

namespace dgls {
namespace {

constexpr uintptr_t kLine = 64;
// Of torch's object for a tensor: what is read and written of it lies in its first bytes.
constexpr size_t kTensorBytes = 208;
// Its first words: the storage, autograd's data, the version counter are among them.
constexpr size_t kWords = 7;
constexpr size_t kPointedBytes = 128;
constexpr size_t kObjectBytes = 64;

#ifdef _MSC_VER
void ask_for(uintptr_t address) {
#if defined(_M_X64)
  _mm_prefetch(reinterpret_cast<const char*>(address), _MM_HINT_T1);
#elif defined(_M_ARM64)
  __prefetch(reinterpret_cast<const void*>(address));
#endif
}
#else
void ask_for(uintptr_t address) {
  __builtin_prefetch(reinterpret_cast<const void*>(address), 0, 2);
}
#endif

bool may_be_address(uintptr_t word) {
  return word > 0xFFFF && word % sizeof(void*) == 0 && word >> 47 == 0;
}

// The address of torch's object, which `_cdata` tells; 0 of what is no plain tensor.
uintptr_t torch_object(PyObject* tensor) {
  static const Attribute& attribute = *new Attribute("_cdata");
  if (!attribute.is_plain(tensor)) return 0;
  PyObject* number = attribute.get(tensor);
  const size_t address = number == nullptr ? 0 : PyLong_AsSize_t(number);
  Py_XDECREF(number);
  if (PyErr_Occurred() == nullptr) return address;
  PyErr_Clear();
  return 0;
}

}  // namespace

bool Lines::can_learn(PyObject* tensor, const Tensor& same) {
  uintptr_t object = 0;
  std::memcpy(&object, same.get(), sizeof(object));
  return object != 0 && object == torch_object(tensor);
}

void Lines::add(uintptr_t address, size_t bytes) {
  const uintptr_t first = address & ~(kLine - 1);
  const uintptr_t count = (address + bytes - first + kLine - 1) / kLine;
  const uintptr_t range = first | count;
  // Views share a storage; what was added lately is looked at, so that many tensors cost little.
  const auto recent = ranges_.size() > 8 ? ranges_.end() - 8 : ranges_.begin();
  if (std::find(recent, ranges_.end(), range) == ranges_.end()) ranges_.push_back(range);
}

void Lines::add(PyObject* tensor) {
  const uintptr_t object = torch_object(tensor);
  if (object == 0) return;
  add(reinterpret_cast<uintptr_t>(tensor), kObjectBytes);
  add(object, kTensorBytes);
  uintptr_t words[kWords];
  std::memcpy(words, reinterpret_cast<const void*>(object), sizeof(words));
  for (size_t i = 1; i < kWords; ++i) {
    if (may_be_address(words[i])) add(words[i], kPointedBytes);
  }
}

void Lines::fetch() const {
  for (const uintptr_t range : ranges_) {
    const uintptr_t first = range & ~(kLine - 1);
    for (uintptr_t i = 0; i < (range & (kLine - 1)); ++i) ask_for(first + i * kLine);
  }
}

}  // namespace dgls
