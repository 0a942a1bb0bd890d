// Layers as an update sees them: parameters in the caller's memory, operands of products,
// gradients.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "cpu/kernel_table.hpp"
#include "cpu/learn_table.hpp"
#include "iqmpc/aligned_buffer.hpp"
#include "iqmpc/learner.hpp"

namespace iqmpc::detail {

template <class T>
void ensure(AlignedBuffer<T>& buffer, Index size) {
  if (static_cast<Index>(buffer.size()) != size) {
    buffer = AlignedBuffer<T>(static_cast<std::size_t>(size));
  }
}

// The same, and all of it zero.
template <class T>
void ensure_zeros(AlignedBuffer<T>& buffer, Index size) {
  if (static_cast<Index>(buffer.size()) == size) {
    std::fill_n(buffer.data(), size, T{});
  } else {
    buffer = AlignedBuffer<T>(static_cast<std::size_t>(size));
  }
}

// Rows of numbers as operands of products. In bf16 a product that sums over rows needs them in
// pairs of rows, which `interleave` makes of those written.
struct Operand {
  // Zeros: rows are summed in pairs, and the one that an odd number of them leaves over is never
  // written. What a batch of another size left there would be added to the gradients.
  void reserve(const LearnTable& k, Index count, Index columns) {
    table = &k;
    width = round_up(columns, k.panel);
    ld = width / k.step;
    ensure_zeros(rows, count * ld);
    if (k.interleave) ensure_zeros(pairs, (count + 1) / 2 * width);
  }
  Unit* row(Index r) { return rows.data() + r * ld; }
  const Unit* row(Index r) const { return rows.data() + r * ld; }
  void interleave(Index first, Index count) {
    if (!table->interleave || count == 0) return;
    table->interleave(row(first), ld, count, width, pairs.data() + first / 2 * width, width);
  }
  // For sums over rows: unit k of the sum at wide() + k * width.
  const Unit* wide() const { return table->interleave ? pairs.data() : rows.data(); }

  const LearnTable* table = nullptr;
  Index width = 0;  // columns, whole panels
  Index ld = 0;     // units of a row
  AlignedBuffer<Unit> rows, pairs;
};

// What one layer's backward pass needs of its forward pass, and its result.
struct Trace {
  // `k` is the table of the layer, `next` that of the layer which reads its output.
  void reserve(const LearnTable& k, const LearnTable& next, Index count, Index columns,
               bool dropout) {
    ld = round_up(columns, k.panel);
    ensure(normed, count * ld);
    ensure(slope, count * ld);
    ensure(scale, count);
    if (dropout) ensure(mask, count * ld);
    out.reserve(next, count, columns);
    grad.reserve(k, count, columns);
  }
  NormTrace at(Index row) {
    return {normed.data() + row * ld, slope.data() + row * ld, scale.data() + row, ld};
  }
  float* mask_row(Index row) { return mask.data() + row * ld; }
  const float* mask_at(Index row) const { return mask.size() ? mask.data() + row * ld : nullptr; }

  Index ld = 0;
  AlignedBuffer<float> normed, slope, scale, mask;
  Operand out;   // mish of the normalised: the next layer's input
  Operand grad;  // dL/d(x W^T + b)
};

// A product that a weight's gradient is made of: grad^T in, over `depth` rows of both.
struct GradientPart {
  const Operand* grad;
  const Operand* in;
  Index rows;
};

constexpr Index kStripRows = 64;  // outputs of a layer that one task works on: whole panels

// A parameter's place in an optimiser.
struct Group {
  AdamStep step;
  float average_rate;
};

// `count` values of a parameter from place `at` on, by their gradient; and their average.
inline void step_values(const LearnTable& k, const Group& group, const float* gradient, Index count,
                        const Parameter& p, Index at) {
  k.adam(group.step, gradient, count, p.value + at, p.first + at, p.second + at);
  if (p.average != nullptr) k.move(group.average_rate, p.value + at, count, p.average + at);
}

class Layer {
 public:
  Layer(const LayerParameters& parameters, const LearnTable& table)
      : p(parameters),
        k(&table),
        out(p.out),
        in(p.in),
        padded(round_up(out, table.panel)),
        padded_in(round_up(in, table.panel)),
        depth((in + table.step - 1) / table.step),
        depth_out((out + table.step - 1) / table.step),
        strips((out + kStripRows - 1) / kStripRows),
        forward_(units(padded * depth)),
        bias_(units(padded)),
        gamma_(units(padded)),
        beta_(units(padded)) {}

