// Both losses of an update in double precision, row by row and without a backward pass: what
// finite differences of test_learner.cpp are taken of. As iqmpc/losses.py has them, on draws given.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <vector>

#include "iqmpc/learner.hpp"

namespace exact {

using Index = std::ptrdiff_t;
using Doubles = std::vector<double>;

struct Layer {
  Doubles weight, bias, gamma, beta;
  Index out, in;
};
using Stack = std::vector<Layer>;

struct Model {
  Stack encoder, dynamics, policy, termination;
  std::vector<Stack> critics, targets;
  Index simnorm;
  double low, high;  // of log σ
};

constexpr double kPi = 3.14159265358979323846;

inline Stack copy_of(const std::vector<iqmpc::LayerParameters>& layers) {
  const auto values = [](const iqmpc::Parameter& p, Index count) {
    return p.value == nullptr ? Doubles() : Doubles(p.value, p.value + count);
  };
  Stack stack;
  for (const iqmpc::LayerParameters& p : layers) {
    stack.push_back({values(p.weight, p.out * p.in), values(p.bias, p.out), values(p.gamma, p.out),
                     values(p.beta, p.out), p.out, p.in});
  }
  return stack;
}

inline Model copy_of(const iqmpc::LearnerView& view) {
  Model model{copy_of(view.encoder),
              copy_of(view.dynamics),
              copy_of(view.policy),
              copy_of(view.termination),
              {},
              {},
              view.simnorm_dim,
              view.log_std_min,
              view.log_std_max};
  for (const auto& critic : view.critics) model.critics.push_back(copy_of(critic));
  for (const auto& target : view.targets) model.targets.push_back(copy_of(target));
  return model;
}

// What UpdateDraws points to.
struct Draws {
  Draws(const iqmpc::Learner& learner, std::uint64_t update, Index columns, Index experts) {
    const Index h = learner.settings().horizon, n = columns, a = learner.action_dim();
    const Index k = learner.num_critics(), hidden = learner.hidden_dim();
    const bool difference = learner.settings().objective == iqmpc::Objective::v_diff;
    const auto room = [](std::vector<float>& values, Index size) {
      values.resize(static_cast<std::size_t>(size));
      return values.data();
    };
    iqmpc::UpdateDraws to;
    to.target = room(target, h * n * a);
    to.initial = room(initial, (difference ? h : 1) * n * a);
    to.keep = room(keep, k * h * n * hidden);
    to.keep_target = room(keep_target, 2 * h * n * hidden);
    to.keep_value = room(keep_value, 2 * (difference ? h * (n - experts) : experts) * hidden);
    to.keep_penalty = room(keep_penalty, k * h * experts * hidden);
    to.keep_policy = room(keep_policy, 2 * (h + 1) * n * hidden);
    to.mix = room(mix, h * experts);
    to.policy = room(policy, (h + 1) * n * a);
    learner.draws(update, columns, experts, to);
    std::copy_n(to.pair, 2, pair);
    std::copy_n(to.policy_pair, 2, policy_pair);
  }

