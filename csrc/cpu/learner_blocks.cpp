// Forward and backward through both losses, for one block of a batch's columns. What is computed,
// line by line, is iqmpc/losses.py; gradients are by hand.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "common/smaller.hpp"
#include "cpu/learner_state.hpp"

namespace iqmpc {

using detail::Block;
using detail::DrawKey;
using detail::Index;
using detail::Layer;
using detail::LearnTable;
using detail::Neuron;
using detail::Operand;
using detail::Source;
using detail::Stack;
using detail::StackTrace;
using detail::Stream;
using detail::Sums;
using detail::Trace;
using detail::Unit;
using detail::Work;

namespace {

// The smaller of two critics, NaN where either is; and each one's share of its gradient, which
// equals divide (as torch's amin has it: a new model's critics are all zero).
struct Smaller {
  Smaller(float a, float b) : value(smaller(a, b)), first(a < b ? 1.0f : a == b ? 0.5f : 0.0f) {}
  float value, first;
};

void interleave(StackTrace& trace, Index first, Index rows, Index hidden) {
  for (std::size_t i = 0; i < trace.size(); ++i) {
    trace[i].grad.interleave(first, rows);
    // The last hidden layer's output, which a neuron reads, is in floats that no product takes.
    if (static_cast<Index>(i) < hidden && i + 1 < trace.size()) {
      trace[i].out.interleave(first, rows);
    }
  }
}

}  // namespace

// One block's way through the losses.
class Learner::State::Pass {
 public:
  Pass(State& state, const Block& block, const DrawKey& key, Work& work)
      : s(state),
        set(state.settings),
        b(block),
        key(key),
        w(work),
        k(state.table),
        exact(state.exact),
        horizon(set.horizon),
        columns(block.columns),
        experts(block.experts),
        ld_z(s.ld_z),
        ld_a(s.ld_a) {}

  Sums sums;

  // z_0 = h(s_0), with a trace.
  void encode(const Source& source) {
    for (Index i = 0; i < columns; ++i) {
      std::memcpy(s.start.row(b.start + i), source.obs(0, column(i)), bytes(s.obs_dim));
    }
    hidden_traced(s.encoder, s.encoder_trace, s.start.row(b.start), s.start.ld, b.start, columns);
    simnorm_traced(s.encoder, s.encoder_trace, b.start, z(0));
  }

  // ẑ_{t+1} = h(s_{t+1}) into w.encoded, and γ (1 - d) V̄(ẑ_{t+1}) into w.backup: [H, columns].
  void targets(const Source& source, const Index* pair) {
    const Index rows = horizon * columns, ld = s.encoder.layers.front().padded_in;
    for (Index t = 0; t < horizon; ++t) {
      for (Index i = 0; i < columns; ++i) {
        std::memcpy(w.obs.data() + (t * columns + i) * ld, source.obs(t + 1, column(i)),
                    bytes(s.obs_dim));
      }
    }
    const Layer& last = s.encoder.layers.back();
    const auto [x, ldx] =
        hidden_only(s.encoder, reinterpret_cast<const Unit*>(w.obs.data()), ld, rows, nullptr);
    last.forward(x, ldx, rows, w.pre.data(), last.padded);
    exact.norm_simnorm(w.pre.data(), last.padded, rows, last.norm(), s.simnorm_dim, w.scale.data(),
                       w.encoded.data(), ld_z);

    k.to_operand(w.encoded.data(), ld_z, rows, s.latent_dim, w.in.row(0), w.in.ld);
    for (Index t = 0; t < horizon; ++t) {
      draw_columns(detail::kTarget, t, w.noise.data() + t * columns * s.action_dim);
    }
    sample(w.in.row(0), w.in.ld, rows, w.log_prob.data(), nullptr);
    join(w.encoded.data(), w.action.data(), rows, w.in.row(0), w.in.ld);
    for (int i = 0; i < 2; ++i) {
      Stack& target = s.targets[static_cast<std::size_t>(pair[i])];
      const float* mask = nullptr;
      if (s.always_drops()) {
        drop_columns(detail::kKeepTarget, i, horizon, w.mask.data());
        mask = w.mask.data();
      }
      const auto [h, ldh] = hidden_only(target, w.in.row(0), w.in.ld, rows, mask);
      neuron(target, reinterpret_cast<const float*>(h), ldh, rows, w.q[i].data());
    }
    for (Index t = 0; t < horizon; ++t) {
      for (Index i = 0; i < columns; ++i) {
        const Index r = t * columns + i;
        const float v = Smaller(w.q[0].data()[r], w.q[1].data()[r]).value -
                        set.entropy_coef * w.log_prob.data()[r];
        sums.target += v;
        w.backup.data()[r] = set.discount * (1 - source.terminated(t, column(i))) * v;
      }
    }
  }