  // Also keep the operands of dL/dx for inputs [from, to), as number `which` of three.
  void keep_backward(int which, Index from, Index to) {
    ranges_[which] = {from, to};
    backward_[which] = AlignedBuffer<Unit>(units(round_up(to - from, k->panel) * depth_out));
  }
  Index back_columns(int which) const {
    return round_up(ranges_[which].second - ranges_[which].first, k->panel);
  }

  NormParameters norm() const { return {gamma_.data(), beta_.data(), out, padded}; }
  bool normed() const { return p.gamma.value != nullptr; }

  // y [rows, ldy] = x W^T + b
  void forward(const Unit* x, Index ldx, Index rows, float* y, Index ldy, bool bias = true) const {
    k->product(x, ldx, 1, forward_.data(), k->panel, depth * k->panel,
               bias ? bias_.data() : nullptr, 0, rows, padded, depth, y, ldy);
  }
  // x [rows, ldx] = y W over the inputs kept as `which`
  void backward(int which, const Unit* y, Index ldy, Index rows, float* x, Index ldx) const {
    k->product(y, ldy, 1, backward_[which].data(), k->panel, depth_out * k->panel, nullptr, 0, rows,
               back_columns(which), depth_out, x, ldx);
  }

  // Parameters of one strip of outputs as operands.
  void pack(Index strip) {
    const Index first = strip * kStripRows, last = std::min(out, first + kStripRows);
    k->pack_forward(p.weight.value, out, in, first, last, forward_.data());
    for (int which = 0; which < kRanges; ++which) {
      if (backward_[which].size() == 0) continue;
      k->pack_backward(p.weight.value, out, in, ranges_[which].first, ranges_[which].second, first,
                       last, backward_[which].data());
    }
    std::copy(p.bias.value + first, p.bias.value + last, bias_.data() + first);
    if (!normed()) return;
    std::copy(p.gamma.value + first, p.gamma.value + last, gamma_.data() + first);
    std::copy(p.beta.value + first, p.beta.value + last, beta_.data() + first);
  }

  // From here on for layers that learn.
  void reserve_gradients(Index blocks) {
    ensure(weight_gradient, out * padded_in);
    ensure(vector_gradients, 3 * padded);
    ensure(partial_, blocks * 3 * padded);
    squares.assign(static_cast<std::size_t>(strips), 0);
  }
  // Where block `b` leaves the sums over its rows; zeroed by `clear_sums`.
  ColumnSums sums(Index block) {
    float* at = partial_.data() + block * 3 * padded;
    return {at + padded, at + 2 * padded, at};
  }
  void clear_sums(Index block) {
    std::fill_n(partial_.data() + block * 3 * padded, 3 * padded, 0.0f);
  }

  // The gradients of one strip from all blocks' rows, always in the same order.
  void gather_gradients(Index strip, Index blocks) {
    const Index first = strip * kStripRows, last = std::min(out, first + kStripRows);
    float* target = weight_gradient.data() + first * padded_in;
    const float* init = nullptr;
    const auto add = [&](const GradientPart& part) {
      k->product(part.grad->wide() + first, 1, part.grad->width, part.in->wide(), part.in->width,
                 k->panel, init, padded_in, last - first, padded_in, part.rows / k->step, target,
                 padded_in);
      init = target;
    };
    for (const GradientPart& part : parts) add(part);
    if (extra.grad != nullptr) add(extra);
    double total = 0;
    for (Index o = first; o < last; ++o) {
      total += k->sum_squares(weight_gradient.data() + o * padded_in, in);
    }
    for (Index v = 0; v < (normed() ? 3 : 1); ++v) {
      float* gradient = vector_gradients.data() + v * padded;
      for (Index o = first; o < last; ++o) {
        double sum = 0;
        for (Index b = 0; b < blocks; ++b) sum += partial_.data()[(b * 3 + v) * padded + o];
        gradient[o] = static_cast<float>(sum);
      }
      total += k->sum_squares(gradient + first, last - first);
    }
    squares[static_cast<std::size_t>(strip)] = total;
  }

