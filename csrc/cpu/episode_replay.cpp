#include "iqmpc/episode_replay.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace iqmpc {

namespace {

using Index = std::ptrdiff_t;

std::size_t count(Index n) { return static_cast<std::size_t>(n); }

void at_least_one(const char* name, Index value) {
  if (value >= 1) return;
  throw std::invalid_argument(std::string(name) + " must be at least 1, got " +
                              std::to_string(value));
}

}  // namespace

EpisodeReplay::EpisodeReplay(std::ptrdiff_t obs_dim, std::ptrdiff_t action_dim,
                             std::ptrdiff_t horizon, std::ptrdiff_t capacity)
    : obs_dim_(obs_dim), action_dim_(action_dim), horizon_(horizon), capacity_(capacity) {
  at_least_one("obs_dim", obs_dim);
  at_least_one("action_dim", action_dim);
  at_least_one("horizon", horizon);
  at_least_one("capacity", capacity);
  grow(std::min<Index>(capacity, 4096));
}

void EpisodeReplay::grow(std::ptrdiff_t rows) {
  obs_.resize(count(rows * obs_dim_));
  action_.resize(count(rows * action_dim_));
  terminated_.resize(count(rows));
  starts_.reserve(count(rows));
  reward_.resize(count(rows));  // last: its size is the number of rows
}

void EpisodeReplay::add(const float* obs, const float* action, const float* reward,
                        std::ptrdiff_t steps, bool terminated) {
  if (steps < 0) {
    throw std::invalid_argument("an episode must have 0 steps or more, got " +
                                std::to_string(steps));
  }
  if (steps + 1 > capacity_) {
    throw std::invalid_argument("an episode of " + std::to_string(steps) +
                                " steps does not fit a replay of " + std::to_string(capacity_) +
                                " rows");
  }
  if (steps < horizon_) return;
  if (obs == nullptr || action == nullptr) {
    throw std::invalid_argument("an episode needs observations and actions, got null");
  }

  // At the end, or at the start over the oldest episodes.
  const bool wraps = next_ + steps + 1 > capacity_;
  const Episode added{wraps ? 0 : next_, steps};
  const Index rows = static_cast<Index>(reward_.size());
  if (added.end() > rows) grow(std::min(capacity_, std::max(added.end(), 2 * rows)));
  held_.reserve(held_.size() + 1);  // the last thing that may throw

  const Index tail = next_;
  held_.erase(std::remove_if(held_.begin(), held_.end(),
                             [&](const Episode& e) {
                               return (wraps && e.first >= tail) ||
                                      (e.first < added.end() && e.end() > added.first);
                             }),
              held_.end());
  held_.push_back(added);
  next_ = added.end();

  std::copy_n(obs, (steps + 1) * obs_dim_, obs_.begin() + added.first * obs_dim_);
  std::copy_n(action, steps * action_dim_, action_.begin() + added.first * action_dim_);
  if (reward != nullptr) {
    std::copy_n(reward, steps, reward_.begin() + added.first);
  } else {
    std::fill_n(reward_.begin() + added.first, steps, 0.0f);
  }
  std::fill_n(terminated_.begin() + added.first, steps, 0.0f);
  terminated_[count(added.first + steps - 1)] = terminated ? 1.0f : 0.0f;

  starts_.clear();
  for (const Episode& e : held_) {
    for (Index t = 0; t + horizon_ <= e.steps; ++t) starts_.push_back(e.first + t);
  }
}

ReplayView EpisodeReplay::view() const noexcept {
  return {obs_.data(),
          action_.data(),
          reward_.data(),
          terminated_.data(),
          starts_.data(),
          slices(),
          static_cast<Index>(reward_.size())};
}

std::ptrdiff_t EpisodeReplay::steps() const noexcept {
  Index total = 0;
  for (const Episode& e : held_) total += e.steps;
  return total;
}
std::ptrdiff_t EpisodeReplay::episodes() const noexcept { return static_cast<Index>(held_.size()); }
std::ptrdiff_t EpisodeReplay::slices() const noexcept { return static_cast<Index>(starts_.size()); }

}  // namespace iqmpc
