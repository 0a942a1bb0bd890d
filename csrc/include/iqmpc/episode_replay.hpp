// Episodes of which a learner draws slices.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "iqmpc/export.hpp"
#include "iqmpc/learner.hpp"

namespace iqmpc {

// A ring of whole episodes. One of T steps takes T+1 rows (the last holds an observation alone) and
// offers T-H+1 slices of H steps, none of which crosses into another episode. When the ring is full
// the oldest episodes make room. Memory grows with use, up to `capacity` rows, by doubling.
class IQMPC_API EpisodeReplay {
 public:
  // Throws std::invalid_argument for sizes below 1.
  EpisodeReplay(std::ptrdiff_t obs_dim, std::ptrdiff_t action_dim, std::ptrdiff_t horizon,
                std::ptrdiff_t capacity);

  // obs [T+1, O], action [T, A] in [-1, 1], reward [T] (null: zeros), T = `steps`. `terminated`:
  // the last step ended the task, so that its value is not bootstrapped. An episode shorter than
  // the horizon is kept out, since it offers no slice. Throws std::invalid_argument for an episode
  // that is larger than the capacity; the replay is then as before.
  void add(const float* obs, const float* action, const float* reward, std::ptrdiff_t steps,
           bool terminated);

  // For Learner::learn; valid until an episode is added.
  ReplayView view() const noexcept;

  std::ptrdiff_t steps() const noexcept;     // held
  std::ptrdiff_t episodes() const noexcept;  // held
  std::ptrdiff_t slices() const noexcept;

 private:
  struct Episode {
    std::ptrdiff_t first, steps;
    std::ptrdiff_t end() const { return first + steps + 1; }
  };

  void grow(std::ptrdiff_t rows);

  std::ptrdiff_t obs_dim_, action_dim_, horizon_, capacity_;
  std::vector<float> obs_, action_, reward_, terminated_;
  std::vector<Episode> held_;  // oldest first
  std::vector<std::int64_t> starts_;
  std::ptrdiff_t next_ = 0;  // the row where the next episode begins
};

}  // namespace iqmpc
