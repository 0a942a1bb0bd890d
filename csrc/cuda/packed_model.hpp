// A world model in the layout the CUDA kernels read: one block of memory, addressed by offsets, so
// that the same bytes serve on a device and, in the tests, on the host.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "cuda/portable.hpp"
#include "iqmpc/aligned_buffer.hpp"
#include "iqmpc/world_model.hpp"

namespace iqmpc::gpu {

// Inputs and outputs of every layer are padded with zeros to multiples of this, a matrix fragment's
// side.
constexpr int kSide = 16;

// Offsets are in bytes. Inputs are the latent's, padded, and then the action's, padded; layers
// other than a function's first have only the former.
struct LayerData {
  // bf16: fragments (cuda/fragments.hpp) [outputs / 16][inputs / 16][32 lanes], so that a warp's
  // load is 512 bytes in a row. float32: [inputs][outputs]. A critic's last layer: float [inputs].
  std::int64_t weights;
  std::int64_t bias, gamma, beta;  // float [padded]; gamma = beta = 0: no LayerNorm
  int inputs;                      // padded
  int latents;                     // of those, the latent's
  int outputs;
  int padded;  // outputs
};

struct StackData {
  int first, count;  // layers
};

// Passed to the kernels by value.
struct ModelData {
  int action_dim, latent_dim, num_critics, simnorm_dim;
  float log_std_min, log_std_max;
  int widest;        // the most outputs of a layer, padded
  int widest_input;  // the most inputs of a layer behind the first ones, padded
  StackData dynamics, policy;
  std::int64_t layers;   // LayerData []
  std::int64_t critics;  // StackData [num_critics]
};

struct PackedModel {
  Precision precision;
  ModelData model;
  AlignedBuffer<unsigned char> bytes;
};

// Throws std::invalid_argument, in WorldModel's words, where the sizes do not fit together.
PackedModel pack(const WorldModelView& view, Precision precision);

// Rows of a tile that there are kernels for, the most first.
const std::vector<int>& tile_rows(Precision precision);

// Shared memory that a tile of `rows` rows takes.
std::size_t shared_bytes(const ModelData& model, Precision precision, int rows);

// Of tile_rows, those whose shared memory is at most `limit` bytes. Throws std::invalid_argument
// where there are none; `device` is its name.
std::vector<int> fitting_rows(const ModelData& model, Precision precision, std::size_t limit,
                              const std::string& device);

// Of `fitting`, the most rows, which read the weights the least often, that keep every one of
// `processors` busy, else the fewest.
int choose_rows(const std::vector<int>& fitting, std::ptrdiff_t problems, std::ptrdiff_t samples,
                int processors);

}  // namespace iqmpc::gpu
