// The rollout at every level, in both precisions and at odd sizes; tests/kernels holds it to the
// reference in float64, this one runs under the sanitizers.
#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <vector>

#include "check.hpp"
#include "iqmpc/rollout.hpp"
#include "models.hpp"

namespace {

using iqmpc::Isa;
using iqmpc::Precision;
using Floats = std::vector<float>;

struct Problem {
  std::ptrdiff_t envs, horizon, samples;
  Sizes sizes;
};

Floats returns(const Problem& p, const RandomModel& model, iqmpc::ThreadPool& pool,
               Precision precision, Isa isa, iqmpc::Score score) {
  const std::ptrdiff_t steps = p.horizon + (score == iqmpc::Score::unrolled ? 1 : -1);
  const std::ptrdiff_t rows = p.envs * p.samples * p.sizes.action;
  const Floats z0 = normal_floats(p.envs * p.sizes.latent, 1);
  Floats actions = normal_floats(p.horizon * rows, 2);
  for (float& a : actions) a = std::clamp(a, -1.0f, 1.0f);
  const Floats noise = normal_floats(steps * rows, 3);
  Floats result(static_cast<std::size_t>(p.envs * p.samples) + 16, 42.0f);
  iqmpc::RolloutView view;
  view.problems = p.envs;
  view.horizon = p.horizon;
  view.samples = p.samples;
  view.z0 = z0.data();
  view.actions = actions.data();
  view.score_noise = noise.data();
  view.critic_pair[0] = 1;
  view.critic_pair[1] = 0;
  view.score = score;
  view.entropy_coef = 0.01f;
  view.returns = result.data();
  iqmpc::rollout(*model.pack(precision, isa), pool, view);
  CHECK(std::all_of(result.end() - 16, result.end(), [](float x) { return x == 42.0f; }));
  result.resize(result.size() - 16);
  return result;
}

void levels_agree(const Problem& p, iqmpc::ThreadPool& pool) {
  const RandomModel model(p.sizes);
  for (const iqmpc::Score score : {iqmpc::Score::advantage, iqmpc::Score::unrolled}) {
    const Floats exact = returns(p, model, pool, Precision::float32, Isa::portable, score);
    for (const Isa isa : iqmpc::isa_levels()) {
      for (const Precision precision : {Precision::float32, Precision::bf16}) {
        const Floats got = returns(p, model, pool, precision, isa, score);
        const double tolerance = precision == Precision::bf16 ? 0.1 : 1e-4;
        double error = 0;
        for (std::size_t i = 0; i < got.size(); ++i) {
          CHECK(std::isfinite(got[i]));
          error += std::pow(got[i] - exact[i], 2) / double(got.size());
        }
        CHECK(std::sqrt(error) < tolerance);
      }
    }
  }
}

// Where all imagined latents are terminal the first Q is left, which is the whole of a horizon of
// 1; where none is, the head changes nothing.
void ends_leave_no_future(iqmpc::ThreadPool& pool) {
  const Sizes sizes{5, 3, 24, 37, 9, 3, 8};
  Sizes with_head = sizes;
  with_head.termination = true;
  // The samples of one problem are the first actions of either horizon.
  const Problem longer{1, 4, 67, with_head}, first{1, 1, 67, sizes}, plain{1, 4, 67, sizes};
  for (const Isa isa : iqmpc::isa_levels()) {
    for (const Precision precision : {Precision::float32, Precision::bf16}) {
      for (const iqmpc::Score score : {iqmpc::Score::advantage, iqmpc::Score::unrolled}) {
        RandomModel model(with_head);
        const RandomModel same(sizes);  // the head is drawn last
        model.end_by(-1e4f);
        CHECK(returns(longer, model, pool, precision, isa, score) ==
              returns(plain, same, pool, precision, isa, score));
        model.end_by(1e4f);
        CHECK(returns(longer, model, pool, precision, isa, score) ==
              returns(first, same, pool, precision, isa, score));
      }
    }
  }
  RandomModel wrong(with_head);
  wrong.view.termination.front().in = 27;
  CHECK(message_of<std::invalid_argument>([&] { wrong.pack(); }) ==
        "termination layer 0: expected 24 inputs, got 27");
}

void refuses_what_does_not_fit(iqmpc::ThreadPool& pool) {
  const RandomModel model({});
  const auto packed = model.pack();
  iqmpc::RolloutView view;
  CHECK(message_of<std::invalid_argument>([&] { iqmpc::rollout(*packed, pool, view); }) ==
        "the horizon must be at least 1, got 0");
  view.horizon = 1;
  view.critic_pair[1] = 3;
  CHECK(message_of<std::invalid_argument>([&] { iqmpc::rollout(*packed, pool, view); }) ==
        "critic_pair must lie in [0, 3), got 3");
}

}  // namespace

int main() {
  iqmpc::ThreadPool pool(3);
  levels_agree({1, 1, 1, {5, 1, 8, 24, 3, 2, 8}}, pool);
  levels_agree({3, 3, 67, {5, 3, 24, 37, 9, 3, 8}}, pool);
  levels_agree({2, 4, 29, {7, 17, 136, 100, 33, 2, 8}}, pool);
  levels_agree({1, 2, 130, {7, 16, 30, 65, 33, 2, 2}}, pool);
  levels_agree({2, 3, 40, {5, 3, 24, 37, 9, 3, 8, true}}, pool);
  ends_leave_no_future(pool);
  refuses_what_does_not_fit(pool);
  return 0;
}
