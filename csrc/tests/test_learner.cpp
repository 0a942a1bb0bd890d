#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "allocations.hpp"
#include "check.hpp"
#include "iqmpc/learner.hpp"
#include "iqmpc/model_storage.hpp"
#include "losses.hpp"
#include "models.hpp"

namespace {

using iqmpc::BatchView;
using iqmpc::Learner;
using iqmpc::LearnerSettings;
using iqmpc::LearnerView;
using iqmpc::ModelSizes;
using iqmpc::ModelStorage;
using iqmpc::Objective;
using iqmpc::Parameter;
using iqmpc::Precision;
using iqmpc::ReplayView;
using iqmpc::UpdateMetrics;
using Floats = std::vector<float>;
using Index = std::ptrdiff_t;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

ModelSizes sizes() {
  ModelSizes s;
  s.obs = 3;
  s.action = 2;
  s.latent = 6;
  s.simnorm_dim = 3;
  s.hidden = 11;
  s.encoder = 7;
  s.critics = 3;
  s.termination = true;
  return s;
}

LearnerSettings settings() {
  LearnerSettings s;
  s.horizon = 2;
  s.rho = 0.6f;
  s.discount = 0.97f;
  s.alpha = 0.4f;
  s.entropy_coef = 0.03f;
  s.c_cons = 15;
  s.c_iq = 0.2f;
  s.c_termination = 0.8f;
  s.termination_weight = 3;
  s.dropout = 0;
  s.tau = 0.05f;
  s.average_rate = 0.02f;
  s.threads = 2;
  return s;
}

struct Tensor {
  const Parameter* parameter;
  Index count;
  std::string part;
};

// In the order of Learner::gradients.
std::vector<Tensor> tensors(const LearnerView& view) {
  std::vector<Tensor> result;
  const auto add = [&](const std::string& part, const std::vector<iqmpc::LayerParameters>& layers) {
    for (const iqmpc::LayerParameters& p : layers) {
      result.push_back({&p.weight, p.out * p.in, part});
      for (const Parameter* x : {&p.bias, &p.gamma, &p.beta}) {
        if (x->value != nullptr) result.push_back({x, p.out, part});
      }
    }
  };
  add("encoder", view.encoder);
  add("dynamics", view.dynamics);
  for (const auto& critic : view.critics) add("critics", critic);
  add("termination", view.termination);
  add("policy", view.policy);
  return result;
}

std::vector<exact::Doubles*> values(exact::Model& model) {
  std::vector<exact::Doubles*> result;
  const auto add = [&](exact::Stack& stack) {
    for (exact::Layer& layer : stack) {
      for (exact::Doubles* x : {&layer.weight, &layer.bias, &layer.gamma, &layer.beta}) {
        if (!x->empty()) result.push_back(x);
      }
    }
  };
  add(model.encoder);
  add(model.dynamics);
  for (exact::Stack& critic : model.critics) add(critic);
  add(model.termination);
  add(model.policy);
  return result;
}

// A model whose layers all matter, critics and targets that disagree, and an average of its own.
ModelStorage random_model(const ModelSizes& sizes, unsigned seed = 0) {
  ModelStorage model(sizes, seed);
  std::mt19937 random(seed);
  std::normal_distribution<float> draw;
  for (const Tensor& t : tensors(model.learner_view())) {
    const float spread = t.count > sizes.hidden ? 0.15f : 0.3f;
    for (Index i = 0; i < t.count; ++i) {
      t.parameter->value[i] += spread * draw(random);
      if (t.parameter->average != nullptr) t.parameter->average[i] = 0.1f * draw(random);
    }
  }
  const LearnerView& view = model.learner_view();
  for (std::size_t k = 0; k < view.critics.size(); ++k) {
    for (std::size_t l = 0; l < view.critics[k].size(); ++l) {
      const auto &from = view.critics[k][l], &to = view.targets[k][l];
      const auto near = [&](const Parameter& source, const Parameter& target, Index count) {
        for (Index i = 0; source.value != nullptr && i < count; ++i) {
          target.value[i] = source.value[i] + 0.05f * draw(random);
        }
      };
      near(from.weight, to.weight, from.out * from.in);
      near(from.bias, to.bias, from.out);
      near(from.gamma, to.gamma, from.out);
      near(from.beta, to.beta, from.out);
    }
  }
  return model;
}

struct Batch {
  Batch(const ModelSizes& s, Index horizon, Index experts, Index behaviour, unsigned seed = 0)
      : obs(normal_floats((horizon + 1) * (experts + behaviour) * s.obs, seed)),
        action(normal_floats(horizon * (experts + behaviour) * s.action, seed + 1)),
        reward(normal_floats(horizon * (experts + behaviour), seed + 2)),
        terminated(normal_floats(horizon * (experts + behaviour), seed + 3)),
        columns(experts + behaviour),
        experts(experts) {
    for (float& a : action) a = std::tanh(a);
    for (float& d : terminated) d = d > 1 ? 1.0f : 0.0f;
  }
  BatchView view() const {
    return {obs.data(), action.data(), reward.data(), terminated.data(), columns, experts};
  }
  Floats obs, action, reward, terminated;
  Index columns, experts;
};

Floats memory(const ModelStorage& model) {
  return Floats(model.data(), model.data() + model.size());
}
bool same_bits(const Floats& a, const Floats& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

void near(double got, double expected, double tolerance) {
  if (std::abs(got - expected) <= tolerance) return;
  std::fprintf(stderr, "got %.9g, expected %.9g, to %.1g\n", got, expected, tolerance);
  CHECK(false);
}

// The gradient of `loss` by the values at tensors [first, last): all of the small ones and every
// `stride`th weight, and all at once along one direction.
template <class Loss>
void check_gradients(const Learner& learner, exact::Model model, std::size_t first,
                     std::size_t last, Loss loss) {
  constexpr double kStep = 1e-5, kTolerance = 1e-4;
  const std::vector<iqmpc::LearnerGradient> gradients = learner.gradients();
  const std::vector<exact::Doubles*> all = values(model);
  CHECK(gradients.size() == all.size());
  const auto gradient = [&](std::size_t t, std::size_t i) {
    const iqmpc::LearnerGradient& g = gradients[t];
    const Index at = static_cast<Index>(i);
    return static_cast<double>(g.values[at / g.columns * g.ld + at % g.columns]);
  };
  std::mt19937 random(0);
  std::normal_distribution<double> draw;
  std::vector<exact::Doubles> direction;
  double along = 0, size = 0, norm = 0;
  for (std::size_t t = first; t < last; ++t) {
    exact::Doubles& values = *all[t];
    CHECK(gradients[t].rows * gradients[t].columns == static_cast<Index>(values.size()));
    double scale = 0;
    direction.emplace_back();
    for (std::size_t i = 0; i < values.size(); ++i) {
      direction.back().push_back(draw(random));
      along += gradient(t, i) * direction.back()[i];
      size += std::abs(gradient(t, i) * direction.back()[i]);
      norm += gradient(t, i) * gradient(t, i);
      scale = std::max(scale, std::abs(gradient(t, i)));
    }
    const std::size_t stride = values.size() > 40 ? 7 : values.size() > 12 ? 3 : 1;
    // A layer's gradients share one scale, that of its weights: a bias's may be a sum in which
    // everything cancels.
    if (values.size() <= 12 && t > first) {
      for (std::size_t before = t; before-- > first && t - before < 4;) {
        for (std::size_t i = 0; i < all[before]->size(); ++i) {
          scale = std::max(scale, std::abs(gradient(before, i)));
        }
      }
    }
    for (std::size_t i = t % stride; i < values.size(); i += stride) {
      const double at = values[i];
      values[i] = at + kStep;
      const double up = loss(model);
      values[i] = at - kStep;
      const double down = loss(model);
      values[i] = at;
      near(gradient(t, i), (up - down) / (2 * kStep), kTolerance * scale + 1e-8);
    }
  }
  const auto moved = [&](double by) {
    for (std::size_t t = first; t < last; ++t) {
      for (std::size_t i = 0; i < all[t]->size(); ++i) (*all[t])[i] += by * direction[t - first][i];
    }
    return loss(model);
  };
  const double up = moved(kStep), down = moved(-2 * kStep);
  near(along, (up - down) / (2 * kStep), kTolerance * size);
  CHECK(norm > 0);
}

// Adam's first step from gradients that are not clipped, and what follows it.
void check_step(const Learner& learner, const ModelStorage& model, const Floats& before,
                const UpdateMetrics& metrics) {
  const LearnerSettings& s = learner.settings();
  const std::vector<iqmpc::LearnerGradient> gradients = learner.gradients();
  const auto was = [&](const float* p) { return static_cast<double>(before[p - model.data()]); };
  double norms[2] = {0, 0};
  const std::vector<Tensor> all = tensors(model.learner_view());
  for (std::size_t t = 0; t < all.size(); ++t) {
    const iqmpc::LearnerGradient& g = gradients[t];
    const Parameter& p = *all[t].parameter;
    const double rate = s.lr * (all[t].part == "encoder" ? s.encoder_lr_scale : 1);
    for (Index i = 0; i < all[t].count; ++i) {
      const double gradient = g.values[i / g.columns * g.ld + i % g.columns];
      norms[all[t].part == "policy"] += gradient * gradient;
      near(p.first[i], 0.1 * gradient, 1e-6 * std::abs(gradient) + 1e-12);
      // 1 - β2 is taken in float32, here and where the bias is corrected.
      near(p.second[i], 1e-3 * gradient * gradient, 2e-8 * gradient * gradient + 1e-12);
      near(p.value[i], was(p.value + i) - rate * gradient / (std::abs(gradient) + 1e-8),
           1e-3 * rate + 1e-7 * std::abs(p.value[i]));
      near(p.average[i], was(p.average + i) + s.average_rate * (p.value[i] - was(p.average + i)),
           1e-6);
    }
  }
  near(metrics.model_grad_norm, std::sqrt(norms[0]), 1e-6 * metrics.model_grad_norm);
  near(metrics.policy_grad_norm, std::sqrt(norms[1]), 1e-6 * metrics.policy_grad_norm);
  const LearnerView& view = model.learner_view();
  for (std::size_t k = 0; k < view.critics.size(); ++k) {
    for (std::size_t l = 0; l < view.critics[k].size(); ++l) {
      const float *critic = view.critics[k][l].weight.value, *to = view.targets[k][l].weight.value;
      for (Index i = 0; i < view.critics[k][l].out * view.critics[k][l].in; ++i) {
        near(to[i], was(to + i) + s.tau * (critic[i] - was(to + i)), 1e-6);
      }
    }
  }
}

void check_update(const LearnerSettings& s, Index experts, Index behaviour, unsigned seed,
                  iqmpc::Isa isa) {
  ModelStorage model = random_model(sizes(), seed);
  Learner learner(model.learner_view(), s, seed, isa);
  const Batch batch(sizes(), s.horizon, experts, behaviour, seed);
  const BatchView view = batch.view();
  const exact::Draws draws(learner, 5, batch.columns, experts);
  const exact::Model original = exact::copy_of(model.learner_view());
  const exact::Losses losses(original, s, view, draws, sizes().action);
  const Floats before = memory(model);

  const UpdateMetrics metrics = learner.update(view, 5, 0, 0);
  CHECK(!metrics.model_skipped && !metrics.policy_skipped);
  const std::vector<Tensor> all = tensors(model.learner_view());
  std::size_t policy = 0;
  while (all[policy].part != "policy") ++policy;

  const exact::Losses::Parts parts = losses.model(original);
  near(metrics.consistency, parts.consistency, 1e-5 * parts.consistency);
  near(metrics.critic_loss, parts.critic, 1e-5 * std::abs(parts.critic) + 1e-5);
  near(metrics.termination_loss, parts.termination, 1e-5 * parts.termination);
  CHECK(std::isnan(metrics.value_term) == (s.objective == Objective::td));
  if (s.objective != Objective::td) {
    near(metrics.value_term, parts.value, 1e-5 * std::abs(parts.value) + 1e-6);
  }
  CHECK(std::isnan(metrics.gradient_penalty) == (s.c_gp == 0));
  if (s.c_gp > 0) near(metrics.gradient_penalty, parts.penalty, 1e-5 * parts.penalty + 1e-6);
  check_gradients(learner, original, 0, policy,
                  [&](const exact::Model& m) { return losses.model(m).total; });

  // The policy's step comes after the critics' and rates actions with what these have become.
  exact::Model stepped = exact::copy_of(model.learner_view());
  stepped.policy = original.policy;
  CHECK(std::isnan(metrics.cloning_error) == (s.c_bc == 0));
  const double cloning = s.c_bc > 0 ? s.c_bc * (1 + std::abs(metrics.q_expert)) : 0.0;
  near(metrics.policy_loss, losses.policy(stepped, cloning),
       1e-5 * std::abs(metrics.policy_loss) + 1e-6);
  check_gradients(learner, stepped, policy, all.size(),
                  [&](const exact::Model& m) { return losses.policy(m, cloning); });
  check_step(learner, model, before, metrics);
}

void gradients_of_every_objective() {
  const iqmpc::Isa best = iqmpc::active_isa();
  LearnerSettings s = settings();
  check_update(s, 5, 4, 1, best);
  check_update(s, 3, 4, 2, iqmpc::Isa::portable);
  s.c_gp = 0.7f;
  s.c_bc = 0.3f;
  check_update(s, 4, 4, 3, best);
  s.horizon = 1;
  check_update(s, 9, 9, 4, best);  // two blocks of columns, of odd size
  s.horizon = 3;
  s.c_gp = s.c_bc = 0;
  s.objective = Objective::v_diff;
  s.entropy = iqmpc::Entropy::presquash;
  check_update(s, 2, 3, 5, best);
  s.horizon = 2;
  s.c_gp = 0.7f;
  s.dropout = 0.25f;
  s.dropout_always = true;
  check_update(s, 3, 3, 6, best);
  s = settings();
  s.objective = Objective::td;
  check_update(s, 0, 7, 7, best);
}

Floats after_updates(const LearnerSettings& s, const ModelSizes& sizes, const Batch& batch,
                     int updates) {
  ModelStorage model = random_model(sizes);
  Learner learner(model.learner_view(), s, 3);
  for (int i = 0; i < updates; ++i) {
    const auto n = static_cast<std::uint64_t>(i);
    const UpdateMetrics metrics = learner.update(batch.view(), n, n, n);
    CHECK(!metrics.model_skipped && !metrics.policy_skipped);
  }
  return memory(model);
}

void the_same_bits_on_any_number_of_threads() {
  ModelSizes wide = sizes();
  wide.hidden = 70;  // two strips of outputs
  const Batch batch(wide, 2, 25, 25);
  LearnerSettings s = settings();
  s.c_gp = 0.7f;
  s.dropout = 0.1f;
  for (const Precision precision : {Precision::float32, Precision::bf16}) {
    s.precision = precision;
    s.threads = 1;
    const Floats first = after_updates(s, wide, batch, 2);
    for (s.threads = 2; s.threads <= 4; ++s.threads) {
      CHECK(same_bits(first, after_updates(s, wide, batch, 2)));
    }
  }
}

void what_is_not_finite_changes_nothing() {
  for (const bool in_weights : {false, true}) {
    for (const float bad : {kNaN, kInfinity}) {
      ModelStorage model = random_model(sizes());
      Learner learner(model.learner_view(), settings(), 3);
      Batch batch(sizes(), 2, 4, 5);
      (in_weights ? model.learner_view().dynamics[1].weight.value : batch.obs.data())[7] = bad;
      const Floats before = memory(model);
      const UpdateMetrics metrics = learner.update(batch.view(), 0, 0, 0);
      CHECK(metrics.model_skipped && metrics.policy_skipped);
      CHECK(same_bits(memory(model), before));
      if (in_weights) continue;
      // ... nor what the next update makes of a batch that is finite.
      Learner other(model.learner_view(), settings(), 3);
      batch.obs[7] = 0;
      learner.update(batch.view(), 0, 0, 0);
      const Floats after = memory(model);
      std::copy(before.begin(), before.end(), model.data());
      other.update(batch.view(), 0, 0, 0);
      CHECK(same_bits(memory(model), after));
    }
  }
}

void a_policys_step_is_left_out_alone() {
  ModelSizes wide = sizes();
  wide.hidden = 70;
  ModelStorage model = random_model(wide);
  const LearnerView& view = model.learner_view();
  // Actions of the usual size, but a gradient whose square overflows.
  for (Index i = 0; i < wide.hidden; ++i) view.policy[1].gamma.value[i] *= 1e30f;
  for (Index i = 0; i < 4 * wide.hidden; ++i) view.policy[2].weight.value[i] *= 1e-30f;
  Learner learner(view, settings(), 3);
  const Floats before = memory(model);
  const Batch batch(wide, 2, 4, 5);
  const UpdateMetrics metrics = learner.update(batch.view(), 0, 0, 0);
  CHECK(!metrics.model_skipped && metrics.policy_skipped);
  CHECK(std::isfinite(metrics.policy_loss) && std::isinf(metrics.policy_grad_norm));
  for (const Tensor& t : tensors(view)) {
    bool moved = false;
    for (Index i = 0; i < t.count; ++i) {
      const float* at = t.parameter->value + i;
      moved = moved || *at != before[static_cast<std::size_t>(at - model.data())];
    }
    CHECK(moved == (t.part != "policy"));
  }
}

struct Episodes {
  Episodes(const ModelSizes& s, Index rows, unsigned seed)
      : obs(normal_floats(rows * s.obs, seed)),
        action(normal_floats(rows * s.action, seed + 1)),
        reward(normal_floats(rows, seed + 2)),
        terminated(static_cast<std::size_t>(rows)) {
    for (float& a : action) a = std::tanh(a);
    for (Index i = 0; i + settings().horizon < rows; ++i) starts.push_back(i);
  }
  ReplayView view() const {
    return {obs.data(),
            action.data(),
            reward.data(),
            terminated.data(),
            starts.data(),
            static_cast<Index>(starts.size()),
            static_cast<Index>(reward.size())};
  }
  Floats obs, action, reward, terminated;
  std::vector<std::int64_t> starts;
};

void no_allocation_after_the_first_call() {
  ModelStorage model = random_model(sizes());
  LearnerSettings s = settings();
  s.c_gp = 0.7f;
  s.dropout = 0.1f;
  s.dropout_always = true;
  for (const Precision precision : {Precision::float32, Precision::bf16}) {
    s.precision = precision;
    Learner learner(model.learner_view(), s, 3);
    const Episodes experts(sizes(), 20, 1), behaviour(sizes(), 30, 2);
    const ReplayView of_experts = experts.view();
    const Batch batch(sizes(), 2, 9, 9);
    learner.update(batch.view(), 0, 0, 0);
    const long before = allocations;
    for (std::uint64_t i = 1; i < 6; ++i) {
      learner.update(batch.view(), i, i, i);
      learner.learn(&of_experts, behaviour.view(), 9, i, i, i);
    }
    CHECK(allocations == before);
  }
  const long before = allocations;
  ::operator delete(::operator new(1));
  CHECK(allocations > before);  // the count counts
}

// A learner that has seen batches of other sizes makes of the next what a new one would. Sizes are
// chosen so that buffers of the one before fit: rows are summed in pairs, and what an odd number
// leaves over must be zero.
void sizes_of_batches_change_and_change_back() {
  LearnerSettings s = settings();
  s.horizon = 1;
  for (const auto& [objective, c_gp] : {std::pair{Objective::iq, 0.0f},
                                        {Objective::iq, 0.5f},
                                        {Objective::v_diff, 0.0f},
                                        {Objective::td, 0.0f}}) {
    for (const Precision precision : {Precision::float32, Precision::bf16}) {
      s.objective = objective;
      s.c_gp = c_gp;
      s.precision = precision;
      ModelStorage model = random_model(sizes());
      Learner learner(model.learner_view(), s, 3);
      std::uint64_t update = 0;
      for (const auto& [experts, behaviour] :
           {std::pair{8, 8}, {7, 7}, {8, 8}, {4, 11}, {3, 12}, {20, 20}, {4, 4}, {3, 3}, {8, 8}}) {
        if (c_gp > 0 && experts != behaviour) continue;
        for (const bool finite : {false, true}) {
          Batch batch(sizes(), 1, objective == Objective::td ? 0 : experts, behaviour,
                      static_cast<unsigned>(update));
          if (!finite) batch.obs.back() = kInfinity;
          const Floats before = memory(model);
          CHECK(learner.update(batch.view(), update, update, update).model_skipped == !finite);
          const Floats after = memory(model);
          std::copy(before.begin(), before.end(), model.data());
          Learner fresh(model.learner_view(), s, 3);
          fresh.update(batch.view(), update, update, update);
          CHECK(same_bits(memory(model), after));
          ++update;
        }
      }
    }
  }
}

void a_replay_is_not_needed_after_the_call() {
  ModelStorage kept = random_model(sizes()), freed = random_model(sizes());
  Learner learner(kept.learner_view(), settings(), 3), other(freed.learner_view(), settings(), 3);
  const Episodes experts(sizes(), 20, 1), behaviour(sizes(), 30, 2);
  for (int i = 0; i < 3; ++i) {
    const ReplayView of_experts = experts.view();
    kept.learn(learner, &of_experts, behaviour.view(), 5);
    auto first = std::make_unique<Episodes>(experts);
    auto second = std::make_unique<Episodes>(behaviour);
    const auto view = std::make_unique<ReplayView>(first->view());
    freed.learn(other, view.get(), second->view(), 5);
    std::fill(first->obs.begin(), first->obs.end(), kNaN);
    std::fill(second->obs.begin(), second->obs.end(), kNaN);
  }
  CHECK(kept.counts.updates == 3 && kept.counts.model_steps == 3 && kept.counts.policy_steps == 3);
  CHECK(same_bits(memory(kept), memory(freed)));

  // Updates that are not made count as updates alone.
  freed.learner_view().encoder[0].bias.value[0] = kNaN;
  const ReplayView of_experts = experts.view();
  freed.learn(other, &of_experts, behaviour.view(), 5);
  CHECK(freed.counts.updates == 4 && freed.counts.model_steps == 3);
  CHECK(freed.counts.policy_steps == 3);
}

void calls_from_several_threads_take_turns() {
  ModelStorage model = random_model(sizes()), apart = random_model(sizes());
  Learner learner(model.learner_view(), settings(), 3), other(apart.learner_view(), settings(), 3);
  const Batch batch(sizes(), 2, 5, 4), larger(sizes(), 2, 6, 5);
  std::vector<std::thread> threads;
  for (std::uint64_t first = 0; first < 3; ++first) {
    threads.emplace_back([&, first] {
      for (std::uint64_t i = first; i < 24; i += 3) {
        if (first == 2) {
          other.update(batch.view(), i, i, i);
        } else {
          CHECK(!learner.update((first ? larger : batch).view(), i, i, i).model_skipped);
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  const Floats values = memory(model);
  CHECK(std::all_of(values.begin(), values.end(), [](float x) { return std::isfinite(x); }));
  CHECK(!same_bits(values, memory(apart)));
}

// A learner made from a changed view or changed settings.
template <class Change>
std::string refused(Change change) {
  ModelStorage model = random_model(sizes());
  LearnerView view = model.learner_view();
  LearnerSettings s = settings();
  change(view, s);
  return message_of<std::invalid_argument>([&] { Learner(view, s, 0); });
}

void refuses_what_does_not_fit() {
  CHECK(refused([](LearnerView&, LearnerSettings& s) { s.horizon = 0; }) ==
        "horizon must be at least 1, got 0");
  CHECK(refused([](LearnerView&, LearnerSettings& s) { s.alpha = 0; }) ==
        "alpha must be positive, got 0");
  CHECK(refused([](LearnerView&, LearnerSettings& s) { s.lr = kInfinity; }) ==
        "lr must be positive, got inf");
  CHECK(refused([](LearnerView&, LearnerSettings& s) { s.dropout = 1; }) ==
        "dropout must be in [0, 0.99], got 1");
  CHECK(refused([](LearnerView&, LearnerSettings& s) {
          s.threads = 0;
        }).find("threads must lie in [1, ") == 0);
  CHECK(refused([](LearnerView& v, LearnerSettings&) { v.encoder.pop_back(); }) ==
        "encoder: expected at least 2 layers, got 1");
  CHECK(refused([](LearnerView& v, LearnerSettings&) { ++v.dynamics[0].in; }) ==
        "dynamics layer 0: expected 8 inputs, got 9");
  CHECK(refused([](LearnerView& v, LearnerSettings&) { v.targets.pop_back(); }) ==
        "targets: expected 3, as many as critics, got 2");
  CHECK(refused([](LearnerView& v, LearnerSettings&) {
          v.critics[1][0].out = v.critics[1][1].in = 10;
        }) == "critic 1: expected it and its target to have the sizes of critic 0");
  CHECK(refused([](LearnerView& v, LearnerSettings&) { v.policy[1].bias.second = nullptr; }) ==
        "policy: every parameter needs both of Adam's moments");
  CHECK(refused([](LearnerView& v, LearnerSettings&) { v.critics[2][0].beta.first = nullptr; }) ==
        "critics: every parameter needs both of Adam's moments");
  CHECK(refused([](LearnerView& v, LearnerSettings&) { v.policy[1].beta.average = nullptr; }) ==
        "policy: either every parameter has an average or none");
  CHECK(refused([](LearnerView& v, LearnerSettings&) { v.targets[0][2].bias.value = nullptr; }) ==
        "critic 0 layer 2: needs weight and bias, and has no LayerNorm");
  CHECK(refused([](LearnerView& v, LearnerSettings&) { v.simnorm_dim = 4; }) ==
        "simnorm_dim: must divide the latent size 6, got 4");

  ModelStorage model = random_model(sizes());
  Learner learner(model.learner_view(), settings(), 0);
  CHECK(learner.gradients().empty());
  const auto refuses = [&](auto call) { return message_of<std::invalid_argument>(call); };
  const Batch batch(sizes(), 2, 4, 5);
  const auto update = [&](Index columns, Index experts) {
    BatchView view = batch.view();
    view.columns = columns;
    view.experts = experts;
    return refuses([&] { learner.update(view, 0, 0, 0); });
  };
  CHECK(update(0, 0) ==
        "a batch must have columns, some of them demonstrations, got 0 columns, 0 of them "
        "demonstrations");
  CHECK(update(9, 9) ==
        "a batch must have demonstrations and behaviour, got 9 columns, 9 of them demonstrations");
  CHECK(update(9, 0).find("a batch must have demonstrations and behaviour") == 0);
  CHECK(update(9, 10).find("a batch must have columns, some of them demonstrations") == 0);

  const Episodes episodes(sizes(), 9, 1);
  const ReplayView whole = episodes.view();
  const auto learn = [&](ReplayView changed) {
    return refuses([&] { learner.learn(&whole, changed, 4, 0, 0, 0); });
  };
  ReplayView view = whole;
  view.slices = 0;
  CHECK(learn(view) == "the replay holds no slice of 2 steps");
  for (const std::int64_t row : {7, -1}) {  // the last observation would be row 9 of 9
    view = whole;
    view.starts = &row;
    view.slices = 1;
    CHECK(learn(view) == "a slice from row " + std::to_string(row) +
                             " on, 2 steps long, lies beyond the replay's 9 rows");
  }
  CHECK(refuses([&] {
          learner.learn(&whole, whole, 0, 0, 0, 0);
        }).find("a batch must have columns") == 0);
  CHECK(refuses([&] {
          learner.learn(nullptr, whole, 4, 0, 0, 0);
        }).find("a batch must have demonstrations and behaviour") == 0);

  BatchView missing = batch.view();
  missing.action = nullptr;
  CHECK(refuses([&] { learner.update(missing, 0, 0, 0); }) == "a batch needs action, got null");
  view = whole;
  view.terminated = nullptr;
  CHECK(learn(view) == "the replay of behaviour needs terminated, got null");
  CHECK(refuses([&] { learner.learn(&view, whole, 4, 0, 0, 0); }) ==
        "the replay of demonstrations needs terminated, got null");

  LearnerSettings s = settings();
  s.c_gp = 1;
  Learner penalised(model.learner_view(), s, 0);
  CHECK(refuses([&] {
          penalised.update(batch.view(), 0, 0, 0);
        }).find("a batch must have as many demonstrations as behaviour") == 0);
  s.objective = Objective::td;
  Learner td(model.learner_view(), s, 0);
  CHECK(refuses([&] {
          td.update(batch.view(), 0, 0, 0);
        }).find("a batch must have no demonstrations for the objective td") == 0);
  view = whole;
  view.reward = nullptr;
  CHECK(refuses([&] { td.learn(nullptr, view, 4, 0, 0, 0); }) ==
        "the replay of behaviour needs reward, got null");
  CHECK(!learner.learn(&view, view, 4, 0, 0, 0).model_skipped);  // which reads no reward
  CHECK(!learner.update(batch.view(), 0, 0, 0).model_skipped);   // none of it left anything behind
}

}  // namespace

int main() {
  gradients_of_every_objective();
  the_same_bits_on_any_number_of_threads();
  what_is_not_finite_changes_nothing();
  a_policys_step_is_left_out_alone();
  no_allocation_after_the_first_call();
  sizes_of_batches_change_and_change_back();
  a_replay_is_not_needed_after_the_call();
  calls_from_several_threads_take_turns();
  refuses_what_does_not_fit();
  return 0;
}
