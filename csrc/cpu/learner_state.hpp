// What an update works on: csrc/cpu/learner.cpp drives it, csrc/cpu/learner_blocks.cpp computes.
#pragma once

#include <atomic>
#include <mutex>
#include <vector>

#include "cpu/kernel_table.hpp"
#include "cpu/learn_layer.hpp"
#include "cpu/threefry.hpp"
#include "iqmpc/learner.hpp"
#include "iqmpc/thread_pool.hpp"

namespace iqmpc {

namespace detail {

// Columns of a batch that one task takes through the model and back. Fixed, so that sums over rows
// come out the same on any number of threads.
constexpr Index kBlockColumns = 16;

// What a draw is for: the number of its stream.
enum Stream : std::uint32_t {
  kTarget,
  kInitial,
  kKeep,
  kKeepTarget,
  kKeepValue,
  kKeepPenalty,
  kKeepPolicy,
  kMix,
  kPolicyNoise,
  kPair,
  kPolicyPair,
  kExpertSlices,
  kBehaviourSlices
};

// The generator of one update: draws are numbered, so that they depend on no thread.
struct DrawKey {
  DrawKey(std::uint64_t seed, std::uint64_t update)
      : words{static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32),
              static_cast<std::uint32_t>(update), static_cast<std::uint32_t>(update >> 32)} {}

  static std::uint32_t stream(Stream kind) { return kind << 24; }

  // 64 bits, for the few draws that are neither normal nor dropout.
  std::uint64_t bits(Stream kind, Index element) const {
    std::uint32_t x[4] = {0, static_cast<std::uint32_t>(element), stream(kind), 0};
    threefry(words, x);
    return std::uint64_t{x[0]} << 32 | x[1];
  }
  // In [0, 1), 24 bits.
  float uniform(Stream kind, Index element) const {
    return static_cast<float>(bits(kind, element) >> 40) * 0x1p-24f;
  }
  // In [0, n) for n < 2^32; none is likelier than another by more than n / 2^64.
  Index below(Stream kind, Index element, Index n) const {
    const std::uint64_t x = bits(kind, element), count = static_cast<std::uint64_t>(n);
    return static_cast<Index>(((x >> 32) * count + ((x & 0xffffffffu) * count >> 32)) >> 32);
  }
  // Two different critics.
  void pair(Stream kind, Index count, Index* pair) const {
    pair[0] = below(kind, 0, count);
    pair[1] = below(kind, 1, count - 1);
    if (pair[1] >= pair[0]) ++pair[1];
  }

  std::uint32_t words[4];
};

// Layers with a LayerNorm each (the policy's last has none), and behind those of a critic or a
// termination head one neuron.
struct Stack {
  std::vector<Layer> layers;
  std::vector<Neuron> neuron;  // one or none

  // Layers whose output passes Mish.
  Index hidden() const { return static_cast<Index>(layers.size()) - (neuron.empty() ? 1 : 0); }
};

using StackTrace = std::vector<Trace>;  // one a layer

// The columns of one block and where its rows lie in the buffers that all blocks share. Every
// block's rows start at an even place, so that no pair of rows belongs to two blocks.
struct Block {
  Index number;
  Index columns, experts;               // the experts first
  Index first_expert, first_behaviour;  // of the batch's
  Index start;                          // [columns]: of s_0
  Index data;                           // [H, columns]: of (z_t, a_t)
  Index steps;                          // [H+1, columns]: of z_t
  Index value;                          // rows of V: [experts], or [H, behaviours] for v_diff
  Index penalty;                        // [H, experts]
};

// Sums over a block's rows, or over all blocks'.
struct Sums {
  double consistency = 0, q_expert = 0, q_behaviour = 0, target = 0, reward_expert = 0;
  double reward_behaviour = 0, value = 0, critic = 0, penalty = 0;
  double termination = 0, found = 0, claimed = 0, ends = 0;
  double policy = 0, log_prob = 0, q_policy = 0, cloning = 0;

  static constexpr double Sums::* kAll[] = {
      &Sums::consistency,   &Sums::q_expert,         &Sums::q_behaviour, &Sums::target,
      &Sums::reward_expert, &Sums::reward_behaviour, &Sums::value,       &Sums::critic,
      &Sums::penalty,       &Sums::termination,      &Sums::found,       &Sums::claimed,
      &Sums::ends,          &Sums::policy,           &Sums::log_prob,    &Sums::q_policy,
      &Sums::cloning};
};

// Where a batch comes from: given, or slices of replays.
struct Source {
  const BatchView* batch;       // or ...
  const ReplayView* replay[2];  // of experts, of behaviour
  const std::int64_t* starts;   // [columns]
  Index experts, obs_dim, action_dim;

