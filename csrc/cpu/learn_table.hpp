// What one instruction-set level offers to an update of the model, in one precision.
//
// The operands of matrix products are made of 32-bit units: a float, or a pair of bf16 whose two
// numbers are multiplied and added together. Everything else is float32. Matrices are row-major and
// `ld` is the distance between rows, in elements (or units, where operands are meant). Columns are
// padded to whole panels: per-feature parameters with zeros, activations with whatever comes of it,
// which stays finite and meets zeros wherever it is read.
#pragma once

#include <cstddef>
#include <cstdint>

#include "iqmpc/isa.hpp"

namespace iqmpc::detail {

using Index = std::ptrdiff_t;
using Unit = std::uint32_t;

// Outputs of a layer at most: what lies between two passes over a row has a buffer of this size.
constexpr Index kWidestLayer = 8192;

// Sums over rows that a backward pass leaves: each [padded].
struct ColumnSums {
  float* gamma;
  float* beta;
  float* bias;
};

// One NormedLinear's rows as its forward pass left them.
struct NormTrace {
  float* normed;  // x̂, [rows, ld]
  float* slope;   // mish'(γ x̂ + β), [rows, ld]
  float* scale;   // 1 / sqrt(variance + ε), [rows]
  Index ld;
};

struct NormParameters {
  const float* gamma;  // [padded]
  const float* beta;
  Index features;
  Index padded;
};

struct AdamStep {
  float clip;  // what gradients are multiplied with
  float beta1, beta2;
  float rate;        // lr / (1 - β1^t)
  float correction;  // 1 / sqrt(1 - β2^t)
  float epsilon;
};

struct LearnTable {
  Index panel;  // columns of a packed panel, and what columns are padded to
  Index step;   // numbers in a unit

  // c [rows, columns] = init + a b. Row r of a has its k-th unit at a + r * am + k * ak; panel p of
  // b begins at b + p * b_panel, and its k-th row is ldb units further each. `columns` is whole
  // panels. init may be null (zeros), one row (ld_init = 0), or c itself.
  void (*product)(const Unit* a, Index am, Index ak, const Unit* b, Index ldb, Index b_panel,
                  const float* init, Index ld_init, Index rows, Index columns, Index depth,
                  float* c, Index ldc);

  // The panels of outputs [first, last) of weight [outputs, inputs], for x W^T: panel p has
  // round_up(inputs, step) / step rows of one unit per output. `first` is a multiple of the panel.
  void (*pack_forward)(const float* weight, Index outputs, Index inputs, Index first, Index last,
                       Unit* panels);
  // The panels of inputs [from, to), rows [first, last) of each, for y W: panel p has
  // round_up(outputs, step) / step rows. `first` is even.
  void (*pack_backward)(const float* weight, Index outputs, Index inputs, Index from, Index to,
                        Index first, Index last, Unit* panels);

  // `count` floats of each row as operands; the rest of the last panel becomes zero.
  void (*to_operand)(const float* x, Index ldx, Index rows, Index count, Unit* out, Index ld_out);
  // Pairs of rows, number by number, for sums over rows: out [rows / 2, columns] units of
  // x [rows, columns] bf16. Null where operands are floats, which need none of it.
  void (*interleave)(const Unit* x, Index ldx, Index rows, Index columns, Unit* out, Index ld_out);

  // y [rows, ld] holds pre-activations; multiplied by `mask` (null: by 1) they are normalised and
  // left in y as x̂, out = mish(γ x̂ + β) and the slope and scale are written.
  void (*norm_mish)(float* y, Index rows, const float* mask, const NormTrace& trace,
                    const NormParameters& norm, Unit* out, Index ld_out);
  // The same where no backward pass follows: y's rows are spoilt.
  void (*norm_mish_only)(float* y, Index ld, Index rows, const float* mask,
                         const NormParameters& norm, Unit* out, Index ld_out);
  // From g = dL/d(out), row r of g belonging to row `rows_of[r]` (null: r) of the trace: dL/d(x W^T
  // + b) into out, and its column sums and those of γ and β added to `sums` (null members: none).
  void (*norm_mish_backward)(const float* g, Index ldg, Index rows, const std::int32_t* rows_of,
                             const float* mask, const NormTrace& trace, const NormParameters& norm,
                             Unit* out, Index ld_out, const ColumnSums& sums);

