// Memory for a model that learns, for programs that have no tensors of their own.
#pragma once

#include <cstddef>
#include <cstdint>

#include "iqmpc/aligned_buffer.hpp"
#include "iqmpc/export.hpp"
#include "iqmpc/learner.hpp"
#include "iqmpc/world_model.hpp"

namespace iqmpc {

// The defaults are those of the size `small` (about 1M parameters).
struct ModelSizes {
  std::ptrdiff_t obs = 0;        // O
  std::ptrdiff_t action = 0;     // A
  std::ptrdiff_t latent = 128;   // Z, whole groups of simnorm_dim
  std::ptrdiff_t hidden = 384;   // of dynamics, policy, critics and termination head
  std::ptrdiff_t encoder = 256;  // the encoder's hidden layer
  std::ptrdiff_t critics = 2;    // K
  std::ptrdiff_t simnorm_dim = 8;
  bool termination = false;  // with a termination head
  bool average = true;       // with an average of the weights, to act with
};

// How many updates were made, and Adam's steps in them: an update that is not finite makes none.
struct UpdateCounts {
  std::uint64_t updates = 0;
  std::uint64_t model_steps = 0;
  std::uint64_t policy_steps = 0;
};

// Owns a model's parameters, Adam's moments, the target critics and, where wanted, the average of
// the weights. A new one is as untrained as the Python package's: weights of N(0, 0.02²), biases 0,
// LayerNorm (1, 0), last layers of critics and termination head 0, targets equal to the critics,
// the average equal to the weights.
class IQMPC_API ModelStorage {
 public:
  // Throws std::invalid_argument for sizes that cannot be. The same sizes and seed give the same
  // weights.
  ModelStorage(const ModelSizes& sizes, std::uint64_t seed);

  // Views stay valid as long as the memory: until the storage, or what it was moved to, is gone.
  const LearnerView& learner_view() const noexcept { return learner_; }
  // To plan with: the weights, or their average. Throws std::logic_error where none is kept.
  const WorldModelView& weights() const noexcept { return weights_; }
  const WorldModelView& average() const;

  // Learner::learn, counted: `learner` was made of this storage's view.
  UpdateMetrics learn(Learner& learner, const ReplayView* experts, const ReplayView& behaviour,
                      std::ptrdiff_t batch);

  const ModelSizes& sizes() const noexcept { return sizes_; }
  std::ptrdiff_t parameters() const noexcept { return parameters_; }  // without the targets

  // With `counts`, all the state there is, in one piece: of equal sizes, in equal places.
  float* data() noexcept { return memory_.data(); }
  const float* data() const noexcept { return memory_.data(); }
  std::size_t size() const noexcept { return memory_.size(); }

  UpdateCounts counts;

 private:
  ModelSizes sizes_;
  std::ptrdiff_t parameters_ = 0;
  AlignedBuffer<float> memory_;
  LearnerView learner_;
  WorldModelView weights_, average_;
};

}  // namespace iqmpc
