// Looks up torch's current stream.
//
// The symbol lives in libtorch_cuda. A plain dlsym(RTLD_DEFAULT, ...) finds it only if this
// library has NEEDED libtorch.so, which the order of link flags silently decides; a null would
// mean the default stream, which is the wrong one. So the loaded library is asked by its name.
#include <stdexcept>
#include <string>

#include "stable.h"

#ifdef _WIN32
#include <windows.h>
#else
#include <dlfcn.h>
#endif

namespace dgls {
namespace {

constexpr const char* kSymbol = "aoti_torch_get_current_cuda_stream";

#ifdef _WIN32
void* find_symbol() {
  HMODULE library = GetModuleHandleA("torch_cuda.dll");
  return library ? reinterpret_cast<void*>(GetProcAddress(library, kSymbol)) : nullptr;
}
#else
void* find_symbol() {
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  return library ? dlsym(library, kSymbol) : nullptr;
}
#endif

}  // namespace

uint64_t current_stream(int32_t device) {
  if (device < 0) return 0;
  using Lookup = AOTITorchError (*)(int32_t, void**);
  static const Lookup lookup = reinterpret_cast<Lookup>(find_symbol());
  if (lookup == nullptr) {
    throw std::runtime_error(std::string("this torch has no ") + kSymbol +
                             "; torch 2.10 or newer with CUDA is needed");
  }
  void* stream = nullptr;
  if (lookup(device, &stream) != 0) {
    throw std::runtime_error("torch could not name its current stream of CUDA device " +
                             std::to_string(device));
  }
  return reinterpret_cast<uint64_t>(stream);
}

}  // namespace dgls
