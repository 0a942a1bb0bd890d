// The bodies of the CUDA kernels on an emulated block: the packed layout against the weights, the
// element-wise functions and products against plain formulas, whole rollouts against the CPU's.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.hpp"
#include "cuda/packed_model.hpp"
#include "cuda/rollout_tile.hpp"
#include "emulated_block.hpp"
#include "iqmpc/rollout.hpp"
#include "models.hpp"

namespace {

using namespace iqmpc::gpu;
using iqmpc::Precision;
using iqmpc::Score;
using iqmpc::smaller;
using Floats = std::vector<float>;

constexpr Precision kPrecisions[] = {Precision::float32, Precision::bf16};

bool close(double got, double expected, double tolerance) {
  return std::abs(got - expected) <= tolerance * std::max(1.0, std::abs(expected));
}

void functions_are_the_formulas() {
  for (double x = -120; x <= 120; x += 0.37) {
    const auto f = static_cast<float>(x);
    const double softplus = std::max(x, 0.0) + std::log1p(std::exp(-std::abs(x)));
    CHECK(close(mish<float>(f), f * std::tanh(softplus), 1e-6));
    CHECK(close(log_deviation(f, -10, 2), -10 + 6 * (std::tanh(double(f)) + 1), 1e-6));
    const double u = 0.3 + std::exp(-0.7) * double(f);
    const double squash =
        2 * (std::log(2.0) - u - std::max(-2 * u, 0.0) - std::log1p(std::exp(-std::abs(2 * u))));
    const double density = -0.5 * double(f) * double(f) + 0.7 - 0.5 * std::log(2 * M_PI) - squash;
    CHECK(close(before_squashing(0.3f, -0.7f, f), u, 1e-6));
    CHECK(close(log_density(0.3f, -0.7f, f), density, 1e-6));
  }
  CHECK(mish<float>(1e30f) == 1e30f);
  CHECK(mish<float>(-1e30f) == 0);
  CHECK(close(norm_scale(4 - 1e-5f), 0.5, 1e-7));
  CHECK(smaller(1, 2) == 1 && smaller(2, 1) == 1);
  const float nan = std::nanf(""), inf = std::numeric_limits<float>::infinity();
  CHECK(std::isnan(mish<float>(nan)) && std::isnan(mish<Bf16>(nan)));
  CHECK(std::isnan(norm_scale(nan)) && std::isnan(norm_scale(inf)));
  CHECK(std::isnan(smaller(nan, 1)) && std::isnan(smaller(1, nan)));
  CHECK(std::isnan(log_deviation(nan, -10, 2)) && std::isnan(before_squashing(0, nan, 1)));
}

void bf16_rounds_to_nearest_even() {
  for (const float x : {0.0f, -0.0f, 1.0f, -2.5f, 3e38f, 1e-40f, 1.00390625f, 1.01171875f}) {
    const float rounded = from_bf16(to_bf16(x));
    CHECK(std::abs(rounded - x) <= std::abs(x) / 256 + 1e-40);
  }
  CHECK(from_bf16(to_bf16(1.00390625f)) == 1.0f);       // halfway between 1 and 1.0078125
  CHECK(from_bf16(to_bf16(1.01171875f)) == 1.015625f);  // halfway, the lower one is odd
  CHECK(std::isnan(from_bf16(to_bf16(std::nanf("")))));
  CHECK(std::isinf(from_bf16(to_bf16(std::numeric_limits<float>::max()))));
}

// Each element of each matrix of an mma lies in exactly one place: that of the PTX manual, whose
// formulas these are. The emulated product would not notice a wrong one.
void fragments_lie_as_in_the_manual() {
  for (int lane = 0; lane < kLanes; ++lane) {
    const int group = lane >> 2, in_group = lane % 4;
    for (int i = 0; i < 8; ++i) {  // a_i, two in a register
      const Place place = a_place(lane, i / 2);
      CHECK(place.row == (i < 2 || (4 <= i && i < 6) ? group : group + 8));
      CHECK(place.column + i % 2 == in_group * 2 + (i & 1) + (i < 4 ? 0 : 8));
    }
    for (int i = 0; i < 4; ++i) {
      const Place b = b_place(lane, i / 2), c = c_place(lane, i);
      CHECK(b.row + i % 2 == in_group * 2 + (i & 1) + (i < 2 ? 0 : 8) && b.column == group);
      CHECK(c.row == (i < 2 ? group : group + 8) && c.column == in_group * 2 + (i & 1));
    }
  }
  int a[16][16] = {}, b[16][8] = {}, c[16][8] = {}, w[16][16] = {};
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int i = 0; i < 4; ++i) {
      for (int half = 0; half < 2; ++half) {
        ++a[a_place(lane, i).row][a_place(lane, i).column + half];
        ++w[weight_place(lane, i).row + half][weight_place(lane, i).column];
        if (i < 2) ++b[b_place(lane, i).row + half][b_place(lane, i).column];
      }
      ++c[c_place(lane, i).row][c_place(lane, i).column];
    }
  }
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 16; ++j) CHECK(a[i][j] == 1 && w[i][j] == 1);
    for (int j = 0; j < 8; ++j) CHECK(b[i][j] == 1 && c[i][j] == 1);
  }
}

