// One update of a world model, its critics and its policy prior (IQ-MPC, eq. 11-14), in one call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "iqmpc/export.hpp"
#include "iqmpc/isa.hpp"

namespace iqmpc {

// One parameter tensor in the caller's memory: its values, Adam's moments and, where an average of
// the weights is kept, that. Read and written in place.
struct Parameter {
  float* value = nullptr;
  float* first = nullptr;    // Adam's exponential average of the gradient
  float* second = nullptr;   // ... and of its square
  float* average = nullptr;  // null: none is kept
};

// weight [out, in] row-major, the others [out]; gamma and beta without values: no LayerNorm.
struct LayerParameters {
  Parameter weight, bias, gamma, beta;
  std::ptrdiff_t out = 0;
  std::ptrdiff_t in = 0;
};

// All that an update changes. Parts as in WorldModelView; `targets` are the target critics, of
// which only values are used.
struct LearnerView {
  std::vector<LayerParameters> encoder, dynamics, policy;
  std::vector<std::vector<LayerParameters>> critics, targets;
  std::vector<LayerParameters> termination;
  std::ptrdiff_t simnorm_dim = 8;
  float log_std_min = -10.0f;
  float log_std_max = 2.0f;
};

// iq: inverse soft-Q in the initial-state form; v_diff: with the value difference on behaviour; td:
// regression on the environment's reward.
enum class Objective { iq, v_diff, td };

// Which part of the squashing log π counts: exact, all of it; presquash, 1/A of it, with the
// logarithm's argument max(1 - a², 0) + 1e-6.
enum class Entropy { exact, presquash };

// Symbols as in the paper.
struct LearnerSettings {
  Objective objective = Objective::iq;
  Entropy entropy = Entropy::exact;
  std::ptrdiff_t horizon = 3;  // H
  float rho = 0.5f;            // λ
  float discount = 0.99f;      // γ
  float alpha = 0.5f;          // of the χ² term
  float entropy_coef = 1e-4f;  // in force, β or β·A
  float c_cons = 20.0f;
  float c_iq = 0.1f;
  float c_gp = 0.0f;  // 0: no gradient penalty
  float c_bc = 0.0f;  // of the prior's squared error on demonstrated actions, times 1 + |their Q|
  float c_termination = 1.0f;
  float termination_weight = 10.0f;  // of terminal rows
  float dropout = 0.01f;             // of the critics' first layer, rounded to 2^-16
  bool dropout_always = false;       // false: only where Q_k is regressed
  float lr = 3e-4f;
  float encoder_lr_scale = 0.3f;
  float grad_clip = 20.0f;                   // of model and policy apart
  float tau = 0.01f;                         // rate of the target critics
  float average_rate = 0.005f;               // of the weights' average, where parameters have one
  Precision precision = Precision::float32;  // operands of products; the encoder's are float32
  int threads = 1;
};

// Slices in time-major order: obs [H+1, N, O], action [H, N, A], reward and terminated [H, N]. The
// first `experts` of the N columns are demonstrations. Reward may be null for all objectives but
// td.
struct BatchView {
  const float* obs = nullptr;
  const float* action = nullptr;
  const float* reward = nullptr;
  const float* terminated = nullptr;
  std::ptrdiff_t columns = 0;
  std::ptrdiff_t experts = 0;
};

// Episodes as rows: obs [rows, O], action [rows, A], reward and terminated [rows]; `starts` lists
// the first rows of all slices of H steps. Reward may be null for all objectives but td.
struct ReplayView {
  const float* obs = nullptr;
  const float* action = nullptr;
  const float* reward = nullptr;
  const float* terminated = nullptr;
  const std::int64_t* starts = nullptr;
  std::ptrdiff_t slices = 0;
  std::ptrdiff_t rows = 0;
};

// NaN where an objective or option has no such figure.
struct UpdateMetrics {
  double consistency, q_expert, q_behaviour, target_value, reward_expert, reward_behaviour;
  double value_term, gradient_penalty, critic_loss;
  double termination_loss, termination_recall, termination_precision;
  double model_grad_norm, policy_loss, entropy, q_policy, policy_grad_norm, cloning_error;
  // A loss or gradient norm that is not finite. Of the model: nothing was changed. Of the policy
  // alone: the policy was left as it was.
  bool model_skipped, policy_skipped;
};

// The draws of one update, for comparison with another implementation. Normal where not said
// otherwise; null members are not written.
struct UpdateDraws {
  float* target = nullptr;        // [H, N, A], of V̄
  float* initial = nullptr;       // [1 or H (v_diff), N, A], of V
  float* keep = nullptr;          // [K, H N, hidden], dropout multipliers of Q_k
  float* keep_target = nullptr;   // [2, H N, hidden], where dropout is always on
  float* keep_value = nullptr;    // [2, rows of V, hidden]
  float* keep_penalty = nullptr;  // [K, H B_E, hidden]
  float* keep_policy = nullptr;   // [2, (H+1) N, hidden]
  float* mix = nullptr;           // [H, B_E], uniform, of the gradient penalty
  float* policy = nullptr;        // [H+1, N, A]
  std::ptrdiff_t pair[2];         // critics of the model's step
  std::ptrdiff_t policy_pair[2];  // ... and of the policy's
};

// One parameter's gradient [rows, columns], `ld` floats from row to row.
struct LearnerGradient {
  const float* values;
  std::ptrdiff_t rows, columns, ld;
};

// Owns its threads and every buffer: after the first call with a batch of some size, a call with
// another of that size allocates nothing. All parameters stay the caller's, who must not touch them
// during a call. Calls from several threads wait for each other. The same parameters, seed and
// number of update give the same result, bit for bit, on any number of threads. A forked process
// has none of the threads, and updates on its caller's alone.
class IQMPC_API Learner {
 public:
  // Throws std::invalid_argument for parts that do not fit together, settings that cannot be, and
  // an instruction set that the machine does not run. `view`'s memory must outlive the learner.
  Learner(const LearnerView& view, const LearnerSettings& settings, std::uint64_t seed,
          Isa isa = active_isa());
  ~Learner();
  Learner(Learner&&) noexcept;
  Learner& operator=(Learner&&) noexcept;

