// Every spelling of torch's stable ABI and of the limited C API that we use, and nothing else.
#pragma once

#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030A0000
#endif
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace dgls {

using torch::stable::Tensor;

// Whether operations record for backward on this thread.
inline bool grad_mode_is_on() {
  return aoti_torch_grad_mode_is_enabled();
}

// Torch's current CUDA stream of a device, as a driver handle; 0, the default stream, for the CPU
// (device < 0). Throws std::runtime_error when torch cannot say: a wrong stream is a data race.
uint64_t current_stream(int32_t device);

}  // namespace dgls