const LayerData& layer_data(const PackedModel& packed, int index) {
  return reinterpret_cast<const LayerData*>(packed.bytes.data() + packed.model.layers)[index];
}

const float* floats(const PackedModel& packed, std::int64_t offset) {
  return reinterpret_cast<const float*>(packed.bytes.data() + offset);
}

// The weight that a layer multiplies a padded input with, read as the kernels read it.
float packed_weight(const PackedModel& packed, const LayerData& layer, int output, int input) {
  if (packed.precision == Precision::float32) {
    return floats(packed, layer.weights)[input * layer.padded + output];
  }
  const auto* fragments = reinterpret_cast<const Fragment*>(packed.bytes.data() + layer.weights);
  const int tile = output / 16 * (layer.inputs / 16) + input / 16;
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int reg = 0; reg < 4; ++reg) {
      const Place place = weight_place(lane, reg);
      if (place.column != output % 16 || (place.row | 1) != (input % 16 | 1)) continue;
      const std::uint32_t bits = fragments[tile * kLanes + lane].x[reg];
      return from_bf16({static_cast<std::uint16_t>(bits >> 16 * (input % 2))});
    }
  }
  return std::nanf("");
}

void check_layer(const PackedModel& packed, const LayerData& layer, const iqmpc::LinearView& view,
                 std::ptrdiff_t latents, bool neuron) {
  CHECK(layer.outputs == view.out && layer.padded % 16 == 0 && layer.padded - view.out < 16);
  CHECK(layer.latents % 16 == 0 && layer.latents >= latents && layer.latents - latents < 16);
  CHECK(layer.inputs % 16 == 0 && layer.weights % 256 == 0 && layer.bias % 256 == 0);
  for (int i = 0; i < layer.inputs; ++i) {
    const std::ptrdiff_t natural = i < layer.latents ? i : i - layer.latents + latents;
    const bool there = natural < (i < layer.latents ? latents : view.in);
    for (int o = 0; o < layer.padded; ++o) {
      float expected = there && o < view.out ? view.weight[o * view.in + natural] : 0.0f;
      if (neuron) {
        if (o == 0) CHECK(floats(packed, layer.weights)[i] == expected);
        continue;
      }
      if (packed.precision == Precision::bf16) expected = from_bf16(to_bf16(expected));
      CHECK(packed_weight(packed, layer, o, i) == expected);
    }
  }
  CHECK((layer.gamma != 0) == (view.gamma != nullptr));
  for (int o = 0; o < layer.padded; ++o) {
    const bool there = o < view.out;
    CHECK(floats(packed, layer.bias)[o] == (there ? view.bias[o] : 0.0f));
    if (!view.gamma) continue;
    CHECK(floats(packed, layer.gamma)[o] == (there ? view.gamma[o] : 0.0f));
    CHECK(floats(packed, layer.beta)[o] == (there ? view.beta[o] : 0.0f));
  }
}