  // z_{t+1} = d(z_t, a_t), and the consistency loss.
  void rollout(const Source& source) {
    for (Index t = 0; t < horizon; ++t) {
      float* actions = w.data_action.data() + t * columns * ld_a;
      for (Index i = 0; i < columns; ++i) {
        std::memcpy(actions + i * ld_a, source.action(t, column(i)), bytes(s.action_dim));
      }
      const Index row = b.data + t * columns;
      join(z(t), actions, columns, s.joint.row(row), s.joint.ld);
      hidden_traced(s.dynamics, s.dynamics_trace, s.joint.row(row), s.joint.ld, row, columns);
      simnorm_traced(s.dynamics, s.dynamics_trace, row, z(t + 1));
    }
    std::fill_n(w.z_gradient.data(), (horizon + 1) * columns * ld_z, 0.0f);
    const double size = static_cast<double>(s.columns * s.latent_dim * horizon);
    double weight = 1;
    for (Index t = 0; t < horizon; ++t, weight *= set.rho) {
      const double error = exact.squared_error(
          z(t + 1), w.encoded.data() + t * columns * ld_z, ld_z, columns, ld_z,
          static_cast<float>(2 * set.c_cons * weight / size), z_gradient(t + 1));
      sums.consistency += weight * error / size;
    }
  }

  // Q_k on the data: its loss, and dL/dz.
  void critic(const Source& source, Index number) {
    Stack& critic = s.critics[static_cast<std::size_t>(number)];
    StackTrace& trace = s.critic_trace[static_cast<std::size_t>(number)];
    const Index rows = horizon * columns;
    if (s.drops()) drop_columns(detail::kKeep, number, horizon, trace[0].mask_row(b.data));
    hidden_traced(critic, trace, s.joint.row(b.data), s.joint.ld, b.data, rows);
    float *q = w.q[0].data(), *dq = w.dq[0].data();
    traced_neuron(critic, trace, b.data, rows, q);
    const double members = static_cast<double>(horizon) * static_cast<double>(s.critics.size());
    const double all = static_cast<double>(s.columns), demonstrations = double(s.experts);
    double weight = 1 / members;
    for (Index t = 0; t < horizon; ++t, weight *= set.rho) {
      for (Index i = 0; i < columns; ++i) {
        const Index r = t * columns + i;
        const double residual = q[r] - w.backup.data()[r];
        const bool expert = i < experts;
        (expert ? sums.q_expert : sums.q_behaviour) += q[r];
        (expert ? sums.reward_expert : sums.reward_behaviour) += residual;
        double loss, slope;
        if (s.td()) {
          const double error = residual - source.reward(t, column(i));
          loss = error * error / all;
          slope = 2 * error / all;
        } else {
          loss = residual * residual / (4 * set.alpha * all);
          slope = residual / (2 * set.alpha * all);
          if (expert) {
            loss -= residual / demonstrations;
            slope -= 1 / demonstrations;
          }
        }
        sums.critic += weight * loss;
        dq[r] = static_cast<float>(set.c_iq * weight * slope);
      }
    }
    traced_backward(critic, trace, b.data, rows, dq);
    const Layer& first = critic.layers.front();
    first.backward(0, trace[0].grad.row(b.data), trace[0].grad.ld, rows, w.other.data(), ld_z);
    exact.add_rows(w.other.data(), ld_z, rows, ld_z, z_gradient(0), ld_z);
  }

