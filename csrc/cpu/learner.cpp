#include "iqmpc/learner.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

#include "common/setting_checks.hpp"
#include "common/view_checks.hpp"
#include "cpu/calls.hpp"
#include "cpu/learner_state.hpp"
#include "cpu/learner_views.hpp"
#include "iqmpc/world_model.hpp"

namespace iqmpc {

using detail::Block;
using detail::DrawKey;
using detail::Group;
using detail::Index;
using detail::Layer;
using detail::LearnTable;
using detail::Neuron;
using detail::Operand;
using detail::Source;
using detail::Stack;
using detail::StackTrace;
using detail::Sums;
using detail::Work;

namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr float kBeta1 = 0.9f, kBeta2 = 0.999f, kAdamEpsilon = 1e-8f;  // torch's defaults

void check(const LearnerSettings& s) {
  const auto need = [](const char* name, double value, bool good, const char* expected) {
    detail::require(good && std::isfinite(value), name, expected, value);
  };
  need("horizon", static_cast<double>(s.horizon), s.horizon >= 1, "at least 1");
  need("rho", s.rho, s.rho >= 0 && s.rho <= 1, "in [0, 1]");
  need("discount", s.discount, s.discount >= 0 && s.discount <= 1, "in [0, 1]");
  need("alpha", s.alpha, s.alpha > 0, "positive");
  need("entropy_coef", s.entropy_coef, s.entropy_coef >= 0, "0 or more");
  need("c_cons", s.c_cons, s.c_cons >= 0, "0 or more");
  need("c_iq", s.c_iq, s.c_iq >= 0, "0 or more");
  need("c_gp", s.c_gp, s.c_gp >= 0, "0 or more");
  need("c_bc", s.c_bc, s.c_bc >= 0, "0 or more");
  need("c_termination", s.c_termination, s.c_termination >= 0, "0 or more");
  need("termination_weight", s.termination_weight, s.termination_weight > 0, "positive");
  need("dropout", s.dropout, s.dropout >= 0 && s.dropout <= 0.99f, "in [0, 0.99]");
  need("lr", s.lr, s.lr > 0, "positive");
  need("encoder_lr_scale", s.encoder_lr_scale, s.encoder_lr_scale >= 0, "0 or more");
  need("grad_clip", s.grad_clip, s.grad_clip > 0, "positive");
  need("tau", s.tau, s.tau >= 0 && s.tau <= 1, "in [0, 1]");
  need("average_rate", s.average_rate, s.average_rate > 0 && s.average_rate <= 1, "in (0, 1]");
}

void check(const LearnerView& view) {
  WorldModelView model = detail::world_model_view(view, &Parameter::value);
  const auto refuse = [](const std::string& text) { throw std::invalid_argument(text); };
  if (view.encoder.size() < 2) {
    refuse("encoder: expected at least 2 layers, got " + std::to_string(view.encoder.size()));
  }
  detail::check_view(model);
  if (view.targets.size() != view.critics.size()) {
    refuse("targets: expected " + std::to_string(view.critics.size()) +
           ", as many as critics, got " + std::to_string(view.targets.size()));
  }
  const auto sizes = [](const std::vector<LayerParameters>& layers) {
    std::vector<Index> result;
    for (const LayerParameters& p : layers) result.push_back(p.out);
    return result;
  };
  for (std::size_t k = 0; k < view.critics.size(); ++k) {
    if (sizes(view.targets[k]) != sizes(view.critics[0]) ||
        sizes(view.critics[k]) != sizes(view.critics[0])) {
      refuse("critic " + std::to_string(k) +
             ": expected it and its target to have the sizes of critic 0");
    }
    model.critics[k] = detail::linear_views(view.targets[k], &Parameter::value);
  }
  detail::check_view(model);  // now of the targets

  const bool average = view.encoder[0].weight.average != nullptr;
  const auto check_part = [&](const std::string& part, const std::vector<LayerParameters>& layers) {
    for (const LayerParameters& p : layers) {
      if (p.out > detail::kWidestLayer) {
        refuse(part + ": layers may have at most " + std::to_string(detail::kWidestLayer) +
               " outputs, got " + std::to_string(p.out));
      }
      for (const Parameter* x : {&p.weight, &p.bias, &p.gamma, &p.beta}) {
        if (x->value == nullptr) continue;
        if (x->first == nullptr || x->second == nullptr) {
          refuse(part + ": every parameter needs both of Adam's moments");
        }
        if ((x->average != nullptr) != average) {
          refuse(part + ": either every parameter has an average or none");
        }
      }
    }
  };
  check_part("encoder", view.encoder);
  check_part("dynamics", view.dynamics);
  check_part("policy", view.policy);
  for (const auto& critic : view.critics) check_part("critics", critic);
  check_part("termination", view.termination);
}

// One layer a parameter but the last of a stack that ends in a neuron.
Stack make_stack(const std::vector<LayerParameters>& parameters, const LearnTable& table,
                 const LearnTable* exact = nullptr) {
  Stack stack;
  for (const LayerParameters& p : parameters) {
    if (exact != nullptr && &p == &parameters.back()) {
      stack.neuron.emplace_back(p, *exact);
    } else {
      stack.layers.emplace_back(p, table);
    }
  }
  return stack;
}

void reserve(StackTrace& trace, const Stack& stack, const LearnTable& exact, Index rows,
             bool dropout) {
  trace.resize(stack.layers.size());
  for (std::size_t i = 0; i < stack.layers.size(); ++i) {
    const Layer& layer = stack.layers[i];
    const bool last = i + 1 == stack.layers.size();
    trace[i].reserve(*layer.k, last ? exact : *stack.layers[i + 1].k, rows, layer.out,
                     dropout && i == 0);
  }
}

// Block by block, so that it comes out the same on any number of threads.
Sums sum_of(const std::vector<Sums>& blocks) {
  Sums total;
  for (const Sums& block : blocks) {
    for (const auto figure : Sums::kAll) total.*figure += block.*figure;
  }
  return total;
}

Index even(Index n) { return n + n % 2; }

Group group(const LearnerSettings& s, float lr, double norm, std::uint64_t steps) {
  const double t = static_cast<double>(steps) + 1;
  const double clip = std::min(1.0, s.grad_clip / (norm + 1e-6));  // as torch clips
  return {{static_cast<float>(clip), kBeta1, kBeta2,
           static_cast<float>(lr / (1 - std::pow(double(kBeta1), t))),
           static_cast<float>(1 / std::sqrt(1 - std::pow(double(kBeta2), t))), kAdamEpsilon},
          s.average_rate};
}

}  // namespace

