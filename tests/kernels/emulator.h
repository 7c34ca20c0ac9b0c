// What CUDA gives decode.cu, for a CPU: the names that it uses and no others.
//
// Lanes run one after the other, the lowest first. That is enough for a kernel whose lanes only ask
// lanes below them: what was said there is on record. It says nothing about the order of two lanes'
// writes to the same byte; decode.cu has no such two.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(threads)

struct uint2 {
  uint32_t x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};
struct Index {
  uint32_t x = 0;
};

inline Index threadIdx;
inline Index blockIdx;

// What each lane of the present warp gave to its shuffles, by lane and then in order.
inline std::vector<uint32_t> shuffled[32];

inline uint2 make_uint2(uint32_t x, uint32_t y) {
  return {x, y};
}

inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
  return {x, y, z, w};
}

inline void* __cvta_global_to_generic(size_t address) {
  return reinterpret_cast<void*>(address);
}

template <typename T>
T __ldg(const T* address) {
  T value;
  std::memcpy(&value, address, sizeof(value));
  return value;
}

inline int __popc(uint32_t word) {
  return __builtin_popcount(word);
}

inline int __ffs(int word) {
  return __builtin_ffs(word);
}

inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
  return static_cast<uint32_t>((uint64_t{high} << 32 | low) >> (shift & 31));
}

inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t chosen = selector >> (4 * i) & 7;
    result |= static_cast<uint32_t>(bytes >> (8 * chosen) & 0xFF) << (8 * i);
  }
  return result;
}

inline uint32_t __shfl_up_sync(uint32_t, uint32_t value, uint32_t distance) {
  const uint32_t lane = threadIdx.x % 32;
  const size_t number = shuffled[lane].size();
  shuffled[lane].push_back(value);
  return lane < distance ? value : shuffled[lane - distance].at(number);
}