  std::vector<float> target, initial, keep, keep_target, keep_value, keep_penalty, keep_policy, mix,
      policy;
  Index pair[2], policy_pair[2];
};

inline Doubles linear(const Layer& layer, const Doubles& x) {
  Doubles y = layer.bias;
  for (Index o = 0; o < layer.out; ++o) {
    const double* w = layer.weight.data() + o * layer.in;
    for (Index i = 0; i < layer.in; ++i) y[o] += w[i] * x[i];
  }
  return y;
}

// y becomes x̂; returns 1 / sqrt(variance + ε).
inline double normalise(Doubles& y) {
  const auto n = static_cast<double>(y.size());
  double mean = 0, variance = 0;
  for (const double v : y) mean += v / n;
  for (const double v : y) variance += (v - mean) * (v - mean) / n;
  const double scale = 1 / std::sqrt(variance + 1e-5);
  for (double& v : y) v = (v - mean) * scale;
  return scale;
}

inline double mish(double u) { return u * std::tanh(std::log1p(std::exp(u))); }
inline double mish_slope(double u) {
  const double t = std::tanh(std::log1p(std::exp(u)));
  return t + u * (1 - t * t) / (1 + std::exp(-u));
}

// What a stack's last layer reads. `mask`: dropout multipliers of the first layer, or null.
inline Doubles hidden(const Stack& stack, Doubles x, const float* mask = nullptr) {
  for (std::size_t l = 0; l + 1 < stack.size(); ++l) {
    x = linear(stack[l], x);
    if (l == 0 && mask != nullptr) {
      for (std::size_t i = 0; i < x.size(); ++i) x[i] *= mask[i];
    }
    normalise(x);
    for (std::size_t i = 0; i < x.size(); ++i) {
      x[i] = mish(stack[l].gamma[i] * x[i] + stack[l].beta[i]);
    }
  }
  return x;
}

// Of encoder and dynamics.
inline Doubles latent(const Stack& stack, const Doubles& x, Index group) {
  Doubles z = linear(stack.back(), hidden(stack, x));
  normalise(z);
  for (std::size_t i = 0; i < z.size(); ++i) {
    z[i] = std::exp(stack.back().gamma[i] * z[i] + stack.back().beta[i]);
  }
  for (auto g = z.begin(); g != z.end(); g += group) {
    double sum = 0;
    for (auto i = g; i != g + group; ++i) sum += *i;
    for (auto i = g; i != g + group; ++i) *i /= sum;
  }
  return z;
}

inline Doubles joined(const Doubles& z, const Doubles& action) {
  Doubles x = z;
  x.insert(x.end(), action.begin(), action.end());
  return x;
}

inline double neuron(const Stack& stack, const Doubles& x, const float* mask = nullptr) {
  return linear(stack.back(), hidden(stack, x, mask))[0];
}

// ‖∇_x neuron(x)‖, cut off below 1e-6.
inline double slope_norm(const Stack& stack, Doubles x, const float* mask) {
  const std::size_t layers = stack.size() - 1;
  std::vector<Doubles> normed(layers), slope(layers);
  Doubles scale(layers);
  for (std::size_t l = 0; l < layers; ++l) {
    x = linear(stack[l], x);
    if (l == 0 && mask != nullptr) {
      for (std::size_t i = 0; i < x.size(); ++i) x[i] *= mask[i];
    }
    scale[l] = normalise(x);
    normed[l] = x;
    for (std::size_t i = 0; i < x.size(); ++i) {
      const double u = stack[l].gamma[i] * x[i] + stack[l].beta[i];
      slope[l].push_back(mish_slope(u));
      x[i] = mish(u);
    }
  }
  Doubles c = stack.back().weight;
  for (std::size_t l = layers; l-- > 0;) {
    const auto n = static_cast<double>(c.size());
    double mean = 0, along = 0;
    for (std::size_t i = 0; i < c.size(); ++i) {
      c[i] *= stack[l].gamma[i] * slope[l][i];
      mean += c[i] / n;
      along += c[i] * normed[l][i] / n;
    }
    Doubles below(static_cast<std::size_t>(stack[l].in));
    for (std::size_t o = 0; o < c.size(); ++o) {
      double r = scale[l] * (c[o] - mean - normed[l][o] * along);
      if (l == 0 && mask != nullptr) r *= mask[o];
      for (std::size_t i = 0; i < below.size(); ++i) {
        below[i] += r * stack[l].weight[o * below.size() + i];
      }
    }
    c = below;
  }
  double square = 0;
  for (const double v : c) square += v * v;
  return std::sqrt(std::max(square, 1e-12));
}

struct Sample {
  Doubles action;
  double log_prob;
};

inline Sample sample(const Model& m, const Doubles& z, const float* noise, iqmpc::Entropy entropy) {
  const Doubles head = linear(m.policy.back(), hidden(m.policy, z));
  const std::size_t actions = head.size() / 2;
  Sample s{{}, 0};
  for (std::size_t i = 0; i < actions; ++i) {
    const double log_std = m.low + 0.5 * (m.high - m.low) * (std::tanh(head[actions + i]) + 1);
    const double u = head[i] + std::exp(log_std) * noise[i], a = std::tanh(u);
    s.action.push_back(a);
    s.log_prob += -0.5 * noise[i] * noise[i] - log_std - 0.5 * std::log(2 * kPi);
    s.log_prob -= entropy == iqmpc::Entropy::exact
                      ? 2 * (std::log(2.0) - std::abs(u) - std::log1p(std::exp(-2 * std::abs(u))))
                      : std::log(std::max(1 - a * a, 0.0) + 1e-6) / static_cast<double>(actions);
  }
  return s;
}

// The losses of one batch. What gradients do not pass (targets, V's actions and densities, where
// the penalty is taken) is computed once, from the model at construction, and constant afterwards.
class Losses {
 public:
  struct Parts {
    double consistency = 0, value = 0, penalty = 0, critic = 0, termination = 0, total = 0;
  };