Learner::State::State(const LearnerView& view, const LearnerSettings& s, std::uint64_t seed,
                      Isa isa)
    : settings(s),
      seed(seed),
      isa(isa_from_name(isa_name(isa), "isa")),
      table(detail::learn_table(isa, s.precision)),
      exact(detail::learn_table(isa, Precision::float32)),
      draw(detail::kernel_table(isa, Precision::float32)),
      pool(s.threads),
      obs_dim(view.encoder.front().in),
      action_dim(view.policy.back().out / 2),
      latent_dim(view.dynamics.back().out),
      hidden_dim(view.critics[0][0].out),
      simnorm_dim(view.simnorm_dim),
      log_std_min(view.log_std_min),
      log_std_max(view.log_std_max),
      threshold(static_cast<std::uint32_t>(std::lround(s.dropout * 65536.0))),
      keep_scale(static_cast<float>(65536.0 / (65536.0 - threshold))),
      encoder(make_stack(view.encoder, exact)),
      dynamics(make_stack(view.dynamics, table)),
      policy(make_stack(view.policy, table)),
      work(static_cast<std::size_t>(pool.threads())) {
  for (std::size_t k = 0; k < view.critics.size(); ++k) {
    critics.push_back(make_stack(view.critics[k], table, &exact));
    targets.push_back(make_stack(view.targets[k], table, &exact));
  }
  if (!view.termination.empty()) termination = make_stack(view.termination, table, &exact);
  ld_z = detail::round_up(latent_dim, table.panel);
  ld_a = detail::round_up(action_dim, table.panel);

  // What each backward pass goes down to: latents, or the layer before.
  const auto keep_backward = [&](Stack& stack, bool to_latents) {
    for (std::size_t i = to_latents ? 0 : 1; i < stack.layers.size(); ++i) {
      stack.layers[i].keep_backward(0, 0, i == 0 ? latent_dim : stack.layers[i].in);
    }
  };
  keep_backward(encoder, false);
  keep_backward(dynamics, true);
  keep_backward(policy, false);
  keep_backward(termination, true);
  for (Stack& critic : critics) {
    keep_backward(critic, true);
    Layer& first = critic.layers.front();
    first.keep_backward(1, latent_dim, latent_dim + action_dim);
    if (penalised()) first.keep_backward(2, 0, latent_dim + action_dim);
    for (Layer& layer : critic.layers) layer.repack = true;
  }

  model_stacks = {&encoder, &dynamics};
  for (Stack& critic : critics) model_stacks.push_back(&critic);
  if (!termination.layers.empty()) model_stacks.push_back(&termination);
  const auto list = [](Stack& stack, Part& part, const Stack* follows = nullptr) {
    for (std::size_t l = 0; l < stack.layers.size(); ++l) {
      const Layer* other = follows != nullptr ? &follows->layers[l] : nullptr;
      for (Index i = 0; i < stack.layers[l].strips; ++i) {
        part.strips.push_back({&stack.layers[l], i, other});
      }
    }
    for (Neuron& neuron : stack.neuron) part.neurons.push_back(&neuron);
  };
  for (Stack* stack : model_stacks) list(*stack, model);
  list(policy, policy_part);
  for (std::size_t k = 0; k < targets.size(); ++k) list(targets[k], target, &critics[k]);
  const auto append = [](Part& to, const Part& from) {
    to.strips.insert(to.strips.end(), from.strips.begin(), from.strips.end());
    to.neurons.insert(to.neurons.end(), from.neurons.begin(), from.neurons.end());
  };
  append(last, target);
  append(last, policy_part);
  append(all, model);
  append(all, last);
}