  const float* obs(Index t, Index column) const {
    return (batch ? batch->obs : of(column).obs) + row(t, column) * obs_dim;
  }
  const float* action(Index t, Index column) const {
    return (batch ? batch->action : of(column).action) + row(t, column) * action_dim;
  }
  float reward(Index t, Index column) const {
    return (batch ? batch->reward : of(column).reward)[row(t, column)];
  }
  float terminated(Index t, Index column) const {
    return (batch ? batch->terminated : of(column).terminated)[row(t, column)];
  }

 private:
  const ReplayView& of(Index column) const { return *replay[column < experts ? 0 : 1]; }
  Index row(Index t, Index column) const {
    return batch ? t * batch->columns + column : starts[column] + t;
  }
};

// One thread's buffers, for one block at a time.
struct Work {
  // [rows, padded columns of the widest layer]
  AlignedBuffer<float> pre, gradient, other, z_gradient, encoded, mask, obs;
  AlignedBuffer<float> noise, action, data_action, kept;  // rows of actions
  AlignedBuffer<float> log_prob, q[2], dq[2], backup, entropy_weight, scale, ones;  // [rows]
  std::vector<std::int32_t> chosen;
  AlignedBuffer<Unit> hidden[2];  // operands of either type
  Operand in;
  StackTrace pair[2];  // of the critics in the policy's step
  // Of the gradient penalty, for each hidden layer.
  struct Penalty {
    AlignedBuffer<float> c, u_bar, x_bar, scale_bar;
  };
  std::vector<Penalty> penalty;
  AlignedBuffer<float> r_bar;
};

}  // namespace detail

struct Learner::State {
  State(const LearnerView& view, const LearnerSettings& settings, std::uint64_t seed, Isa isa);

  UpdateMetrics run(detail::Source source, detail::Index columns, std::uint64_t update,
                    std::uint64_t model_steps, std::uint64_t policy_steps);
  void resize(detail::Index columns, detail::Index experts);

  // Forward and backward through the model's loss, for one block of columns.
  void model_block(const detail::Block& block, const detail::Source& source,
                   const detail::DrawKey& key, const detail::Index* pair, detail::Work& work);
  // The same of the policy's loss, on the latents that model_block left.
  void policy_block(const detail::Block& block, const detail::Source& source,
                    const detail::DrawKey& key, const detail::Index* pair, double cloning,
                    detail::Work& work);

  bool td() const { return settings.objective == Objective::td; }
  bool clones() const { return settings.c_bc > 0 && experts > 0; }
  bool penalised() const { return settings.c_gp > 0 && !td(); }
  bool drops() const { return threshold > 0; }
  bool always_drops() const { return drops() && settings.dropout_always; }
  detail::Index value_rows(const detail::Block& b) const {
    return settings.objective == Objective::v_diff ? settings.horizon * (b.columns - b.experts)
                                                   : b.experts;
  }
  std::vector<detail::Stack*> model_stacks;  // encoder, dynamics, critics, termination

  const LearnerSettings settings;
  const std::uint64_t seed;
  const Isa isa;
  const detail::LearnTable& table;  // of the settings' precision
  const detail::LearnTable& exact;  // float32
  const detail::KernelTable& draw;
  ThreadPool pool;
  std::mutex mutex;
  std::atomic<int> calls{0};  // under way: those that take the mutex
  detail::Index obs_dim, action_dim, latent_dim, hidden_dim, simnorm_dim;
  float log_std_min, log_std_max;
  std::uint32_t threshold;  // of dropout, in 2^-16
  float keep_scale;

  detail::Stack encoder, dynamics, policy, termination;
  std::vector<detail::Stack> critics, targets;
  struct Strip {
    detail::Layer* layer;
    detail::Index number;
    const detail::Layer* follows;  // of a target: its critic's
  };
  struct Part {  // of the parameters
    std::vector<Strip> strips;
    std::vector<detail::Neuron*> neurons;
  };
  Part all, model, policy_part, target, last;  // last: of targets and policy
  std::vector<detail::Work> work;              // of each thread

  // Of one size of batch.
  detail::Index columns = 0, experts = -1;
  detail::Index ld_z = 0, ld_a = 0;
  std::vector<detail::Block> blocks;
  std::vector<detail::Sums> sums;  // of each block
  std::vector<std::int64_t> starts;
  detail::Operand start;  // s_0
  // (z, a): of the data, of V, of the policy's step, between the sides; and z_{t+1}
  detail::Operand joint, value_joint, step_joint, penalty_joint, next;
  AlignedBuffer<float> z;  // [(H+1) columns of every block, ld_z]
  detail::StackTrace encoder_trace, dynamics_trace, policy_trace, termination_trace;
  std::vector<detail::StackTrace> critic_trace, value_trace, penalty_trace;
  // Of each critic's hidden layers: the first gradient, and what its product with the weights
  // gives.
  std::vector<std::vector<detail::Operand>> penalty_first, penalty_second;

 private:
  class Pass;  // csrc/cpu/learner_blocks.cpp
};

}  // namespace iqmpc