  Losses(const Model& m, const iqmpc::LearnerSettings& settings, const iqmpc::BatchView& batch,
         const Draws& draws, Index actions)
      : s(settings),
        b(batch),
        d(draws),
        a(actions),
        h(settings.horizon),
        n(batch.columns),
        obs_dim(m.encoder[0].in),
        hidden_dim(m.critics[0][0].out) {
    const auto always = [&](const std::vector<float>& keep, Index row) {
      return s.dropout_always ? keep.data() + row * hidden_dim : nullptr;
    };
    for (Index r = 0; r < h * n; ++r) {
      encoded.push_back(encode(m, n + r));
      const Sample pi = sample(m, encoded.back(), d.target.data() + r * a, s.entropy);
      double q[2];
      for (Index i = 0; i < 2; ++i) {
        q[i] = neuron(m.targets[static_cast<std::size_t>(d.pair[i])],
                      joined(encoded.back(), pi.action), always(d.keep_target, i * h * n + r));
      }
      backup.push_back(s.discount * (1.0 - b.terminated[r]) *
                       (std::min(q[0], q[1]) - s.entropy_coef * pi.log_prob));
    }
    z = rollout(m);
    if (td()) return;
    for (Index r = 0; r < value_rows(); ++r) {
      values.push_back(sample(m, z[value_row(r)], d.initial.data() + value_row(r) * a, s.entropy));
    }
    for (Index r = 0; s.c_gp > 0 && r < h * b.experts; ++r) {
      const Index i = r / b.experts * n + r % b.experts;
      const Doubles x = joined(z[i], action(i));
      const Doubles partner = joined(z[i + b.experts], action(i + b.experts));
      const double u = d.mix[r];
      between.emplace_back();
      for (std::size_t j = 0; j < x.size(); ++j) {
        between.back().push_back(u * x[j] + (1 - u) * partner[j]);
      }
    }
  }

  Parts model(const Model& m) const {
    const std::vector<Doubles> latents = rollout(m);
    const auto all = static_cast<double>(n), members = static_cast<double>(m.critics.size());
    const double steps = static_cast<double>(h), experts = static_cast<double>(b.experts);
    Parts p;
    for (Index r = 0; r < h * n; ++r) {
      const double weight = power(r / n) / steps;
      const Doubles& next = latents[n + r];
      for (std::size_t j = 0; j < next.size(); ++j) {
        const double error = next[j] - encoded[r][j];
        p.consistency += weight * error * error / (all * static_cast<double>(next.size()));
      }
      for (std::size_t k = 0; k < m.critics.size(); ++k) {
        const float* mask = nullptr;
        if (s.dropout > 0) mask = d.keep.data() + (static_cast<Index>(k) * h * n + r) * hidden_dim;
        const double q = neuron(m.critics[k], joined(latents[r], action(r)), mask);
        const double residual = q - backup[r];
        const double error = td() ? residual - b.reward[r] : residual;
        p.critic += weight / members * error * error / (td() ? all : 4 * s.alpha * all);
        if (!td() && r % n < b.experts) p.critic -= weight / members * residual / experts;
      }
      if (!m.termination.empty()) {
        const double x = neuron(m.termination, next), end = b.terminated[r];
        p.termination += weight / all *
                         (s.termination_weight * end * std::log1p(std::exp(-x)) +
                          (1 - end) * std::log1p(std::exp(x)));
      }
    }
    for (Index r = 0; r < static_cast<Index>(values.size()); ++r) {
      const Index row = value_row(r);
      double q[2];
      for (Index i = 0; i < 2; ++i) {
        const float* mask = nullptr;
        if (s.dropout_always) mask = d.keep_value.data() + (i * value_rows() + r) * hidden_dim;
        q[i] = neuron(m.critics[static_cast<std::size_t>(d.pair[i])],
                      joined(latents[row], values[r].action), mask);
      }
      const double v = std::min(q[0], q[1]) - s.entropy_coef * values[r].log_prob;
      if (s.objective == iqmpc::Objective::v_diff) {
        const double share = (v - backup[row]) / ((all - experts) * steps);
        p.value += share;
        p.critic += power(row / n) * share;
      } else {
        const double share = (1 - double(s.discount)) * v / experts;
        p.value += share;
        for (Index t = 0; t < h; ++t) p.critic += power(t) / steps * share;
      }
    }
    for (Index r = 0; r < static_cast<Index>(between.size()); ++r) {
      const double weight = power(r / b.experts) / (steps * experts * members);
      for (std::size_t k = 0; k < m.critics.size(); ++k) {
        const float* mask = nullptr;
        if (s.dropout_always) {
          mask = d.keep_penalty.data() + (static_cast<Index>(k) * h * b.experts + r) * hidden_dim;
        }
        const double norm = slope_norm(m.critics[k], between[r], mask);
        p.penalty += weight * (norm - 1) * (norm - 1);
      }
    }
    p.critic += s.c_gp * p.penalty;
    p.total = s.c_cons * p.consistency + s.c_iq * p.critic + s.c_termination * p.termination;
    return p;
  }

