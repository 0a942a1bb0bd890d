#include <cstdint>
#include <random>
#include <stdexcept>
#include <vector>

#include "check.hpp"
#include "iqmpc/episode_replay.hpp"

namespace {

using iqmpc::EpisodeReplay;
using iqmpc::ReplayView;
using Index = std::ptrdiff_t;
using Floats = std::vector<float>;

constexpr Index kObs = 2, kActions = 1, kHorizon = 3;

// Rows say which episode they are of, and which step.
void add(EpisodeReplay& replay, int number, Index steps, bool terminated, bool rewarded = true) {
  Floats obs, action, reward;
  for (Index t = 0; t <= steps; ++t) {
    obs.insert(obs.end(), {static_cast<float>(number), static_cast<float>(t)});
    if (t == steps) break;
    action.push_back(static_cast<float>(1000 * number + t));
    reward.push_back(static_cast<float>(t) + 0.5f);
  }
  replay.add(obs.data(), action.data(), rewarded ? reward.data() : nullptr, steps, terminated);
}

std::vector<int> numbers_held(const EpisodeReplay& replay) {
  const ReplayView view = replay.view();
  std::vector<int> numbers;
  for (Index i = 0; i < view.slices; ++i) {
    const int number = static_cast<int>(view.obs[view.starts[i] * kObs]);
    if (numbers.empty() || numbers.back() != number) numbers.push_back(number);
  }
  return numbers;
}

// Every slice is of one episode, whole; the episodes held are the last ones added, each with all of
// its slices.
void slices_of_the_newest_episodes() {
  std::mt19937 random(0);
  for (const Index capacity : {12, 40, 41, 200}) {
    EpisodeReplay replay(kObs, kActions, kHorizon, capacity);
    std::vector<Index> lengths;
    for (int number = 0; number < 300; ++number) {
      const Index steps = 3 + static_cast<Index>(random() % 9);
      lengths.push_back(steps);
      add(replay, number, steps, number % 2 == 1);
      const ReplayView view = replay.view();
      CHECK(view.rows <= capacity && view.slices == replay.slices());
      Index expected = 0, steps_held = 0;
      const std::vector<int> held = numbers_held(replay);
      for (std::size_t i = 0; i < held.size(); ++i) {
        CHECK(held[i] == number - static_cast<int>(held.size() - 1 - i));
        steps_held += lengths[static_cast<std::size_t>(held[i])];
        expected += lengths[static_cast<std::size_t>(held[i])] - kHorizon + 1;
      }
      CHECK(view.slices == expected && replay.steps() == steps_held);
      CHECK(replay.episodes() == static_cast<Index>(held.size()));
      for (Index i = 0; i < view.slices; ++i) {
        const std::int64_t first = view.starts[i];
        CHECK(first >= 0 && first + kHorizon < view.rows);
        const float of = view.obs[first * kObs], start = view.obs[first * kObs + 1];
        const Index length = lengths[static_cast<std::size_t>(of)];
        for (Index t = 0; t <= kHorizon; ++t) {
          const Index step = static_cast<Index>(start) + t;
          CHECK(view.obs[(first + t) * kObs] == of);
          CHECK(view.obs[(first + t) * kObs + 1] == static_cast<float>(step));
          if (t == kHorizon) break;
          CHECK(view.action[first + t] == 1000 * of + static_cast<float>(step));
          CHECK(view.reward[first + t] == static_cast<float>(step) + 0.5f);
          const bool ends = static_cast<int>(of) % 2 == 1 && step + 1 == length;
          CHECK(view.terminated[first + t] == (ends ? 1.0f : 0.0f));
        }
      }
    }
  }
}

// The cases of tests/test_replay.py: the same episodes make room.
void the_oldest_make_room() {
  const std::vector<std::vector<int>> overwritten = {{1, 2, 3}, {1, 2, 3}, {2, 3}};
  for (Index steps : {4, 5, 6}) {  // over five, six or seven rows of a full ring
    EpisodeReplay replay(kObs, kActions, kHorizon, 18);
    for (int number = 0; number < 3; ++number) add(replay, number, 5, false);
    add(replay, 3, steps, false);
    CHECK(numbers_held(replay) == overwritten[static_cast<std::size_t>(steps - 4)]);
  }
  EpisodeReplay replay(kObs, kActions, kHorizon, 18);
  for (int number = 0; number < 3; ++number) add(replay, number, 5, false);
  add(replay, 3, 4, false);  // over 0
  add(replay, 4, 5, false);  // over 1, up to row 10
  CHECK(numbers_held(replay) == (std::vector<int>{2, 3, 4}));
  add(replay, 5, 7, false);  // begins again, over 3 and 4; 2 is the oldest
  CHECK(numbers_held(replay) == std::vector<int>{5});
}

void memory_grows_with_use() {
  EpisodeReplay replay(kObs, kActions, kHorizon, 100000);
  CHECK(replay.view().rows == 4096);
  for (int number = 0; number < 5; ++number) add(replay, number, 999, false);
  CHECK(replay.view().rows == 8192 && replay.episodes() == 5);
  add(replay, 5, 49999, false);
  CHECK(replay.view().rows == 55000 && replay.episodes() == 6);
}

void what_does_not_fit() {
  EpisodeReplay replay(kObs, kActions, kHorizon, 10);
  add(replay, 0, 2, true);  // offers no slice
  CHECK(replay.episodes() == 0 && replay.view().slices == 0);
  add(replay, 1, 4, false, false);
  CHECK(replay.view().reward[2] == 0);
  CHECK(message_of<std::invalid_argument>([&] { add(replay, 2, 10, false); }) ==
        "an episode of 10 steps does not fit a replay of 10 rows");
  const auto add_null = [&](Index steps) { replay.add(nullptr, nullptr, nullptr, steps, true); };
  CHECK(message_of<std::invalid_argument>([&] { add_null(-1); }) ==
        "an episode must have 0 steps or more, got -1");
  CHECK(message_of<std::invalid_argument>([&] { add_null(4); }) ==
        "an episode needs observations and actions, got null");
  CHECK(numbers_held(replay) == std::vector<int>{1});
  CHECK(message_of<std::invalid_argument>([] { EpisodeReplay(2, 1, 0, 9); }) ==
        "horizon must be at least 1, got 0");
}

}  // namespace

int main() {
  slices_of_the_newest_episodes();
  the_oldest_make_room();
  memory_grows_with_use();
  what_does_not_fit();
  return 0;
}