  // The value term: V(z_0) of the experts, or V(z_t) of behaviour for v_diff.
  void value(const Index* pair) {
    const bool difference = set.objective == Objective::v_diff;
    const Index each = difference ? columns - experts : experts;
    const Index steps = difference ? horizon : 1, rows = steps * each;
    if (rows == 0) return;
    const Index skip = difference ? experts : 0;
    const auto z_row = [&](Index r) { return r / each * columns + skip + r % each; };
    Operand& joint = s.value_joint;
    for (Index r = 0; r < rows; ++r) {
      k.to_operand(z(0) + z_row(r) * ld_z, ld_z, 1, s.latent_dim, joint.row(b.value + r), joint.ld);
    }
    const Index first = difference ? s.experts + b.first_behaviour : b.first_expert;
    for (Index t = 0; t < steps; ++t) {
      draw_normal(detail::kInitial, t * s.columns + first, each,
                  w.noise.data() + t * each * s.action_dim);
    }
    sample(joint.row(b.value), joint.ld, rows, w.log_prob.data(), nullptr);
    for (Index r = 0; r < rows; ++r) {
      join(z(0) + z_row(r) * ld_z, w.action.data() + r * ld_a, 1, joint.row(b.value + r), joint.ld);
    }
    for (int i = 0; i < 2; ++i) {
      Stack& critic = s.critics[static_cast<std::size_t>(pair[i])];
      StackTrace& trace = s.value_trace[static_cast<std::size_t>(i)];
      if (s.always_drops()) {
        // Numbered by the columns that V is taken of.
        const Index of = difference ? s.columns - s.experts : s.experts;
        const Index from = difference ? b.first_behaviour : b.first_expert;
        for (Index t = 0; t < steps; ++t) {
          drop(detail::kKeepValue, i, t * of + from, each, trace[0].mask_row(b.value + t * each));
        }
      }
      hidden_traced(critic, trace, joint.row(b.value), joint.ld, b.value, rows);
      traced_neuron(critic, trace, b.value, rows, w.q[i].data());
    }
    double weights = 0, weight = 1;
    for (Index t = 0; t < horizon; ++t, weight *= set.rho) weights += weight;
    weight = difference ? 1.0 : weights;
    for (Index t = 0; t < steps; ++t, weight *= set.rho) {
      const double slope = weight / static_cast<double>(horizon) *
                           (difference ? 1.0 / static_cast<double>(s.columns - s.experts)
                                       : (1 - double(set.discount)) / double(s.experts));
      for (Index i = 0; i < each; ++i) {
        const Index r = t * each + i;
        const Smaller q(w.q[0].data()[r], w.q[1].data()[r]);
        double v = q.value - set.entropy_coef * w.log_prob.data()[r];
        if (difference) v -= w.backup.data()[z_row(r)];
        sums.value += difference ? v / static_cast<double>((s.columns - s.experts) * horizon)
                                 : v * (1 - double(set.discount)) / double(s.experts);
        sums.critic += slope * v;
        w.dq[0].data()[r] = static_cast<float>(set.c_iq * slope) * q.first;
        w.dq[1].data()[r] = static_cast<float>(set.c_iq * slope) * (1 - q.first);
      }
    }
    for (int i = 0; i < 2; ++i) {
      Stack& critic = s.critics[static_cast<std::size_t>(pair[i])];
      StackTrace& trace = s.value_trace[static_cast<std::size_t>(i)];
      traced_backward(critic, trace, b.value, rows, w.dq[i].data());
      critic.layers.front().backward(0, trace[0].grad.row(b.value), trace[0].grad.ld, rows,
                                     w.other.data(), ld_z);
      for (Index r = 0; r < rows; ++r) {
        exact.add_rows(w.other.data() + r * ld_z, ld_z, 1, ld_z,
                       w.z_gradient.data() + z_row(r) * ld_z, ld_z);
      }
    }
    joint.interleave(b.value, rows);
    for (StackTrace& trace : s.value_trace) {
      interleave(trace, b.value, rows, s.critics[0].hidden());
    }
  }