  // On the latents of the model at construction.
  // `cloning` is the weight of the squared error on the demonstrations.
  double policy(const Model& m, double cloning) const {
    double loss = 0;
    for (Index r = 0; r < (h + 1) * n; ++r) {
      const Sample pi = sample(m, z[r], d.policy.data() + r * a, s.entropy);
      double q[2];
      for (Index i = 0; i < 2; ++i) {
        const float* mask = nullptr;
        if (s.dropout_always) mask = d.keep_policy.data() + (i * (h + 1) * n + r) * hidden_dim;
        q[i] = neuron(m.critics[static_cast<std::size_t>(d.policy_pair[i])],
                      joined(z[r], pi.action), mask);
      }
      loss += power(r / n) / static_cast<double>((h + 1) * n) *
              (s.entropy_coef * pi.log_prob - std::min(q[0], q[1]));
      for (Index j = 0; r < h * n && r % n < b.experts && j < a; ++j) {
        const double error = pi.action[j] - b.action[r * a + j];
        loss += cloning * power(r / n) / static_cast<double>(h * b.experts * a) * error * error;
      }
    }
    return loss;
  }

 private:
  double power(Index t) const { return std::pow(double(s.rho), double(t)); }
  bool td() const { return s.objective == iqmpc::Objective::td; }
  // Rows of which V is taken, and their places among all rows [H, N].
  Index value_rows() const {
    return s.objective == iqmpc::Objective::v_diff ? h * (n - b.experts) : b.experts;
  }
  Index value_row(Index r) const {
    const Index behaviour = n - b.experts;
    if (s.objective != iqmpc::Objective::v_diff) return r;
    return r / behaviour * n + b.experts + r % behaviour;
  }
  Doubles action(Index row) const { return Doubles(b.action + row * a, b.action + (row + 1) * a); }
  Doubles encode(const Model& m, Index row) const {
    const float* obs = b.obs + row * obs_dim;
    return latent(m.encoder, Doubles(obs, obs + obs_dim), m.simnorm);
  }
  std::vector<Doubles> rollout(const Model& m) const {
    std::vector<Doubles> latents;
    for (Index i = 0; i < n; ++i) latents.push_back(encode(m, i));
    for (Index r = 0; r < h * n; ++r) {
      latents.push_back(latent(m.dynamics, joined(latents[r], action(r)), m.simnorm));
    }
    return latents;
  }

  const iqmpc::LearnerSettings& s;
  const iqmpc::BatchView& b;
  const Draws& d;
  const Index a, h, n, obs_dim, hidden_dim;
  std::vector<Doubles> encoded, z, between;
  Doubles backup;
  std::vector<Sample> values;
};

}  // namespace exact