  // One update on `batch` slices of each replay, drawn uniformly with replacement. `update` numbers
  // the draws; `model_steps` and `policy_steps` are Adam's counts before this update. `experts` may
  // be null for Objective::td. Throws std::invalid_argument for a replay without slices, with
  // slices beyond its rows or without what is read of it.
  UpdateMetrics learn(const ReplayView* experts, const ReplayView& behaviour, std::ptrdiff_t batch,
                      std::uint64_t update, std::uint64_t model_steps, std::uint64_t policy_steps);

  // The same on slices given. Throws std::invalid_argument where columns and objective do not fit
  // and where something is missing.
  UpdateMetrics update(const BatchView& batch, std::uint64_t update, std::uint64_t model_steps,
                       std::uint64_t policy_steps);

  // Whether this process was forked in the middle of an update, which will never end here: neither
  // of the two above may then be called.
  bool forked_while_busy() const noexcept;

  // What update number `update` draws for a batch of so many columns.
  void draws(std::uint64_t update, std::ptrdiff_t columns, std::ptrdiff_t experts,
             UpdateDraws& draws) const;
  // The first rows of the slices that `learn` takes of a replay: [batch].
  void slices(std::uint64_t update, bool experts, const ReplayView& replay, std::ptrdiff_t batch,
              std::int64_t* rows) const;

  // The last update's gradients, before clipping, of encoder, dynamics, critics, termination and
  // policy, layer by layer: weight, bias, gamma, beta. For comparison; read them before the next.
  // Empty before the first.
  std::vector<LearnerGradient> gradients() const;

  const LearnerSettings& settings() const noexcept;
  Isa isa() const noexcept;
  std::ptrdiff_t obs_dim() const noexcept;
  std::ptrdiff_t action_dim() const noexcept;
  std::ptrdiff_t num_critics() const noexcept;
  std::ptrdiff_t hidden_dim() const noexcept;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace iqmpc