void Learner::State::resize(Index new_columns, Index new_experts) {
  if (columns == new_columns && experts == new_experts) return;
  columns = 0;  // until all is there
  const Index h = settings.horizon, behaviour = new_columns - new_experts;
  const Index count = (new_columns + detail::kBlockColumns - 1) / detail::kBlockColumns;
  Index at_start = 0, at_data = 0, at_steps = 0, at_value = 0, at_penalty = 0, widest_block = 0;
  blocks.clear();
  for (Index i = 0; i < count; ++i) {
    Block b{};
    b.number = i;
    b.first_expert = new_experts * i / count;
    b.experts = new_experts * (i + 1) / count - b.first_expert;
    b.first_behaviour = behaviour * i / count;
    b.columns = b.experts + behaviour * (i + 1) / count - b.first_behaviour;
    b.start = at_start;
    b.data = at_data;
    b.steps = at_steps;
    b.value = at_value;
    b.penalty = at_penalty;
    at_start += even(b.columns);
    at_data += even(h * b.columns);
    at_steps += even((h + 1) * b.columns);
    at_value += even(value_rows(b));
    at_penalty += even(h * b.experts);
    widest_block = std::max(widest_block, b.columns);
    blocks.push_back(b);
  }
  sums.assign(blocks.size(), {});
  starts.resize(static_cast<std::size_t>(new_columns));

  // Traces, and the parts that each weight's gradient is the sum of.
  const Index width = latent_dim + action_dim;
  const auto add_parts = [](Stack& stack, const StackTrace& trace, const Operand& in, Index rows) {
    for (std::size_t i = 0; i < stack.layers.size(); ++i) {
      stack.layers[i].parts.push_back({&trace[i].grad, i == 0 ? &in : &trace[i - 1].out, rows});
    }
  };
  const auto traced = [&](Stack& stack, StackTrace& trace, const Operand& in, Index rows,
                          bool dropout = false) {
    reserve(trace, stack, exact, rows, dropout);
    add_parts(stack, trace, in, rows);
  };
  for (Stack* stack : model_stacks) {
    for (Layer& layer : stack->layers) layer.parts.clear();
  }
  for (Layer& layer : policy.layers) layer.parts.clear();
  start.reserve(exact, at_start, obs_dim);
  joint.reserve(table, at_data, width);
  step_joint.reserve(table, at_steps, width);
  detail::ensure(z, at_steps * ld_z);
  traced(encoder, encoder_trace, start, at_start);
  traced(dynamics, dynamics_trace, joint, at_data);
  traced(policy, policy_trace, step_joint, at_steps);
  critic_trace.resize(critics.size());
  for (std::size_t k = 0; k < critics.size(); ++k) {
    traced(critics[k], critic_trace[k], joint, at_data, drops());
  }
  if (!td()) {
    value_joint.reserve(table, at_value, width);
    value_trace.resize(2);
    for (StackTrace& trace : value_trace) {
      reserve(trace, critics[0], exact, at_value, always_drops());
    }
  }
  if (!termination.layers.empty()) {
    next.reserve(table, at_data, latent_dim);
    traced(termination, termination_trace, next, at_data);
  }
  if (penalised()) {
    penalty_joint.reserve(table, at_penalty, width);
    penalty_trace.resize(critics.size());
    penalty_first.resize(critics.size());
    penalty_second.resize(critics.size());
    for (std::size_t k = 0; k < critics.size(); ++k) {
      Stack& critic = critics[k];
      traced(critic, penalty_trace[k], penalty_joint, at_penalty, always_drops());
      penalty_first[k].resize(critic.layers.size());
      penalty_second[k].resize(critic.layers.size());
      for (std::size_t i = 0; i < critic.layers.size(); ++i) {
        penalty_first[k][i].reserve(table, at_penalty, critic.layers[i].out);
        penalty_second[k][i].reserve(table, at_penalty, critic.layers[i].in);
        critic.layers[i].parts.push_back({&penalty_first[k][i], &penalty_second[k][i], at_penalty});
      }
    }
  }
  for (Stack* stack : model_stacks) {
    for (Layer& layer : stack->layers) layer.reserve_gradients(count);
    for (Neuron& neuron : stack->neuron) neuron.reserve_gradients(count);
  }
  for (Layer& layer : policy.layers) layer.reserve_gradients(count);

  const Index rows = (h + 1) * widest_block;
  Index widest = detail::round_up(width, table.panel);
  for (const Strip& s : all.strips) {
    widest = std::max({widest, s.layer->padded, s.layer->padded_in});
  }
  for (Work& w : work) {
    for (auto* buffer :
         {&w.pre, &w.gradient, &w.other, &w.z_gradient, &w.encoded, &w.mask, &w.obs, &w.r_bar}) {
      detail::ensure(*buffer, rows * widest);
    }
    for (auto* buffer : {&w.noise, &w.action, &w.data_action}) {
      detail::ensure(*buffer, rows * ld_a);
    }
    detail::ensure(w.kept, rows * 3 * ld_a);
    for (auto* buffer : {&w.log_prob, &w.q[0], &w.q[1], &w.dq[0], &w.dq[1], &w.backup,
                         &w.entropy_weight, &w.scale, &w.ones}) {
      detail::ensure(*buffer, rows);
    }
    w.chosen.resize(static_cast<std::size_t>(2 * rows));
    for (auto& hidden : w.hidden) detail::ensure(hidden, rows * widest);
    w.in.reserve(table, rows, width);
    for (StackTrace& trace : w.pair) reserve(trace, critics[0], exact, rows, always_drops());
    if (!penalised()) continue;
    w.penalty.resize(critics[0].layers.size());
    for (Work::Penalty& p : w.penalty) {
      for (auto* buffer : {&p.c, &p.u_bar, &p.x_bar}) detail::ensure(*buffer, rows * widest);
      detail::ensure(p.scale_bar, rows);
    }
  }
  columns = new_columns;
  experts = new_experts;
}

