#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "check.hpp"
#include "iqmpc/normed_linear.hpp"

namespace {

using iqmpc::Isa;
using iqmpc::NormedLinear;
using Floats = std::vector<float>;

struct Layer {
  std::ptrdiff_t out, in;
  Floats weight, bias, gamma, beta;

  NormedLinear pack(Isa isa) const {
    return NormedLinear(weight.data(), bias.data(), gamma.data(), beta.data(), out, in, isa);
  }
};

Floats normal(std::mt19937& random, std::ptrdiff_t size, float mean, float deviation) {
  std::normal_distribution<float> draw(mean, deviation);
  Floats values(static_cast<std::size_t>(size));
  for (float& value : values) value = draw(random);
  return values;
}

Layer make_layer(std::mt19937& random, std::ptrdiff_t out, std::ptrdiff_t in) {
  const float deviation = 1.0f / std::sqrt(static_cast<float>(in));
  return {out,
          in,
          normal(random, out * in, 0, deviation),
          normal(random, out, 0, 1),
          normal(random, out, 1, 0.3f),
          normal(random, out, 0, 0.3f)};
}

// One row of the definition, in double precision.
std::vector<double> reference(const Layer& layer, const float* x) {
  std::vector<double> y(static_cast<std::size_t>(layer.out));
  for (std::ptrdiff_t o = 0; o < layer.out; ++o) {
    y[o] = layer.bias[o];
    const float* weight = layer.weight.data() + o * layer.in;
    for (std::ptrdiff_t i = 0; i < layer.in; ++i) y[o] += double(weight[i]) * x[i];
  }
  double mean = 0, variance = 0;
  for (const double value : y) mean += value / double(layer.out);
  for (const double value : y) variance += (value - mean) * (value - mean) / double(layer.out);
  for (std::ptrdiff_t o = 0; o < layer.out; ++o) {
    const double v = (y[o] - mean) / std::sqrt(variance + 1e-5) * layer.gamma[o] + layer.beta[o];
    y[o] = v * std::tanh(std::log1p(std::exp(v)));
  }
  return y;
}

// Sizes on both sides of every level's tile, panel and vector width. Outputs start at 7: with
// fewer, a small variance may amplify rounding beyond a fixed tolerance.
void matches_reference(Isa isa) {
  std::mt19937 random(1);
  for (const std::ptrdiff_t rows : {0, 1, 6, 7, 14, 15, 101}) {
    for (const std::ptrdiff_t in : {1, 3, 67}) {
      for (const std::ptrdiff_t out : {7, 8, 31, 32, 33, 70}) {
        const Layer layer = make_layer(random, out, in);
        const Floats x = normal(random, rows * in, 0, 1);
        // A guard behind the output shows any write past the last row.
        Floats y(static_cast<std::size_t>(rows * out + 64), 42.0f);
        layer.pack(isa).forward(x.data(), rows, y.data());
        for (std::ptrdiff_t r = 0; r < rows; ++r) {
          const auto expected = reference(layer, x.data() + r * in);
          for (std::ptrdiff_t o = 0; o < out; ++o) {
            const double error = std::abs(y[r * out + o] - expected[o]);
            CHECK(error <= 1e-4 * std::max(1.0, std::abs(expected[o])));
          }
        }
        CHECK(std::all_of(y.begin() + rows * out, y.end(), [](float v) { return v == 42.0f; }));
      }
    }
  }
}

void nan_stays_in_its_row(Isa isa) {
  std::mt19937 random(2);
  const Layer layer = make_layer(random, 37, 19);
  const NormedLinear packed = layer.pack(isa);
  Floats x = normal(random, 20 * 19, 0, 1), clean(20 * 37), y(20 * 37);
  packed.forward(x.data(), 20, clean.data());
  x[5 * 19 + 3] = std::numeric_limits<float>::quiet_NaN();
  packed.forward(x.data(), 20, y.data());
  for (std::ptrdiff_t i = 0; i < 20 * 37; ++i) {
    CHECK(i / 37 == 5 ? std::isnan(y[i]) : y[i] == clean[i]);
  }
}

// Threads that share a packed layer write what one thread writes.
void threads_share_a_layer(Isa isa) {
  std::mt19937 random(3);
  const Layer layer = make_layer(random, 64, 48);
  const NormedLinear packed = layer.pack(isa);
  constexpr std::ptrdiff_t kThreads = 4, kRows = 28;
  const Floats x = normal(random, kThreads * kRows * 48, 0, 1);
  Floats serial(kThreads * kRows * 64), parallel(serial.size());
  packed.forward(x.data(), kThreads * kRows, serial.data());
  std::vector<std::thread> threads;
  for (std::ptrdiff_t t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      packed.forward(x.data() + t * kRows * 48, kRows, parallel.data() + t * kRows * 64);
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(serial == parallel);
}

void refuses_bad_parameters() {
  std::mt19937 random(4);
  const auto message = [](const Layer& layer) {
    return message_of<std::invalid_argument>([&] { layer.pack(Isa::portable); });
  };
  Layer layer = make_layer(random, 3, 2);
  layer.weight[5] = std::numeric_limits<float>::infinity();
  CHECK(message(layer) == "weight must be finite, got inf at [2, 1]");
  layer.weight[5] = 0;
  layer.gamma[1] = -std::numeric_limits<float>::infinity();
  CHECK(message(layer) == "gamma must be finite, got -inf at [1]");
  layer.gamma[1] = 1;
  layer.in = 0;
  CHECK(message(layer) == "weight must have at least one row and one column, got [3, 0]");
}

}  // namespace

int main() {
  for (const Isa isa : iqmpc::isa_levels()) {
    matches_reference(isa);
    nan_stays_in_its_row(isa);
    threads_share_a_layer(isa);
  }
  refuses_bad_parameters();
  return 0;
}
