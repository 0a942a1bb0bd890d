// What one instruction-set level offers to the operations built on it, in one precision.
//
// Matrices are row-major; `ld` is the distance between rows in elements. Activations are float, or
// bf16 where `bf16_activations` says so. Vectors of per-feature parameters are zero-padded to whole
// panels, and internal buffers are as wide, so that no kernel meets a ragged edge there.
#pragma once

#include <cstddef>
#include <cstdint>

#include "iqmpc/isa.hpp"

namespace iqmpc::detail {

using Index = std::ptrdiff_t;

// Columns to which a row of actions is padded. The same at every level, because the counter-based
// generator numbers its draws by padded columns.
constexpr Index kActionPad = 16;

constexpr Index round_up(Index n, Index multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

struct KernelTable {
  // Rows of x in one register tile; a caller that blocks rows itself does so in multiples of it.
  Index tile_rows;
  // Outputs in one packed panel.
  Index panel;
  // Floats in a vector.
  Index width;
  // Inputs that are multiplied together: weights are packed in such steps, 1 or 2.
  Index step;
  bool bf16_weights;
  bool bf16_activations;

  // y [rows, out] = init [rows, out] + x [rows, in] W^T. ld_init = 0 repeats one row (a bias).
  // `panels` as PackedLayer lays them out; `in` is a multiple of `step`. `init` and `y` may be the
  // same. Reads `init` up to whole panels, writes nothing beyond column `out`.
  void (*linear)(const void* x, Index ldx, Index rows, const void* panels, const float* init,
                 Index ld_init, Index in, Index out, float* y, Index ldy);

  // out [rows, columns] = mish(x / sqrt(Σ x² / n + ε) γ + β): LayerNorm of pre-activations whose
  // mean packing has already removed (PackedLayer), then Mish. `out` holds activations.
  void (*norm_mish)(const float* x, Index ldx, Index rows, const float* gamma, const float* beta,
                    Index columns, Index n, void* out, Index ld_out);

  // out [rows] = Σ_j w_j mish(layer_norm(x))_j + bias: norm_mish whose only reader is one neuron.
  void (*norm_mish_dot)(const float* x, Index ldx, Index rows, const float* gamma,
                        const float* beta, Index columns, Index n, const float* w, float bias,
                        float* out);

  // out [rows, dim * groups] = simnorm(layer_norm(x)), member v of group g in column
  // v * groups + g. Overwrites x. `groups` is a multiple of `width`.
  void (*norm_simnorm)(float* x, Index ldx, Index rows, const float* gamma, const float* beta,
                       Index dim, Index groups, Index n, void* out, Index ld_out);

  // action [rows, pad] = tanh(μ + σ noise), log σ = low + (high - low)/2 (tanh(s) + 1), where a row
  // of `head` holds μ in [0, pad) and s in [pad, 2 pad). pad is a multiple of kActionPad.
  void (*gaussian)(const float* head, Index ld_head, Index rows, const float* noise, Index pad,
                   float low, float high, float* action);

  // `count` floats as activations; whole vectors.
  void (*to_activations)(const float* x, Index count, void* out);

  // Elements [first, first + count) of a stream of standard normal draws: csrc/cpu/random.hpp.
  void (*fill_normal)(const std::uint32_t* key, std::uint32_t stream, std::uint32_t problem,
                      Index first, Index count, float* out);

  // x [count] = min(max(mean + std x, -1), 1), with mean and std [count]; whole vectors.
  void (*affine_clamp)(float* x, const float* mean, const float* std, Index count);

  // What packs a layer (PackedLayer), the same bits at every level.
  //
  // mean [columns] of w [rows, columns] over its rows, summed in float64 one row after the other.
  void (*column_means)(const float* w, Index rows, Index columns, float* mean);

  // out [columns, panel] = w [panel, columns] - mean [columns], transposed. `rows` points to the
  // `panel` rows of w, null for zeros, which no mean is taken from; up to `end` memory may be read.
  void (*transpose)(const float* const* rows, const float* end, const float* mean, Index columns,
                    float* out);

  // Input k of a panel of `in` inputs = row plus[k] less row minus[k] of x [*, panel].
  void (*pack_panel)(const float* x, const Index* plus, const Index* minus, Index in, void* panel);
};

// The kernels of a level that isa_levels() lists.
const KernelTable& kernel_table(Isa isa, Precision precision) noexcept;

}  // namespace iqmpc::detail