  // One optimiser step on a strip.
  void step(Index strip, const Group& group) {
    const Index first = strip * kStripRows, last = std::min(out, first + kStripRows);
    for (Index o = first; o < last; ++o) {
      const Index at = o * in;
      step_values(*k, group, weight_gradient.data() + o * padded_in, in, p.weight, at);
    }
    const Parameter* vectors[] = {&p.bias, &p.gamma, &p.beta};
    for (Index v = 0; v < (normed() ? 3 : 1); ++v) {
      step_values(*k, group, vector_gradients.data() + v * padded + first, last - first,
                  *vectors[v], first);
    }
  }

  // One strip of a target layer moves towards the critic's by `rate`.
  void follow(Index strip, const Layer& critic, float rate) const {
    const Index first = strip * kStripRows, count = std::min(out, first + kStripRows) - first;
    k->move(rate, critic.p.weight.value + first * in, count * in, p.weight.value + first * in);
    k->move(rate, critic.p.bias.value + first, count, p.bias.value + first);
    k->move(rate, critic.p.gamma.value + first, count, p.gamma.value + first);
    k->move(rate, critic.p.beta.value + first, count, p.beta.value + first);
  }

  const LayerParameters p;
  const LearnTable* const k;
  const Index out, in, padded, padded_in, depth, depth_out, strips;
  std::vector<GradientPart> parts;
  GradientPart extra{};                  // of this update alone; without a grad: none
  bool repack = false;                   // right after a step, since the same update reads it again
  AlignedBuffer<float> weight_gradient;  // [out, padded_in]
  AlignedBuffer<float> vector_gradients;  // [3, padded]: bias, gamma, beta
  std::vector<double> squares;            // of each strip's gradients

 private:
  static std::size_t units(Index n) { return static_cast<std::size_t>(n); }

  static constexpr int kRanges = 3;
  std::pair<Index, Index> ranges_[kRanges];
  AlignedBuffer<Unit> forward_, backward_[kRanges];
  AlignedBuffer<float> bias_, gamma_, beta_;
  AlignedBuffer<float> partial_;  // [blocks, 3, padded]
};

// The last layer of a critic or a termination head: one neuron behind the last hidden layer.
class Neuron {
 public:
  Neuron(const LayerParameters& parameters, const LearnTable& exact)
      : p(parameters),
        k(&exact),
        in(p.in),
        padded(round_up(in, exact.panel)),
        weight_(static_cast<std::size_t>(padded)),
        gradient_(static_cast<std::size_t>(padded + 1)) {}

  const float* weight() const { return weight_.data(); }
  float bias() const { return bias_; }
  const float* gradient() const { return gradient_.data(); }  // [in]; the bias's at [padded]

  void pack() {
    std::copy_n(p.weight.value, in, weight_.data());
    bias_ = p.bias.value[0];
  }
  void reserve_gradients(Index blocks) { ensure(partial_, blocks * (padded + 1)); }
  float* sums(Index block) { return partial_.data() + block * (padded + 1); }
  void clear_sums(Index block) { std::fill_n(sums(block), padded + 1, 0.0f); }

  double gather_gradients(Index blocks) {
    for (Index i = 0; i <= padded; ++i) {
      double sum = 0;
      for (Index b = 0; b < blocks; ++b) sum += sums(b)[i];
      gradient_.data()[i] = static_cast<float>(sum);
    }
    return k->sum_squares(gradient_.data(), in) + k->sum_squares(gradient_.data() + padded, 1);
  }
  void step(const Group& group) const {
    step_values(*k, group, gradient(), in, p.weight, 0);
    step_values(*k, group, gradient() + padded, 1, p.bias, 0);
  }
  void follow(const Neuron& critic, float rate) const {
    k->move(rate, critic.p.weight.value, in, p.weight.value);
    k->move(rate, critic.p.bias.value, 1, p.bias.value);
  }

  const LayerParameters p;
  const LearnTable* const k;
  const Index in, padded;

 private:
  float bias_ = 0;
  AlignedBuffer<float> weight_;
  AlignedBuffer<float> partial_;  // [blocks, padded + 1]
  AlignedBuffer<float> gradient_;
};

}  // namespace iqmpc::detail