  // mean (‖∇_(z,a) Q_k‖ - 1)² between the sides, by reverse mode twice. First Q's gradient,
  //   c_L = w,  r_l = J_l(γ_l c_l mish'(u_l)),  c_{l-1} = r_l W_l,  g = r_1 W_1
  // (J_l the Jacobian of LayerNorm, symmetric), then the gradient of a function of g by the
  // weights: up the same way with bars, r̄_l = c̄_{l-1} W_l^T from c̄_0 = ḡ, and down through the
  // forward pass with what the bars leave at each layer.
  void penalty(Index number) {
    Stack& critic = s.critics[static_cast<std::size_t>(number)];
    StackTrace& trace = s.penalty_trace[static_cast<std::size_t>(number)];
    std::vector<Operand>& r = s.penalty_first[static_cast<std::size_t>(number)];
    std::vector<Operand>& c_bar = s.penalty_second[static_cast<std::size_t>(number)];
    const Index rows = horizon * experts, hidden = critic.hidden(), at = b.penalty;
    if (s.always_drops()) {
      for (Index t = 0; t < horizon; ++t) {
        drop(detail::kKeepPenalty, number, t * s.experts + b.first_expert, experts,
             trace[0].mask_row(at + t * experts));
      }
    }
    hidden_traced(critic, trace, s.penalty_joint.row(at), s.penalty_joint.ld, at, rows);
    const Neuron& last = critic.neuron[0];
    std::fill_n(w.ones.data(), rows, 1.0f);
    exact.outer(w.ones.data(), nullptr, rows, last.weight(), last.padded,
                w.penalty[static_cast<std::size_t>(hidden - 1)].c.data(), last.padded);
    for (Index l = hidden; l-- > 0;) {
      Layer& layer = layer_of(critic, l);
      Operand& first = r[static_cast<std::size_t>(l)];
      layer.k->norm_mish_backward(w.penalty[static_cast<std::size_t>(l)].c.data(), layer.padded,
                                  rows, nullptr, trace_of(trace, l).mask_at(at),
                                  trace_of(trace, l).at(at), layer.norm(), first.row(at), first.ld,
                                  {nullptr, nullptr, nullptr});
      float* below = l > 0 ? w.penalty[static_cast<std::size_t>(l - 1)].c.data() : w.r_bar.data();
      const int range = l > 0 ? 0 : 2;
      layer.backward(range, first.row(at), first.ld, rows, below, layer.back_columns(range));
    }

    const Layer& bottom = critic.layers.front();
    const Index width = bottom.in, ld = bottom.back_columns(2);
    double weight =
        1 / (static_cast<double>(horizon * s.experts) * static_cast<double>(s.critics.size()));
    for (Index t = 0; t < horizon; ++t, weight *= set.rho) {
      for (Index i = 0; i < experts; ++i) {
        float* g = w.r_bar.data() + (t * experts + i) * ld;
        // As in the reference: a root whose gradient is infinite at 0 is cut off there.
        const double square = exact.sum_squares(g, width);
        const double norm = std::sqrt(square < 1e-12 ? 1e-12 : square);
        sums.penalty += weight * (norm - 1) * (norm - 1);
        const double slope =
            square < 1e-12 ? 0 : set.c_iq * set.c_gp * weight * 2 * (norm - 1) / norm;
        for (Index j = 0; j < width; ++j) g[j] *= static_cast<float>(slope);
      }
    }
    k.to_operand(w.r_bar.data(), ld, rows, width, c_bar[0].row(at), c_bar[0].ld);

    for (Index l = 0; l < hidden; ++l) {
      Layer& layer = layer_of(critic, l);
      Work::Penalty& p = w.penalty[static_cast<std::size_t>(l)];
      const Operand& below = c_bar[static_cast<std::size_t>(l)];
      layer.forward(below.row(at), below.ld, rows, w.r_bar.data(), layer.padded, false);
      const bool top = l + 1 == hidden;
      // The last c̄ is the gradient of the neuron's weights, row by row; only its sum is needed.
      const LearnTable& out = top ? exact : *layer_of(critic, l + 1).k;
      Unit* target = top ? w.hidden[0].data() : c_bar[static_cast<std::size_t>(l + 1)].row(at);
      const Index ld_out = top ? layer.padded : c_bar[static_cast<std::size_t>(l + 1)].ld;
      out.penalty_backward(w.r_bar.data(), p.c.data(), rows, trace_of(trace, l).mask_at(at),
                           trace_of(trace, l).at(at), layer.norm(), target, ld_out,
                           top ? critic.neuron[0].sums(b.number) : nullptr, p.u_bar.data(),
                           p.x_bar.data(), p.scale_bar.data(), layer.sums(b.number));
    }
    for (Index l = hidden; l-- > 0;) {
      Layer& layer = layer_of(critic, l);
      Work::Penalty& p = w.penalty[static_cast<std::size_t>(l)];
      Operand& grad = trace_of(trace, l).grad;
      layer.k->penalty_finish(l + 1 == hidden ? nullptr : w.gradient.data(), p.u_bar.data(),
                              p.x_bar.data(), p.scale_bar.data(), rows,
                              trace_of(trace, l).mask_at(at), trace_of(trace, l).at(at),
                              layer.norm(), grad.row(at), grad.ld, layer.sums(b.number));
      if (l > 0) {
        layer.backward(0, grad.row(at), grad.ld, rows, w.gradient.data(), layer.back_columns(0));
      }
    }
    interleave(trace, at, rows, hidden);
    for (Operand& operand : r) operand.interleave(at, rows);
    for (Operand& operand : c_bar) operand.interleave(at, rows);
  }

  // What the penalty is taken at: u (z, a) of an expert + (1 - u) that of its partner.
  void between() {
    const Index width = s.latent_dim + s.action_dim;
    float* row = w.other.data();
    for (Index t = 0; t < horizon; ++t) {
      for (Index i = 0; i < experts; ++i) {
        const float u = key.uniform(detail::kMix, t * s.experts + b.first_expert + i);
        const auto mix = [&](const float* p, Index ld, Index count, float* out) {
          const float* expert = p + (t * columns + i) * ld;
          const float* partner = p + (t * columns + experts + i) * ld;
          for (Index j = 0; j < count; ++j) out[j] = u * expert[j] + (1 - u) * partner[j];
        };
        mix(z(0), ld_z, s.latent_dim, row);
        mix(w.data_action.data(), ld_a, s.action_dim, row + s.latent_dim);
        k.to_operand(row, 0, 1, width, s.penalty_joint.row(b.penalty + t * experts + i),
                     s.penalty_joint.ld);
      }
    }
    s.penalty_joint.interleave(b.penalty, horizon * experts);
  }