  // y becomes x̂ as above; z [rows, ldz] = softmax of γ x̂ + β inside each group of `group`.
  void (*norm_simnorm)(float* y, Index ld, Index rows, const NormParameters& norm, Index group,
                       float* scale, float* z, Index ldz);
  void (*norm_simnorm_backward)(const float* g, Index ldg, Index rows, const float* z, Index ldz,
                                const NormTrace& trace, const NormParameters& norm, Index group,
                                Unit* out, Index ld_out, const ColumnSums& sums);

  // The gradient penalty's second-order pass through one NormedLinear
  // (csrc/cpu/learner_blocks.cpp). With c = dQ/d(out) and r̄ = dL/d(dQ/d(x W^T + b)): c̄ = dL/dc into
  // out and its column sums added to `out_sum` (null: none); what reaches the layer's own forward
  // pass into u_bar [rows, ld] (through γ x̂ + β), x_bar (through x̂) and scale_bar [rows]; γ's share
  // added to sums.gamma.
  void (*penalty_backward)(float* r_bar, const float* c, Index rows, const float* mask,
                           const NormTrace& trace, const NormParameters& norm, Unit* out,
                           Index ld_out, float* out_sum, float* u_bar, float* x_bar,
                           float* scale_bar, const ColumnSums& sums);
  // dL/d(x W^T + b) from those three (and h_bar = dL/d(out), null: none): as norm_mish_backward.
  void (*penalty_finish)(const float* h_bar, const float* u_bar, const float* x_bar,
                         const float* scale_bar, Index rows, const float* mask,
                         const NormTrace& trace, const NormParameters& norm, Unit* out,
                         Index ld_out, const ColumnSums& sums);

  // out [rows] = Σ_j w_j h_j + bias over `count`, whole vectors.
  void (*dot_rows)(const float* h, Index ld, Index rows, const float* w, float bias, Index count,
                   float* out);
  // sum [count] += Σ_r weight[r] h_r.
  void (*weighted_sum)(const float* h, Index ld, Index rows, const float* weight, Index count,
                       float* sum);
  // out [rows, ld] = weight[rows_of[r]] w: the gradient that a last neuron hands down.
  void (*outer)(const float* weight, const std::int32_t* rows_of, Index rows, const float* w,
                Index count, float* out, Index ld);
  // y += x, row by row.
  void (*add_rows)(const float* x, Index ldx, Index rows, Index count, float* y, Index ldy);

  // The policy's draw a = tanh(μ + σ ε) from head [rows, ld] = (μ, s) of `actions` each, and
  // log π of it: exact or, where `presquash`, without most of the squashing's share (learner.hpp).
  // `kept` (null: nothing) receives σ ε, dlogσ/ds and 1 - a², [rows, 3 ld_action].
  void (*policy_sample)(const float* head, Index ld_head, Index rows, const float* noise,
                        Index actions, float low, float high, bool presquash, float* action,
                        Index ld_action, float* log_prob, float* kept);
  // dL/dhead into g [rows, ldg], from da = dL/da without log π's part, and entropy_weight =
  // dL/d(log π) [rows].
  void (*policy_backward)(const float* da, Index ld_da, Index rows, const float* action,
                          Index ld_action, const float* kept, Index actions, bool presquash,
                          const float* entropy_weight, float* g, Index ldg);

  // g += factor (z - target), and Σ (z - target)² over `count` columns is returned.
  double (*squared_error)(const float* z, const float* target, Index ld, Index rows, Index count,
                          float factor, float* g);
  // Σ x² over a row of any length.
  double (*sum_squares)(const float* x, Index count);

  // One step of Adam on `count` numbers of any alignment.
  void (*adam)(const AdamStep& step, const float* gradient, Index count, float* value, float* m,
               float* v);
  // y += rate (x - y).
  void (*move)(float rate, const float* x, Index count, float* y);

  // Elements [first, first + count) of a stream of dropout multipliers: 0 with a probability of
  // threshold / 2^16, else `scale` (csrc/cpu/random.hpp).
  void (*fill_dropout)(const std::uint32_t* key, std::uint32_t stream, std::uint32_t problem,
                       Index first, Index count, std::uint32_t threshold, float scale, float* out);
};

// The kernels of a level that isa_levels() lists. Both precisions exist at every level; where the
// machine has no bf16 product, pairs are widened and multiplied one after the other.
const LearnTable& learn_table(Isa isa, Precision precision) noexcept;

}  // namespace iqmpc::detail