UpdateMetrics Learner::State::run(Source source, Index new_columns, std::uint64_t update,
                                  std::uint64_t model_steps, std::uint64_t policy_steps) {
  resize(new_columns, source.experts);
  const DrawKey key(seed, update);
  Index pair[2], policy_pair[2];
  const auto members = static_cast<Index>(critics.size());
  key.pair(detail::kPair, members, pair);
  key.pair(detail::kPolicyPair, members, policy_pair);
  const auto blocks_n = static_cast<Index>(blocks.size());

  // Tasks of a part's layers, strip by strip, and one for its neurons.
  const auto each = [this](Part& part, auto&& on_strip, auto&& on_neurons) {
    const auto strips = static_cast<Index>(part.strips.size());
    pool.run(strips + 1, [&](Index task, int) {
      if (task < strips) {
        const Strip& strip = part.strips[static_cast<std::size_t>(task)];
        on_strip(*strip.layer, strip.number, strip.follows);
      } else {
        for (Neuron* neuron : part.neurons) on_neurons(*neuron);
      }
    });
  };
  const auto gather = [blocks_n](Layer& layer, Index strip, const Layer*) {
    layer.gather_gradients(strip, blocks_n);
  };
  const auto norm = [](const Part& part, double neurons) {
    double total = neurons;
    for (const Strip& strip : part.strips) {
      total += strip.layer->squares[static_cast<std::size_t>(strip.number)];
    }
    return std::sqrt(total);
  };

  each(
      all, [](Layer& layer, Index strip, const Layer*) { layer.pack(strip); },
      [](Neuron& neuron) { neuron.pack(); });
  // V's critics differ from update to update.
  if (!td()) {
    for (std::size_t i = 0; i < 2; ++i) {
      Stack& critic = critics[static_cast<std::size_t>(pair[i])];
      for (std::size_t l = 0; l < critic.layers.size(); ++l) {
        critic.layers[l].extra = {&value_trace[i][l].grad,
                                  l == 0 ? &value_joint : &value_trace[i][l - 1].out,
                                  blocks.back().value + even(value_rows(blocks.back()))};
      }
    }
  }
  pool.run(blocks_n, [&](Index i, int thread) {
    model_block(blocks[static_cast<std::size_t>(i)], source, key, pair,
                work[static_cast<std::size_t>(thread)]);
  });
  double neurons = 0;
  each(model, gather, [&](Neuron& neuron) { neurons += neuron.gather_gradients(blocks_n); });
  for (Stack& critic : critics) {
    for (Layer& layer : critic.layers) layer.extra = {};
  }
  const double model_norm = norm(model, neurons);

  Sums total = sum_of(sums);
  UpdateMetrics m{};
  const double rows = static_cast<double>(settings.horizon * columns);
  const double expert_rows = static_cast<double>(settings.horizon * experts);
  const double q_members = static_cast<double>(members);
  m.consistency = total.consistency;
  m.q_behaviour = total.q_behaviour / ((rows - expert_rows) * q_members);
  m.q_expert = td() ? kNaN : total.q_expert / (expert_rows * q_members);
  m.target_value = total.target / rows;
  m.reward_expert = td() ? kNaN : total.reward_expert / (expert_rows * q_members);
  m.reward_behaviour = td() ? kNaN : total.reward_behaviour / ((rows - expert_rows) * q_members);
  m.value_term = td() ? kNaN : total.value;
  m.gradient_penalty = penalised() ? total.penalty : kNaN;
  m.critic_loss = total.critic + (penalised() ? settings.c_gp * total.penalty : 0.0);
  const bool ends = !termination.layers.empty();
  m.termination_loss = ends ? total.termination : kNaN;
  m.termination_recall = ends ? total.found / total.ends : kNaN;
  m.termination_precision = ends ? total.found / total.claimed : kNaN;
  m.model_grad_norm = model_norm;
  m.policy_loss = m.entropy = m.q_policy = m.policy_grad_norm = m.cloning_error = kNaN;
  const double loss = settings.c_cons * m.consistency + settings.c_iq * m.critic_loss +
                      (ends ? settings.c_termination * m.termination_loss : 0.0);
  m.model_skipped = m.policy_skipped = !std::isfinite(loss) || !std::isfinite(model_norm);
  if (m.model_skipped) return m;

  const Group base = group(settings, settings.lr, model_norm, model_steps);
  Group slow = base;
  slow.step.rate *= settings.encoder_lr_scale;
  const Layer *first = encoder.layers.data(), *end = first + encoder.layers.size();
  each(
      model,
      [&](Layer& layer, Index strip, const Layer*) {
        const bool encodes = &layer >= first && &layer < end;
        layer.step(strip, encodes ? slow : base);
        if (layer.repack) layer.pack(strip);
      },
      [&](Neuron& neuron) {
        neuron.step(base);
        neuron.pack();
      });

  const double cloning = clones() ? settings.c_bc * (1 + std::abs(m.q_expert)) : 0.0;
  pool.run(blocks_n, [&](Index i, int thread) {
    policy_block(blocks[static_cast<std::size_t>(i)], source, key, policy_pair, cloning,
                 work[static_cast<std::size_t>(thread)]);
  });
  each(policy_part, gather, [](Neuron&) {});
  total = sum_of(sums);
  const double policy_norm = norm(policy_part, 0);
  const double step_rows = static_cast<double>((settings.horizon + 1) * columns);
  m.policy_loss = total.policy + cloning * total.cloning;
  if (clones()) m.cloning_error = total.cloning;
  m.entropy = -total.log_prob / step_rows;
  m.q_policy = total.q_policy / step_rows;
  m.policy_grad_norm = policy_norm;
  m.policy_skipped = !std::isfinite(m.policy_loss) || !std::isfinite(policy_norm);

  const Group policy_group = group(settings, settings.lr, policy_norm, policy_steps);
  Index number = 0;
  each(
      last,
      [&](Layer& layer, Index strip, const Layer* follows) {
        if (follows != nullptr) {
          layer.follow(strip, *follows, settings.tau);
        } else if (!m.policy_skipped) {
          layer.step(strip, policy_group);
        }
      },
      [&](Neuron& neuron) {  // of targets, one after the other
        neuron.follow(critics[static_cast<std::size_t>(number++)].neuron[0], settings.tau);
      });
  return m;
}