void packing_keeps_every_weight(const Sizes& sizes) {
  const RandomModel model(sizes);
  for (const Precision precision : kPrecisions) {
    const PackedModel packed = pack(model.view, precision);
    CHECK(packed.model.latent_dim == sizes.latent && packed.model.action_dim == sizes.action);
    const auto check_stack = [&](StackData data, const std::vector<iqmpc::LinearView>& views,
                                 bool critic) {
      CHECK(data.count == static_cast<int>(views.size()));
      for (int i = 0; i < data.count; ++i) {
        const auto& view = views[static_cast<std::size_t>(i)];
        check_layer(packed, layer_data(packed, data.first + i), view, i ? view.in : sizes.latent,
                    critic && i + 1 == data.count);
        CHECK(layer_data(packed, data.first + i).padded <= packed.model.widest);
      }
    };
    check_stack(packed.model.dynamics, model.view.dynamics, false);
    check_stack(packed.model.policy, model.view.policy, false);
    const auto* critics =
        reinterpret_cast<const StackData*>(packed.bytes.data() + packed.model.critics);
    for (std::size_t k = 0; k < model.view.critics.size(); ++k) {
      check_stack(critics[k], model.view.critics[k], true);
    }
  }
}

struct Problem {
  std::ptrdiff_t envs, horizon, samples;
  Sizes sizes;
};

struct Draws {
  Draws(const Problem& p, Score score, bool softmax = true) {
    const std::ptrdiff_t steps = p.horizon + (score == Score::unrolled ? 1 : -1);
    const std::ptrdiff_t rows = p.envs * p.samples * p.sizes.action;
    z0 = normal_floats(p.envs * p.sizes.latent, 1);
    const auto dim = static_cast<std::size_t>(p.sizes.simnorm);
    for (std::size_t g = 0; softmax && g < z0.size(); g += dim) {
      float sum = 0;
      for (std::size_t v = g; v < g + dim; ++v) sum += z0[v] = std::exp(z0[v]);
      for (std::size_t v = g; v < g + dim; ++v) z0[v] /= sum;
    }
    actions = normal_floats(p.horizon * rows, 2);
    for (float& a : actions) a = std::clamp(a, -1.0f, 1.0f);
    noise = normal_floats(steps * rows, 3);
  }

  Floats z0, actions, noise;
};

// What the views of both libraries name alike.
template <class View>
View view_of(const Problem& p, const Draws& draws, Score score, Floats& result) {
  View view;
  view.problems = p.envs;
  view.horizon = p.horizon;
  view.samples = p.samples;
  view.z0 = draws.z0.data();
  view.actions = draws.actions.data();
  view.score_noise = draws.noise.data();
  view.score = score;
  view.entropy_coef = 0.01f;
  view.returns = result.data();
  return view;
}

// With tiles of kRows, whatever their number.
template <class Operand, int kRows>
Floats emulated(const Problem& p, const PackedModel& packed, const Draws& draws, Score score,
                bool descending = false, std::vector<std::int64_t> pair = {1, 0}) {
  Floats work(work_floats(packed.model, p.envs) + 4, std::nanf(""));
  Floats result(static_cast<std::size_t>(p.envs * p.samples), 42.0f);
  auto view = view_of<iqmpc::CudaRolloutView>(p, draws, score, result);
  view.critic_pair = pair.data();
  // As on a device, aligned to 16 bytes.
  void* start = work.data();
  std::size_t room = work.size() * sizeof(float);
  view.work = std::align(16, room - 12, start, room);
  const RolloutArgs args = rollout_args(packed.model, view);
  const std::size_t bytes = shared_bytes(packed.model, packed.precision, kRows);
  for (std::int64_t i = 0; i < root_tiles<kRows>(args); ++i) {
    root_tile<Operand, kRows>(EmulatedBlock(bytes, descending), packed.bytes.data(), packed.model,
                              args, i);
  }
  for (std::int64_t i = 0; i < rollout_tiles<kRows>(args); ++i) {
    rollout_tile<Operand, kRows>(EmulatedBlock(bytes, descending), packed.bytes.data(),
                                 packed.model, args, i);
  }
  return result;
}

