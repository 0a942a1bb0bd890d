// The kernels, for the host.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/rollout_tile.hpp"
#include "iqmpc/isa.hpp"

namespace iqmpc::gpu {

// Lets the kernels of this precision and these rows take `bytes` of shared memory on the current
// device.
cudaError_t allow_shared(Precision precision, int rows, std::size_t bytes);

// Enqueues a rollout in tiles of `rows`, one of tile_rows(precision). The fewest of those, which do
// the roots, must be allowed too.
cudaError_t launch(Precision precision, int rows, const unsigned char* arena,
                   const ModelData& model, const RolloutArgs& args, cudaStream_t stream);

}  // namespace iqmpc::gpu