Learner::Learner(const LearnerView& view, const LearnerSettings& settings, std::uint64_t seed,
                 Isa isa) {
  check(settings);
  check(view);
  state_ = std::make_unique<State>(view, settings, seed, isa);
}
Learner::~Learner() = default;
Learner::Learner(Learner&&) noexcept = default;
Learner& Learner::operator=(Learner&&) noexcept = default;

namespace {

void check_columns(const LearnerSettings& s, Index columns, Index experts) {
  const auto refuse = [&](const std::string& expected) {
    throw std::invalid_argument("a batch must have " + expected + ", got " +
                                std::to_string(columns) + " columns, " + std::to_string(experts) +
                                " of them demonstrations");
  };
  if (columns < 1 || experts < 0 || experts > columns) {
    refuse("columns, some of them demonstrations");
  }
  if (s.objective == Objective::td) {
    if (experts != 0) refuse("no demonstrations for the objective td");
    return;
  }
  if (experts < 1 || experts == columns) refuse("demonstrations and behaviour");
  if (s.c_gp > 0 && 2 * experts != columns) {
    refuse("as many demonstrations as behaviour for the gradient penalty");
  }
}

// What a batch, or a replay, points to; `reward` only where it is read.
template <class View>
void check_pointers(const LearnerSettings& s, const char* what, const View& view) {
  const auto need = [&](const char* name, const float* pointer) {
    if (pointer != nullptr) return;
    throw std::invalid_argument(std::string(what) + " needs " + name + ", got null");
  };
  need("obs", view.obs);
  need("action", view.action);
  need("terminated", view.terminated);
  if (s.objective == Objective::td) need("reward", view.reward);
}

void draw_slices(const DrawKey& key, bool experts, const ReplayView& replay, Index horizon,
                 Index batch, std::int64_t* rows) {
  if (replay.slices < 1 || replay.starts == nullptr) {
    throw std::invalid_argument("the replay holds no slice of " + std::to_string(horizon) +
                                " steps");
  }
  const auto stream = experts ? detail::kExpertSlices : detail::kBehaviourSlices;
  for (Index i = 0; i < batch; ++i) {
    rows[i] = replay.starts[key.below(stream, i, replay.slices)];
    if (rows[i] < 0 || rows[i] + horizon >= replay.rows) {
      throw std::invalid_argument(
          "a slice from row " + std::to_string(rows[i]) + " on, " + std::to_string(horizon) +
          " steps long, lies beyond the replay's " + std::to_string(replay.rows) + " rows");
    }
  }
}

}  // namespace