Floats on_the_cpu(const Problem& p, const RandomModel& model, const Draws& draws, Score score,
                  iqmpc::ThreadPool& pool) {
  Floats result(static_cast<std::size_t>(p.envs * p.samples));
  auto view = view_of<iqmpc::RolloutView>(p, draws, score, result);
  view.critic_pair[0] = 1;
  view.critic_pair[1] = 0;
  iqmpc::rollout(*model.pack(), pool, view);
  return result;
}

// Root mean square of the difference over that of `expected`.
double error(const Floats& got, const Floats& expected) {
  double difference = 0, scale = 0;
  for (std::size_t i = 0; i < got.size(); ++i) {
    difference += std::pow(double(got[i]) - double(expected[i]), 2);
    scale += std::pow(double(expected[i]), 2);
  }
  return std::sqrt(difference / std::max(scale, double(got.size())));
}

void same(const Floats& a, const Floats& b) {
  CHECK(a.size() == b.size());
  for (std::size_t i = 0; i < a.size(); ++i) CHECK(a[i] == b[i]);
}

void rollouts_are_the_cpus(const Problem& p, iqmpc::ThreadPool& pool, bool softmax = true) {
  const RandomModel model(p.sizes);
  for (const Score score : {Score::advantage, Score::unrolled}) {
    const Draws draws(p, score, softmax);
    const Floats expected = on_the_cpu(p, model, draws, score, pool);
    const PackedModel exact = pack(model.view, Precision::float32);
    const PackedModel rounded = pack(model.view, Precision::bf16);
    const Floats float32 = emulated<float, 16>(p, exact, draws, score);
    const Floats bf16 = emulated<Bf16, 16>(p, rounded, draws, score);
    std::printf("E %td H %td S %td A %td Z %td hidden %td %s: float32 %.1e, bf16 %.1e\n", p.envs,
                p.horizon, p.samples, p.sizes.action, p.sizes.latent, p.sizes.hidden,
                score == Score::unrolled ? "unrolled" : "advantage", error(float32, expected),
                error(bf16, expected));
    CHECK(error(float32, expected) < 1e-5);
    CHECK(error(bf16, expected) < 2e-2);
    // Neither the order of the threads nor the rows of a tile change a bit.
    same(emulated<float, 16>(p, exact, draws, score, true), float32);
    same(emulated<Bf16, 16>(p, rounded, draws, score, true), bf16);
    same(emulated<float, 8>(p, exact, draws, score), float32);
    same(emulated<Bf16, 32>(p, rounded, draws, score), bf16);
  }
}

// A rollout over stacks of other depths: one hidden layer, or three.
void other_depths_are_the_cpus(iqmpc::ThreadPool& pool) {
  Problem p{2, 3, 21, {5, 3, 24, 24, 9, 3, 8}};
  for (const bool deep : {false, true}) {
    RandomModel model(p.sizes);
    auto& v = model.view;
    const auto change = [&](std::vector<iqmpc::LinearView>& stack) {
      // 24 hidden features, as many as latents: a hidden layer fits everywhere behind the first.
      if (deep) {
        stack.insert(stack.begin() + 1, stack[1]);
      } else {
        stack.erase(stack.begin() + 1);
      }
    };
    change(v.dynamics);
    change(v.policy);
    change(v.critics[1]);  // of the pair, one
    const Draws draws(p, Score::unrolled);
    const Floats expected = on_the_cpu(p, model, draws, Score::unrolled, pool);
    CHECK(error(emulated<float, 8>(p, pack(v, Precision::float32), draws, Score::unrolled),
                expected) < 1e-5);
    CHECK(error(emulated<Bf16, 16>(p, pack(v, Precision::bf16), draws, Score::unrolled), expected) <
          2e-2);
  }
}