  // The termination head on z_{t+1}.
  void ends(const Source& source) {
    Stack& head = s.termination;
    const Index rows = horizon * columns;
    k.to_operand(z(1), ld_z, rows, s.latent_dim, s.next.row(b.data), s.next.ld);
    hidden_traced(head, s.termination_trace, s.next.row(b.data), s.next.ld, b.data, rows);
    float *logit = w.q[0].data(), *slope = w.dq[0].data();
    traced_neuron(head, s.termination_trace, b.data, rows, logit);
    double weight = 1 / static_cast<double>(horizon * s.columns);
    for (Index t = 0; t < horizon; ++t, weight *= set.rho) {
      for (Index i = 0; i < columns; ++i) {
        const Index r = t * columns + i;
        const double x = logit[r], d = source.terminated(t, column(i));
        const double share = 1 / (1 + std::exp(-x));
        // ln(1 + e^-x) and ln(1 + e^x), without overflow
        const double off = std::log1p(std::exp(-std::abs(x))), up = off + (x > 0 ? x : 0);
        const double down = off + (x < 0 ? -x : 0);
        sums.termination += weight * (set.termination_weight * d * down + (1 - d) * up);
        slope[r] = static_cast<float>(set.c_termination * weight *
                                      ((1 - d) * share - set.termination_weight * d * (1 - share)));
        sums.ends += d;
        sums.claimed += x > 0;
        sums.found += x > 0 ? d : 0;
      }
    }
    traced_backward(head, s.termination_trace, b.data, rows, slope);
    head.layers.front().backward(0, s.termination_trace[0].grad.row(b.data),
                                 s.termination_trace[0].grad.ld, rows, w.other.data(), ld_z);
    exact.add_rows(w.other.data(), ld_z, rows, ld_z, z_gradient(1), ld_z);
    s.next.interleave(b.data, rows);
    interleave(s.termination_trace, b.data, rows, head.hidden());
  }

  // From dL/dz_t, which is in w.z_gradient, to dynamics and encoder.
  void unroll() {
    for (Index t = horizon; t-- > 0;) {
      const Index row = b.data + t * columns;
      simnorm_backward(s.dynamics, s.dynamics_trace, row, z(t + 1), z_gradient(t + 1));
      const Operand& grad = s.dynamics_trace[0].grad;
      s.dynamics.layers.front().backward(0, grad.row(row), grad.ld, columns, w.other.data(), ld_z);
      exact.add_rows(w.other.data(), ld_z, columns, ld_z, z_gradient(t), ld_z);
    }
    simnorm_backward(s.encoder, s.encoder_trace, b.start, z(0), z_gradient(0));
    const Index rows = horizon * columns;
    s.joint.interleave(b.data, rows);
    interleave(s.dynamics_trace, b.data, rows, s.dynamics.hidden());
    for (std::size_t n = 0; n < s.critics.size(); ++n) {
      interleave(s.critic_trace[n], b.data, rows, s.critics[n].hidden());
    }
  }

  // Adds to dL/da that of weight (1/H) Σ_{t<H} λ^t mean (a_t - what was demonstrated)².
  void imitate(const Source& source, double weight, float* da) {
    double share = 1 / static_cast<double>(horizon * s.experts * s.action_dim);
    for (Index t = 0; t < horizon; ++t, share *= set.rho) {
      for (Index i = 0; i < b.experts; ++i) {
        const Index row = (t * columns + i) * ld_a;
        const float* shown = source.action(t, b.first_expert + i);
        for (Index j = 0; j < s.action_dim; ++j) {
          const double error = w.action.data()[row + j] - shown[j];
          sums.cloning += share * error * error;
          da[row + j] += static_cast<float>(2 * weight * share * error);
        }
      }
    }
  }