UpdateMetrics Learner::learn(const ReplayView* experts, const ReplayView& behaviour,
                             std::ptrdiff_t batch, std::uint64_t update, std::uint64_t model_steps,
                             std::uint64_t policy_steps) {
  State& s = *state_;
  const detail::ExclusiveCall call(s.calls, s.mutex);
  const Index demonstrations = experts != nullptr ? batch : 0;
  check_columns(s.settings, batch + demonstrations, demonstrations);
  if (experts != nullptr) check_pointers(s.settings, "the replay of demonstrations", *experts);
  check_pointers(s.settings, "the replay of behaviour", behaviour);
  s.resize(batch + demonstrations, demonstrations);
  const DrawKey key(s.seed, update);
  if (experts != nullptr) {
    draw_slices(key, true, *experts, s.settings.horizon, batch, s.starts.data());
  }
  draw_slices(key, false, behaviour, s.settings.horizon, batch, s.starts.data() + demonstrations);
  const Source source{nullptr,   {experts, &behaviour}, s.starts.data(), demonstrations,
                      s.obs_dim, s.action_dim};
  return s.run(source, batch + demonstrations, update, model_steps, policy_steps);
}

UpdateMetrics Learner::update(const BatchView& batch, std::uint64_t update,
                              std::uint64_t model_steps, std::uint64_t policy_steps) {
  State& s = *state_;
  const detail::ExclusiveCall call(s.calls, s.mutex);
  check_columns(s.settings, batch.columns, batch.experts);
  check_pointers(s.settings, "a batch", batch);
  const Source source{&batch, {nullptr, nullptr}, nullptr, batch.experts, s.obs_dim, s.action_dim};
  return s.run(source, batch.columns, update, model_steps, policy_steps);
}