template <class Operand, int kRows>
void what_is_not_finite_is_marked(Precision precision) {
  const Problem p{2, 3, 21, {}};
  const RandomModel model(p.sizes);
  const PackedModel packed = pack(model.view, precision);
  const Draws draws(p, Score::advantage);
  const Floats clean = emulated<Operand, kRows>(p, packed, draws, Score::advantage);
  for (const float bad : {std::nanf(""), std::numeric_limits<float>::infinity()}) {
    // Step 1, sample 4 of problem 1
    Draws spoilt = draws;
    const std::ptrdiff_t a = p.sizes.action;
    spoilt.actions[static_cast<std::size_t>(((3 + 1) * p.samples + 4) * a + 2)] = bad;
    const Floats got = emulated<Operand, kRows>(p, packed, spoilt, Score::advantage);
    for (std::size_t i = 0; i < got.size(); ++i) {
      CHECK(i == 25 ? std::isnan(got[i]) : got[i] == clean[i]);
    }
  }
  // A critic that does not exist
  for (const std::vector<std::int64_t>& pair : {std::vector<std::int64_t>{0, 3}, {-1, 0}}) {
    for (const float x :
         emulated<Operand, kRows>(p, packed, draws, Score::advantage, false, pair)) {
      CHECK(std::isnan(x));
    }
  }
  RandomModel broken(p.sizes);
  broken.fill(std::nanf(""));
  for (const float x :
       emulated<Operand, kRows>(p, pack(broken.view, precision), draws, Score::advantage)) {
    CHECK(std::isnan(x));
  }
}

// The same words as the CPU's model, of every view that it refuses.
void refuses_what_the_cpu_refuses() {
  using View = iqmpc::WorldModelView;
  const auto check = [](auto change) {
    RandomModel model({});
    change(model.view);
    const std::string expected = message_of<std::invalid_argument>(
        [&] { iqmpc::WorldModel(model.view, Precision::float32, iqmpc::Isa::portable); });
    CHECK(message_of<std::invalid_argument>([&] { pack(model.view, Precision::bf16); }) ==
          expected);
  };
  Sizes sizes;
  sizes.termination = true;
  const RandomModel with_head(sizes);
  CHECK(message_of<std::invalid_argument>([&] { pack(with_head.view, Precision::bf16); }) ==
        "termination: the CUDA kernels take no model with such a head");
  check([](View& v) {
    v.encoder.clear();
    v.dynamics.clear();
  });
  check([](View& v) { v.encoder.pop_back(); });
  check([](View& v) { v.encoder[0].gamma = nullptr; });
  check([](View& v) { v.dynamics.resize(1); });
  check([](View& v) { v.dynamics[1].in = 3; });
  check([](View& v) { v.dynamics[1].out = 0; });
  check([](View& v) { v.dynamics[2].bias = nullptr; });
  check([](View& v) { v.policy[2].out = 5; });
  check([](View& v) { v.policy[2].gamma = v.policy[1].gamma; });
  check([](View& v) { v.policy.pop_back(); });
  check([](View& v) { v.critics.resize(1); });
  check([](View& v) { v.critics[1][2].out = 2; });
  check([](View& v) { v.critics[2][0].in += 1; });
  check([](View& v) { v.simnorm_dim = 5; });
  check([](View& v) { v.simnorm_dim = 0; });
}

void refuses_arguments() {
  const ModelData model = pack(RandomModel({}).view, Precision::float32).model;
  iqmpc::CudaRolloutView view;
  const auto message = [&] {
    return message_of<std::invalid_argument>([&] { rollout_args(model, view); });
  };
  CHECK(message() == "the horizon must be at least 1, got 0");
  view.horizon = 1;
  view.samples = -1;
  CHECK(message() == "the number of samples must be at least 0, got -1");
  view.samples = 1;
  CHECK(rollout_args(model, view).problems == 0);
  view.problems = 2;
  float x = 0;
  const std::int64_t pair[2] = {0, 1};
  CHECK(message() == "z0 must not be null");
  view.z0 = &x;
  CHECK(message() == "actions must not be null");
  view.actions = &x;
  CHECK(message() == "critic_pair must not be null");
  view.critic_pair = pair;
  CHECK(message() == "returns must not be null");
  view.returns = &x;
  CHECK(message() == "work must not be null");
  view.work = &x;
  CHECK(rollout_args(model, view).noise_steps == 0);
  view.horizon = 2;
  CHECK(message() == "score_noise must not be null");
  view.score_noise = &x;
  view.problems = std::ptrdiff_t{1} << 40;
  CHECK(message() == "too many rows for one launch: 1099511627776 problems of 1 samples");
}