  // The policy's loss: π on all latents, rated by critics that are fixed, and `cloning` times its
  // squared error on the demonstrations.
  void policy(const Index* pair, const Source& source, double cloning) {
    const Index rows = (horizon + 1) * columns;
    Operand& joint = s.step_joint;
    StackTrace& trace = s.policy_trace;
    Layer& head = s.policy.layers.back();
    k.to_operand(z(0), ld_z, rows, s.latent_dim, joint.row(b.steps), joint.ld);
    hidden_traced(s.policy, trace, joint.row(b.steps), joint.ld, b.steps, rows);
    const Trace& before = trace[trace.size() - 2];
    head.forward(before.out.row(b.steps), before.out.ld, rows, w.pre.data(), head.padded);
    for (Index t = 0; t <= horizon; ++t) {
      draw_columns(detail::kPolicyNoise, t, w.noise.data() + t * columns * s.action_dim);
    }
    exact.policy_sample(w.pre.data(), head.padded, rows, w.noise.data(), s.action_dim,
                        s.log_std_min, s.log_std_max, presquash(), w.action.data(), ld_a,
                        w.log_prob.data(), w.kept.data());
    join(z(0), w.action.data(), rows, joint.row(b.steps), joint.ld);

    for (int i = 0; i < 2; ++i) {
      Stack& critic = s.critics[static_cast<std::size_t>(pair[i])];
      if (s.always_drops()) {
        drop_columns(detail::kKeepPolicy, i, horizon + 1, w.pair[i][0].mask_row(0));
      }
      hidden_traced(critic, w.pair[i], joint.row(b.steps), joint.ld, 0, rows);
      traced_neuron(critic, w.pair[i], 0, rows, w.q[i].data());
    }
    Index count[2] = {0, 0};
    std::int32_t* chosen[2] = {w.chosen.data(), w.chosen.data() + rows};
    double weight = 1 / static_cast<double>((horizon + 1) * s.columns);
    for (Index t = 0; t <= horizon; ++t, weight *= set.rho) {
      for (Index i = 0; i < columns; ++i) {
        const Index r = t * columns + i;
        const Smaller q(w.q[0].data()[r], w.q[1].data()[r]);
        const double log_prob = w.log_prob.data()[r];
        sums.policy += weight * (set.entropy_coef * log_prob - q.value);
        sums.log_prob += log_prob;
        sums.q_policy += q.value;
        w.entropy_weight.data()[r] = static_cast<float>(weight * set.entropy_coef);
        const float shares[2] = {q.first, 1 - q.first};
        for (int j = 0; j < 2; ++j) {
          w.dq[j].data()[r] = -static_cast<float>(weight) * shares[j];
          if (shares[j] > 0) chosen[j][count[j]++] = static_cast<std::int32_t>(r);
        }
      }
    }
    // Back through the smaller critic of each row alone, from Q to its action.
    std::fill_n(w.encoded.data(), rows * ld_a, 0.0f);
    float* da = w.encoded.data();
    for (int i = 0; i < 2; ++i) {
      if (count[i] == 0) continue;
      Stack& critic = s.critics[static_cast<std::size_t>(pair[i])];
      const Neuron& last = critic.neuron[0];
      exact.outer(w.dq[i].data(), chosen[i], count[i], last.weight(), last.padded,
                  w.gradient.data(), last.padded);
      for (Index l = critic.hidden(); l-- > 0;) {
        Layer& layer = layer_of(critic, l);
        Trace& of = trace_of(w.pair[i], l);
        layer.k->norm_mish_backward(w.gradient.data(), layer.padded, count[i], chosen[i],
                                    of.mask_at(0), of.at(0), layer.norm(), w.hidden[0].data(),
                                    layer.padded / layer.k->step, {nullptr, nullptr, nullptr});
        const int range = l > 0 ? 0 : 1;
        layer.backward(range, w.hidden[0].data(), layer.padded / layer.k->step, count[i],
                       w.gradient.data(), layer.back_columns(range));
      }
      const Index ld = critic.layers.front().back_columns(1);
      for (Index r = 0; r < count[i]; ++r) {
        for (Index j = 0; j < s.action_dim; ++j) {
          da[chosen[i][r] * ld_a + j] += w.gradient.data()[r * ld + j];
        }
      }
    }
    if (s.clones()) imitate(source, cloning, da);
    float* g = w.pre.data();
    exact.policy_backward(da, ld_a, rows, w.action.data(), ld_a, w.kept.data(), s.action_dim,
                          presquash(), w.entropy_weight.data(), g, head.padded);
    std::fill_n(w.ones.data(), rows, 1.0f);
    exact.weighted_sum(g, head.padded, rows, w.ones.data(), head.padded, head.sums(b.number).bias);
    Operand& grad = trace.back().grad;
    k.to_operand(g, head.padded, rows, head.out, grad.row(b.steps), grad.ld);
    head.backward(0, grad.row(b.steps), grad.ld, rows, w.gradient.data(), head.back_columns(0));
    hidden_backward(s.policy, trace, b.steps, rows);
    joint.interleave(b.steps, rows);
    interleave(trace, b.steps, rows, s.policy.hidden());
  }

 private:
  static std::size_t bytes(Index count) { return static_cast<std::size_t>(count) * sizeof(float); }
  static Layer& layer_of(Stack& stack, Index l) {
    return stack.layers[static_cast<std::size_t>(l)];
  }
  static Trace& trace_of(StackTrace& trace, Index l) { return trace[static_cast<std::size_t>(l)]; }
  bool presquash() const { return set.entropy == Entropy::presquash; }

  // The batch's column of the block's i-th.
  Index column(Index i) const {
    return i < experts ? b.first_expert + i : s.experts + b.first_behaviour + i - experts;
  }
  float* z(Index t) const { return s.z.data() + (b.steps + t * columns) * ld_z; }
  float* z_gradient(Index t) const { return w.z_gradient.data() + t * columns * ld_z; }