bool Learner::forked_while_busy() const noexcept {
  return state_->pool.forked() && state_->calls != 0;
}

void Learner::draws(std::uint64_t update, std::ptrdiff_t columns, std::ptrdiff_t experts,
                    UpdateDraws& draws) const {
  const State& s = *state_;
  check_columns(s.settings, columns, experts);
  const DrawKey key(s.seed, update);
  const Index h = s.settings.horizon, members = num_critics();
  const bool difference = s.settings.objective == Objective::v_diff;
  const auto normal = [&](detail::Stream stream, Index rows, float* out) {
    if (out == nullptr) return;
    s.draw.fill_normal(key.words, DrawKey::stream(stream), 0, 0, rows * s.action_dim, out);
  };
  const auto keep = [&](detail::Stream stream, Index problems, Index rows, float* out) {
    if (out == nullptr) return;
    for (Index p = 0; p < problems; ++p) {
      s.exact.fill_dropout(key.words, DrawKey::stream(stream), static_cast<std::uint32_t>(p), 0,
                           rows * s.hidden_dim, s.threshold, s.keep_scale,
                           out + p * rows * s.hidden_dim);
    }
  };
  normal(detail::kTarget, h * columns, draws.target);
  normal(detail::kInitial, (difference ? h : 1) * columns, draws.initial);
  normal(detail::kPolicyNoise, (h + 1) * columns, draws.policy);
  keep(detail::kKeep, members, h * columns, draws.keep);
  keep(detail::kKeepTarget, 2, h * columns, draws.keep_target);
  keep(detail::kKeepValue, 2, difference ? h * (columns - experts) : experts, draws.keep_value);
  keep(detail::kKeepPenalty, members, h * experts, draws.keep_penalty);
  keep(detail::kKeepPolicy, 2, (h + 1) * columns, draws.keep_policy);
  if (draws.mix != nullptr) {
    for (Index i = 0; i < h * experts; ++i) draws.mix[i] = key.uniform(detail::kMix, i);
  }
  key.pair(detail::kPair, members, draws.pair);
  key.pair(detail::kPolicyPair, members, draws.policy_pair);
}

void Learner::slices(std::uint64_t update, bool experts, const ReplayView& replay,
                     std::ptrdiff_t batch, std::int64_t* rows) const {
  draw_slices(DrawKey(state_->seed, update), experts, replay, state_->settings.horizon, batch,
              rows);
}

std::vector<LearnerGradient> Learner::gradients() const {
  std::vector<LearnerGradient> all;
  if (state_->columns == 0) return all;
  const auto add = [&](const Stack& stack) {
    for (const Layer& layer : stack.layers) {
      all.push_back({layer.weight_gradient.data(), layer.out, layer.in, layer.padded_in});
      for (Index v = 0; v < (layer.normed() ? 3 : 1); ++v) {
        all.push_back({layer.vector_gradients.data() + v * layer.padded, 1, layer.out, 0});
      }
    }
    for (const Neuron& neuron : stack.neuron) {
      all.push_back({neuron.gradient(), 1, neuron.in, 0});
      all.push_back({neuron.gradient() + neuron.padded, 1, 1, 0});
    }
  };
  for (const Stack* stack : state_->model_stacks) add(*stack);
  add(state_->policy);
  return all;
}

const LearnerSettings& Learner::settings() const noexcept { return state_->settings; }
Isa Learner::isa() const noexcept { return state_->isa; }
std::ptrdiff_t Learner::obs_dim() const noexcept { return state_->obs_dim; }
std::ptrdiff_t Learner::action_dim() const noexcept { return state_->action_dim; }
std::ptrdiff_t Learner::hidden_dim() const noexcept { return state_->hidden_dim; }
std::ptrdiff_t Learner::num_critics() const noexcept {
  return static_cast<std::ptrdiff_t>(state_->critics.size());
}

}  // namespace iqmpc
