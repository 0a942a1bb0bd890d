// The kernels of a hidden layer, Linear, LayerNorm and Mish, against their definition in double
// precision: at sizes on both sides of every level's tile, panel and vector width.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <random>
#include <vector>

#include "check.hpp"
#include "cpu/packed_layer.hpp"

namespace {

using iqmpc::Isa;
using iqmpc::LinearView;
using iqmpc::Precision;
using iqmpc::detail::Index;
using iqmpc::detail::KernelTable;
using iqmpc::detail::LayerPacker;
using iqmpc::detail::PackedLayer;
using Floats = std::vector<float>;

struct Layer {
  Index out, in;
  Floats weight, bias, gamma, beta;

  // y [rows, out] of x [rows, in], with y on the way as it is in the planner.
  void forward(Isa isa, const float* x, Index rows, float* y) const {
    const KernelTable& kernels = iqmpc::detail::kernel_table(isa, Precision::float32);
    LinearView view;
    view.weight = weight.data();
    view.bias = bias.data();
    view.gamma = gamma.data();
    view.beta = beta.data();
    view.out = out;
    view.in = in;
    PackedLayer packed;
    LayerPacker().pack(kernels, view, nullptr, packed);
    kernels.linear(x, in, rows, packed.panels.data(), packed.bias.data(), 0, in, out, y, out);
    kernels.norm_mish(y, out, rows, packed.gamma.data(), packed.beta.data(), out, out, y, out);
  }
};

Floats normal(std::mt19937& random, Index size, float mean, float deviation) {
  std::normal_distribution<float> draw(mean, deviation);
  Floats values(static_cast<std::size_t>(size));
  for (float& value : values) value = draw(random);
  return values;
}

Layer make_layer(std::mt19937& random, Index out, Index in) {
  const float deviation = 1.0f / std::sqrt(static_cast<float>(in));
  return {out,
          in,
          normal(random, out * in, 0, deviation),
          normal(random, out, 0, 1),
          normal(random, out, 1, 0.3f),
          normal(random, out, 0, 0.3f)};
}

double mish(double v) { return v * std::tanh(v > 40 ? v : std::log1p(std::exp(v))); }

// One row of the definition, in double precision.
std::vector<double> reference(const Layer& layer, const float* x) {
  std::vector<double> y(static_cast<std::size_t>(layer.out));
  for (Index o = 0; o < layer.out; ++o) {
    y[o] = layer.bias[o];
    const float* weight = layer.weight.data() + o * layer.in;
    for (Index i = 0; i < layer.in; ++i) y[o] += double(weight[i]) * x[i];
  }
  double mean = 0, variance = 0;
  for (const double value : y) mean += value / double(layer.out);
  for (const double value : y) variance += (value - mean) * (value - mean) / double(layer.out);
  for (Index o = 0; o < layer.out; ++o) {
    y[o] = mish((y[o] - mean) / std::sqrt(variance + 1e-5) * layer.gamma[o] + layer.beta[o]);
  }
  return y;
}

// Outputs start at 7: with fewer, a small variance may amplify rounding beyond a fixed tolerance.
void matches_reference(Isa isa) {
  std::mt19937 random(1);
  for (const Index rows : {0, 1, 6, 7, 14, 15, 101}) {
    for (const Index in : {1, 3, 67}) {
      for (const Index out : {7, 8, 31, 32, 33, 70}) {
        const Layer layer = make_layer(random, out, in);
        const Floats x = normal(random, rows * in, 0, 1);
        // A guard behind the output shows any write past the last row.
        Floats y(static_cast<std::size_t>(rows * out + 64), 42.0f);
        layer.forward(isa, x.data(), rows, y.data());
        for (Index r = 0; r < rows; ++r) {
          const auto expected = reference(layer, x.data() + r * in);
          for (Index o = 0; o < out; ++o) {
            const double error = std::abs(y[r * out + o] - expected[o]);
            CHECK(error <= 1e-4 * std::max(1.0, std::abs(expected[o])));
          }
        }
        CHECK(std::all_of(y.begin() + rows * out, y.end(), [](float v) { return v == 42.0f; }));
      }
    }
  }
}

// Rows do not depend on each other, whatever is in them, and not on how many there are.
void what_is_not_finite_stays_in_its_row(Isa isa) {
  std::mt19937 random(2);
  const Layer layer = make_layer(random, 37, 19);
  Floats x = normal(random, 20 * 19, 0, 1), clean(20 * 37), y(20 * 37);
  layer.forward(isa, x.data(), 20, clean.data());
  for (Index r = 0; r < 20; ++r) layer.forward(isa, x.data() + r * 19, 1, y.data() + r * 37);
  CHECK(y == clean);
  const float inf = std::numeric_limits<float>::infinity();
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), inf, -inf}) {
    x[5 * 19 + 3] = bad;
    layer.forward(isa, x.data(), 20, y.data());
    for (Index i = 0; i < 20 * 37; ++i) {
      CHECK(i / 37 == 5 ? std::isnan(y[i]) : y[i] == clean[i]);
    }
  }
  // A variance beyond float32 is NaN, and not zeros.
  for (Index i = 0; i < 19; ++i) x[5 * 19 + i] = 1e25f * float(i + 1);
  layer.forward(isa, x.data(), 20, y.data());
  for (Index o = 0; o < 37; ++o) CHECK(std::isnan(y[5 * 37 + o]));
}

// Where gamma is 0 the layer is mish(beta): from end to end of float32.
void mish_alone(Isa isa) {
  Floats points;
  for (int i = -4000; i <= 4000; ++i) points.push_back(float(i) / 40);
  for (const float x : {-3e38f, 3e38f, -87.0f, 20.0f, 1e4f, -1e4f, 1e30f}) points.push_back(x);
  const Index count = static_cast<Index>(points.size());
  const Floats zeros(points.size(), 0.0f);
  const Layer layer{count, 1, Floats(points.size(), 1.0f), zeros, zeros, points};
  const float one = 1;
  Floats y(points.size());
  layer.forward(isa, &one, 1, y.data());
  for (Index o = 0; o < count; ++o) {
    const double expected = mish(points[o]);
    CHECK(std::abs(y[o] - expected) <= 1e-6 * std::abs(expected) + 1e-35);
  }
}

}  // namespace

int main() {
  for (const Isa isa : iqmpc::isa_levels()) {
    matches_reference(isa);
    what_is_not_finite_stays_in_its_row(isa);
    mish_alone(isa);
  }
  return 0;
}