  // (z, a) as operands.
  void join(const float* z, const float* action, Index rows, Unit* out, Index ld_out) {
    float* row = w.other.data();
    for (Index r = 0; r < rows; ++r) {
      std::memcpy(row, z + r * ld_z, bytes(s.latent_dim));
      std::memcpy(row + s.latent_dim, action + r * ld_a, bytes(s.action_dim));
      k.to_operand(row, 0, 1, s.latent_dim + s.action_dim, out + r * ld_out, ld_out);
    }
  }

  void draw_normal(Stream stream, Index first, Index rows, float* out) const {
    s.draw.fill_normal(key.words, DrawKey::stream(stream), 0, first * s.action_dim,
                       rows * s.action_dim, out);
  }
  // Of all of the block's columns, in its order, at step t of draws [.., N, A].
  void draw_columns(Stream stream, Index t, float* out) const {
    const Index row = t * s.columns;
    draw_normal(stream, row + b.first_expert, experts, out);
    draw_normal(stream, row + s.experts + b.first_behaviour, columns - experts,
                out + experts * s.action_dim);
  }
  void drop(Stream stream, Index problem, Index first, Index rows, float* mask) const {
    const Index hidden = s.hidden_dim, ld = s.critics[0].layers[0].padded;
    const auto fill = [&](Index from, Index count, float* out) {
      s.exact.fill_dropout(key.words, DrawKey::stream(stream), static_cast<std::uint32_t>(problem),
                           from * hidden, count * hidden, s.threshold, s.keep_scale, out);
    };
    if (ld == hidden) {
      fill(first, rows, mask);
    } else {
      for (Index r = 0; r < rows; ++r) fill(first + r, 1, mask + r * ld);
    }
  }
  void drop_columns(Stream stream, Index problem, Index steps, float* mask) const {
    const Index ld = s.critics[0].layers[0].padded;
    for (Index t = 0; t < steps; ++t) {
      float* at = mask + t * columns * ld;
      drop(stream, problem, t * s.columns + b.first_expert, experts, at);
      drop(stream, problem, t * s.columns + s.experts + b.first_behaviour, columns - experts,
           at + experts * ld);
    }
  }

  struct Activations {
    const Unit* data;
    Index ld;
  };

  // Rows of x through the hidden layers, without a trace. Into w.hidden; floats behind the last
  // hidden layer of a stack that ends in a neuron.
  Activations hidden_only(Stack& stack, const Unit* x, Index ldx, Index rows, const float* mask) {
    for (Index l = 0; l < stack.hidden(); ++l) {
      const Layer& layer = layer_of(stack, l);
      const bool last = l + 1 == static_cast<Index>(stack.layers.size());
      const LearnTable& out = last ? exact : *layer_of(stack, l + 1).k;
      layer.forward(x, ldx, rows, w.pre.data(), layer.padded);
      Unit* target = w.hidden[l % 2].data();
      ldx = layer.padded / out.step;
      out.norm_mish_only(w.pre.data(), layer.padded, rows, l == 0 ? mask : nullptr, layer.norm(),
                         target, ldx);
      x = target;
    }
    return {x, ldx};
  }

  // The same with a trace, from its row `at` on.
  void hidden_traced(Stack& stack, StackTrace& trace, const Unit* x, Index ldx, Index at,
                     Index rows) {
    for (Index l = 0; l < stack.hidden(); ++l) {
      const Layer& layer = layer_of(stack, l);
      Trace& of = trace_of(trace, l);
      float* y = of.normed.data() + at * of.ld;
      layer.forward(x, ldx, rows, y, of.ld);
      of.out.table->norm_mish(y, rows, of.mask_at(at), of.at(at), layer.norm(), of.out.row(at),
                              of.out.ld);
      x = of.out.row(at);
      ldx = of.out.ld;
    }
  }

  // The last layer behind hidden_traced, of `columns` rows: z = simnorm(layer_norm(...)).
  void simnorm_traced(Stack& stack, StackTrace& trace, Index at, float* out) {
    const Layer& last = stack.layers.back();
    Trace& of = trace.back();
    Operand& before = trace[trace.size() - 2].out;
    float* y = of.normed.data() + at * of.ld;
    last.forward(before.row(at), before.ld, columns, y, of.ld);
    exact.norm_simnorm(y, of.ld, columns, last.norm(), s.simnorm_dim, of.scale.data() + at, out,
                       ld_z);
  }

