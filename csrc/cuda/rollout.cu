// The two kernels of a rollout; what a block does is in cuda/rollout_tile.hpp.
#include "cuda/block.cuh"
#include "cuda/launch.hpp"

namespace iqmpc::gpu {

namespace {

template <class Operand, int kRows>
__global__ void __launch_bounds__(kThreads)
    root_kernel(const unsigned char* arena, const __grid_constant__ ModelData model,
                const __grid_constant__ RolloutArgs args) {
  root_tile<Operand, kRows>(DeviceBlock(), arena, model, args, blockIdx.x);
}

template <class Operand, int kRows>
__global__ void __launch_bounds__(kThreads)
    rollout_kernel(const unsigned char* arena, const __grid_constant__ ModelData model,
                   const __grid_constant__ RolloutArgs args) {
  rollout_tile<Operand, kRows>(DeviceBlock(), arena, model, args, blockIdx.x);
}

template <class Operand, int kRows, int kRootRows>
struct Kernels {
  static cudaError_t allow(std::size_t bytes) {
    if constexpr (kRows == kRootRows) {
      const cudaError_t error = allow(root_kernel<Operand, kRows>, bytes);
      if (error != cudaSuccess) return error;
    }
    return allow(rollout_kernel<Operand, kRows>, bytes);
  }

  static cudaError_t launch(const unsigned char* arena, const ModelData& model,
                            const RolloutArgs& args, cudaStream_t stream) {
    const auto bytes = [&](int rows) { return tile_layout<Operand>(model, rows).bytes; };
    const auto roots = static_cast<unsigned>(root_tiles<kRootRows>(args));
    root_kernel<Operand, kRootRows>
        <<<roots, kThreads, bytes(kRootRows), stream>>>(arena, model, args);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) return error;
    const auto tiles = static_cast<unsigned>(rollout_tiles<kRows>(args));
    rollout_kernel<Operand, kRows><<<tiles, kThreads, bytes(kRows), stream>>>(arena, model, args);
    return cudaGetLastError();
  }

 private:
  template <class Kernel>
  static cudaError_t allow(Kernel* kernel, std::size_t bytes) {
    return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                cudaFuncAttributeMaxDynamicSharedMemorySize,
                                static_cast<int>(bytes));
  }
};

// f of the kernels for tiles of `rows`: those of tile_rows.
template <class F>
cudaError_t with_kernels(Precision precision, int rows, F&& f) {
  if (precision == Precision::bf16) {
    return rows == 32 ? f(Kernels<Bf16, 32, 16>()) : f(Kernels<Bf16, 16, 16>());
  }
  return rows == 16 ? f(Kernels<float, 16, 8>()) : f(Kernels<float, 8, 8>());
}

}  // namespace

cudaError_t allow_shared(Precision precision, int rows, std::size_t bytes) {
  return with_kernels(precision, rows, [&](auto kernels) { return kernels.allow(bytes); });
}

cudaError_t launch(Precision precision, int rows, const unsigned char* arena,
                   const ModelData& model, const RolloutArgs& args, cudaStream_t stream) {
  return with_kernels(precision, rows,
                      [&](auto kernels) { return kernels.launch(arena, model, args, stream); });
}

}  // namespace iqmpc::gpu
