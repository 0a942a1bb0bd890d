#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "cpu/rollout.hpp"
#include "iqmpc/rollout.hpp"

namespace iqmpc {

namespace {

using detail::Index;

// log π(ã|z_0) of the squashed Gaussian, summed over its dimensions; noise [A].
double log_prob(const detail::PackedModel& model, const detail::Root& root, const float* noise) {
  constexpr double kLogTwo = 0.6931471805599453, kHalfLogTwoPi = 0.9189385332046727;
  double total = 0;
  for (Index i = 0; i < model.action_dim; ++i) {
    const double mean = root.head.data()[i], s = root.head.data()[model.action_pad + i];
    const double low = model.log_std_min, high = model.log_std_max;
    const double log_std = low + 0.5 * (high - low) * (std::tanh(s) + 1);
    const double u = mean + std::exp(log_std) * noise[i];
    // log(1 - tanh(u)²), in a form that does not cancel for large |u|
    const double softplus = std::max(-2 * u, 0.0) + std::log1p(std::exp(-std::abs(2 * u)));
    total += -0.5 * noise[i] * noise[i] - log_std - kHalfLogTwoPi - 2 * (kLogTwo - u - softplus);
  }
  return total;
}

}  // namespace

void rollout(const WorldModel& world, ThreadPool& pool, const RolloutView& view) {
  const detail::PackedModel& model = world.packed();
  if (view.horizon < 1) {
    throw std::invalid_argument("the horizon must be at least 1, got " +
                                std::to_string(view.horizon));
  }
  for (const Index k : view.critic_pair) {
    if (k >= 0 && k < world.num_critics()) continue;
    throw std::invalid_argument("critic_pair must lie in [0, " +
                                std::to_string(world.num_critics()) + "), got " +
                                std::to_string(k));
  }
  const Index a = model.action_dim, pad = model.action_pad, horizon = view.horizon;
  const bool unrolled = view.score == Score::unrolled;
  const Index noise_steps = unrolled ? horizon + 1 : horizon - 1;
  const Index offset = unrolled ? 1 : 0;  // of ã_1's draws

  std::vector<detail::Workspace> workspaces;
  for (int t = 0; t < pool.threads(); ++t) workspaces.emplace_back(model, horizon);
  std::vector<detail::Root> roots;
  for (Index e = 0; e < view.problems; ++e) roots.emplace_back(model);
  pool.run(view.problems, [&](Index e, int thread) {
    float* z = roots[e].z.data();
    const float* natural = view.z0 + e * model.latent_dim;
    AlignedBuffer<float> excess(static_cast<std::size_t>(model.simnorm.groups));
    for (Index i = 0; i < model.latent_dim; ++i) z[model.simnorm.feature(i)] = natural[i];
    for (Index g = 0; g < model.simnorm.count; ++g) {
      double sum = -1;
      for (Index v = 0; v < model.simnorm.dim; ++v) sum += natural[g * model.simnorm.dim + v];
      excess.data()[g] = static_cast<float>(sum);
    }
    grow(model, view.critic_pair, excess.data(), workspaces[thread], roots[e]);
  });

  const detail::Blocks blocks(view.problems, view.samples, pool.threads());
  pool.run(blocks.total(), [&](Index block, int thread) {
    const Index e = blocks.problem(block), first = blocks.first(block), rows = blocks.rows(block);
    detail::Workspace& w = workspaces[thread];
    const auto copy = [&](const float* from, Index t, Index steps, float* to) {
      for (Index r = 0; r < rows; ++r) {
        std::copy_n(from + ((e * steps + t) * view.samples + first + r) * a, a, to + r * pad);
      }
    };
    for (Index t = 0; t < horizon; ++t) {
      copy(view.actions, t, horizon, w.actions.data() + t * rows * pad);
      if (t > 0) {
        copy(view.score_noise, t - 1 + offset, noise_steps,
             w.score_noise.data() + (t - 1) * rows * pad);
      }
    }
    float* returns = view.returns + e * view.samples + first;
    score(model, view.critic_pair, roots[e],
          {horizon, rows, w.actions.data(), rows * pad, w.score_noise.data(), nullptr,
           view.discount, returns},
          w);
    if (!unrolled) return;
    const float* noise = view.score_noise + e * noise_steps * view.samples * a;
    const auto constant = static_cast<float>(view.entropy_coef * log_prob(model, roots[e], noise));
    for (Index r = 0; r < rows; ++r) returns[r] -= constant;
  });
}

}  // namespace iqmpc