  // Back through a stack that ends in SimNorm, from g = dL/dz; leaves the first layer's in its
  // trace.
  void simnorm_backward(Stack& stack, StackTrace& trace, Index at, const float* z, const float* g) {
    Layer& last = stack.layers.back();
    Trace& of = trace.back();
    last.k->norm_simnorm_backward(g, ld_z, columns, z, ld_z, of.at(at), last.norm(), s.simnorm_dim,
                                  of.grad.row(at), of.grad.ld, last.sums(b.number));
    last.backward(0, of.grad.row(at), of.grad.ld, columns, w.gradient.data(), last.back_columns(0));
    hidden_backward(stack, trace, at, columns);
  }

  // Back through the hidden layers, from dL/d(last output) in w.gradient.
  void hidden_backward(Stack& stack, StackTrace& trace, Index at, Index rows) {
    for (Index l = stack.hidden(); l-- > 0;) {
      Layer& layer = layer_of(stack, l);
      Trace& of = trace_of(trace, l);
      layer.k->norm_mish_backward(w.gradient.data(), layer.padded, rows, nullptr, of.mask_at(at),
                                  of.at(at), layer.norm(), of.grad.row(at), of.grad.ld,
                                  layer.sums(b.number));
      if (l > 0) {
        layer.backward(0, of.grad.row(at), of.grad.ld, rows, w.gradient.data(),
                       layer.back_columns(0));
      }
    }
  }

  void neuron(const Stack& stack, const float* h, Index ld, Index rows, float* out) const {
    const Neuron& last = stack.neuron[0];
    exact.dot_rows(h, ld, rows, last.weight(), last.bias(), last.padded, out);
  }
  void traced_neuron(const Stack& stack, StackTrace& trace, Index at, Index rows,
                     float* out) const {
    Operand& h = trace.back().out;
    neuron(stack, reinterpret_cast<const float*>(h.row(at)), h.ld, rows, out);
  }
  // Back from dL/d(neuron's output) through the whole stack.
  void traced_backward(Stack& stack, StackTrace& trace, Index at, Index rows, const float* slope) {
    Neuron& last = stack.neuron[0];
    Operand& h = trace.back().out;
    float* total = last.sums(b.number);
    exact.weighted_sum(reinterpret_cast<const float*>(h.row(at)), h.ld, rows, slope, last.padded,
                       total);
    for (Index r = 0; r < rows; ++r) total[last.padded] += slope[r];
    exact.outer(slope, nullptr, rows, last.weight(), last.padded, w.gradient.data(), last.padded);
    hidden_backward(stack, trace, at, rows);
  }

  // The policy's draw of rows whose latents lead x, with w.noise, into w.action.
  void sample(const Unit* x, Index ldx, Index rows, float* log_prob, float* kept) {
    const Layer& head = s.policy.layers.back();
    const auto [h, ldh] = hidden_only(s.policy, x, ldx, rows, nullptr);
    head.forward(h, ldh, rows, w.pre.data(), head.padded);
    exact.policy_sample(w.pre.data(), head.padded, rows, w.noise.data(), s.action_dim,
                        s.log_std_min, s.log_std_max, presquash(), w.action.data(), ld_a, log_prob,
                        kept);
  }

  State& s;
  const LearnerSettings& set;
  const Block& b;
  const DrawKey& key;
  Work& w;
  const LearnTable &k, &exact;
  const Index horizon, columns, experts, ld_z, ld_a;
};

void Learner::State::model_block(const Block& block, const Source& source, const DrawKey& key,
                                 const Index* pair, Work& w) {
  for (Stack* stack : model_stacks) {
    for (Layer& layer : stack->layers) layer.clear_sums(block.number);
    for (Neuron& neuron : stack->neuron) neuron.clear_sums(block.number);
  }
  Pass pass(*this, block, key, w);
  pass.encode(source);
  pass.targets(source, pair);
  pass.rollout(source);
  for (Index k = 0; k < static_cast<Index>(critics.size()); ++k) pass.critic(source, k);
  if (!td()) pass.value(pair);
  if (penalised()) {
    pass.between();
    for (Index k = 0; k < static_cast<Index>(critics.size()); ++k) pass.penalty(k);
  }
  if (!termination.layers.empty()) pass.ends(source);
  pass.unroll();
  sums[static_cast<std::size_t>(block.number)] = pass.sums;
}

void Learner::State::policy_block(const Block& block, const Source& source, const DrawKey& key,
                                  const Index* pair, double cloning, Work& w) {
  for (Layer& layer : policy.layers) layer.clear_sums(block.number);
  Pass pass(*this, block, key, w);
  pass.policy(pair, source, cloning);
  Sums& total = sums[static_cast<std::size_t>(block.number)];
  total.policy = pass.sums.policy;
  total.log_prob = pass.sums.log_prob;
  total.q_policy = pass.sums.q_policy;
  total.cloning = pass.sums.cloning;
}

}  // namespace iqmpc
