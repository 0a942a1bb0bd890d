// Memory accesses of the kernels' bodies, which compile twice: for a GPU, and by the host's
// compiler for the tests, which run them on an emulated block (tests/emulated_block.hpp).
#pragma once

#include <cstdint>
#include <cstring>

#include "common/device.hpp"

namespace iqmpc::gpu {

constexpr int kLanes = 32;

IQMPC_BOTH constexpr int round_up(int n, int multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

struct alignas(8) Pair {
  float x[2];
};

struct alignas(16) Quad {
  float x[4];
};

// Four registers of a matrix fragment (cuda/fragments.hpp), two bf16 in each.
struct alignas(16) Fragment {
  std::uint32_t x[4];
};

// One access of sizeof(T) bytes; p is aligned to that.
template <class T>
IQMPC_DEVICE inline T load_as(const void* p) {
#ifdef __CUDA_ARCH__
  return *static_cast<const T*>(p);
#else
  T value;
  std::memcpy(&value, p, sizeof value);
  return value;
#endif
}

template <class T>
IQMPC_DEVICE inline void store_as(void* p, const T& value) {
#ifdef __CUDA_ARCH__
  *static_cast<T*>(p) = value;
#else
  std::memcpy(p, &value, sizeof value);
#endif
}

// 16 bytes of the packed model, which no kernel writes.
template <class T>
IQMPC_DEVICE inline T load_weights(const void* p) {
  static_assert(sizeof(T) == 16, "one vector load");
#ifdef __CUDA_ARCH__
  const uint4 bits = __ldg(static_cast<const uint4*>(p));
  T value;
  memcpy(&value, &bits, sizeof value);
  return value;
#else
  return load_as<T>(p);
#endif
}

}  // namespace iqmpc::gpu