// The sizes of the paper on the devices that the kernels are built for, in bytes of shared memory.
void tiles_fit_the_devices() {
  constexpr std::size_t kAmpere = 163 * 1024, kHopper = 227 * 1024;
  const auto rows = [](const PackedModel& p, std::size_t limit) {
    return fitting_rows(p.model, p.precision, limit, "a GPU");
  };
  const RandomModel paper({17, 39, 512, 512, 16, 2, 8}), wide({17, 39, 512, 1024, 16, 2, 8});
  const PackedModel bf16 = pack(paper.view, Precision::bf16);
  const PackedModel float32 = pack(paper.view, Precision::float32);
  for (const PackedModel* packed : {&bf16, &float32}) {
    for (const int count : tile_rows(packed->precision)) {
      std::printf("Z 512 hidden 512 A 39 in %s: %d rows take %zu bytes\n",
                  precision_name(packed->precision), count,
                  shared_bytes(packed->model, packed->precision, count));
    }
  }
  CHECK(rows(bf16, kAmpere) == std::vector<int>({16}));
  CHECK(rows(bf16, kHopper) == std::vector<int>({32, 16}));
  CHECK(rows(float32, kAmpere) == std::vector<int>({16, 8}));
  CHECK(rows(pack(wide.view, Precision::bf16), kHopper) == std::vector<int>({16}));
  CHECK(rows(pack(wide.view, Precision::float32), kHopper) == std::vector<int>({8}));
  const RandomModel too_wide({17, 39, 512, 4096, 16, 2, 8});
  const PackedModel packed = pack(too_wide.view, Precision::bf16);
  CHECK(message_of<std::invalid_argument>([&] { rows(packed, kHopper); }) ==
        "the model is too wide for a GPU in bf16: 16 rows of it take " +
            std::to_string(shared_bytes(packed.model, Precision::bf16, 16)) +
            " bytes of shared memory, the device has 232448");

  CHECK(choose_rows({32, 16}, 1, 512, 16) == 32);
  CHECK(choose_rows({32, 16}, 1, 512, 132) == 16);
  CHECK(choose_rows({32, 16}, 8, 530, 132) == 32);
  CHECK(choose_rows({8}, 1, 1, 132) == 8);
}

}  // namespace

int main() {
  functions_are_the_formulas();
  bf16_rounds_to_nearest_even();
  fragments_lie_as_in_the_manual();
  packing_keeps_every_weight({5, 1, 8, 24, 3, 2, 8});
  packing_keeps_every_weight({5, 3, 24, 37, 9, 3, 8});
  packing_keeps_every_weight({7, 17, 136, 100, 33, 2, 8});
  iqmpc::ThreadPool pool(1);
  rollouts_are_the_cpus({1, 1, 1, {5, 1, 8, 24, 3, 2, 8}}, pool);
  rollouts_are_the_cpus({3, 3, 67, {5, 3, 24, 37, 9, 3, 8}}, pool);
  rollouts_are_the_cpus({2, 4, 29, {7, 17, 136, 100, 33, 2, 8}}, pool);
  rollouts_are_the_cpus({1, 2, 35, {7, 16, 30, 65, 33, 2, 2}}, pool);
  rollouts_are_the_cpus({17, 2, 2, {7, 2, 16, 16, 33, 2, 8}}, pool);
  // A warp takes up to four tiles of 16 outputs at a time, and in wide layers several turns.
  rollouts_are_the_cpus({1, 2, 9, {5, 2, 16, 300, 9, 2, 8}}, pool);
  rollouts_are_the_cpus({1, 2, 9, {5, 2, 16, 600, 9, 2, 8}}, pool);
  rollouts_are_the_cpus({2, 3, 9, {5, 3, 24, 37, 9, 3, 8}}, pool, false);
  other_depths_are_the_cpus(pool);
  what_is_not_finite_is_marked<float, 8>(Precision::float32);
  what_is_not_finite_is_marked<Bf16, 16>(Precision::bf16);
  refuses_what_the_cpu_refuses();
  refuses_arguments();
  tiles_fit_the_devices();
  return 0;
}
