// decode.cu as a library for the CPU; tests/python/test_decode_kernel.py loads it.
#include "emulator.h"
// The kernel's names for integers are its own.
#include "../../src/driver/cuda/kernels/decode.cu"

static_assert(offsetof(Batch, first_tile) == 4, "the layout of src/driver/cuda");
static_assert(offsetof(Batch, segments) == 136, "the layout of src/driver/cuda");

namespace {

// Whether all lanes came to the same shuffles.
bool run_warp(const Batch& batch, uint32_t warp) {
  for (auto& lane : shuffled) lane.clear();
  for (uint32_t lane = 0; lane < 32; ++lane) {
    threadIdx.x = warp * 32 + lane;
    decode(batch);
    if (shuffled[lane].size() != shuffled[0].size()) return false;
  }
  return true;
}

}  // namespace

// Runs a grid as CUDA would; 0, or 1 if lanes of one warp went different ways to their shuffles.
extern "C" int run(const Batch* batch, uint32_t blocks) {
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    for (uint32_t warp = 0; warp < THREADS / 32; ++warp) {
      if (!run_warp(*batch, warp)) return 1;
    }
  }
  return 0;
}
