// The thread block on a device: see cuda/product.hpp for what a Block is.
#pragma once

#include "cuda/product.hpp"

namespace iqmpc::gpu {

constexpr int kThreads = 256;

class DeviceWarp {
 public:
  // A value of each lane; here, this thread's.
  template <class T>
  struct Lanes {
    T value;
    __device__ __forceinline__ T& operator[](int) { return value; }
    __device__ __forceinline__ const T& operator[](int) const { return value; }
  };

  __device__ __forceinline__ int index() const { return threadIdx.x / kLanes; }

  // f(lane) for all lanes.
  template <class F>
  __device__ __forceinline__ void lanes(F&& f) const {
    f(lane());
  }

  // f(i) for i in [0, n), spread over the lanes; what they wrote is then seen by all of them.
  template <class F>
  __device__ __forceinline__ void each(int n, F&& f) const {
    for (int i = lane(); i < n; i += kLanes) f(i);
    __syncwarp();
  }

  // Σ f(i) over [0, n), the same number in all lanes.
  template <class F>
  __device__ __forceinline__ float sum(int n, F&& f) const {
    float total = 0;
    for (int i = lane(); i < n; i += kLanes) total += f(i);
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) {
      total += __shfl_xor_sync(0xffffffffu, total, distance);
    }
    return total;
  }

  // sums += inputs weights^T for 8 of the weights' 16 outputs.
  __device__ __forceinline__ void multiply_add(Lanes<Sums>& sums, const Lanes<Fragment>& inputs,
                                               const Lanes<Fragment>& weights, int half) const {
    float* c = sums.value.x;
    const std::uint32_t* a = inputs.value.x;
    const std::uint32_t* b = weights.value.x + 2 * half;
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }

 private:
  __device__ __forceinline__ int lane() const { return threadIdx.x % kLanes; }
};

class DeviceBlock {
 public:
  static constexpr int kWarps = kThreads / kLanes;

  __device__ __forceinline__ unsigned char* shared() const {
    extern __shared__ uint4 memory[];
    return reinterpret_cast<unsigned char*>(memory);
  }

  // f(i) for i in [0, n), spread over the threads.
  template <class F>
  __device__ __forceinline__ void each(int n, F&& f) const {
    for (int i = threadIdx.x; i < n; i += kThreads) f(i);
    __syncthreads();
  }

  // f(row, warp) for rows in [0, n), spread over the warps.
  template <class F>
  __device__ __forceinline__ void rows(int n, F&& f) const {
    for (int row = threadIdx.x / kLanes; row < n; row += kWarps) f(row, DeviceWarp());
    __syncthreads();
  }

  // f(warp) for all warps.
  template <class F>
  __device__ __forceinline__ void warps(F&& f) const {
    f(DeviceWarp());
    __syncthreads();
  }
};

}  // namespace iqmpc::gpu
