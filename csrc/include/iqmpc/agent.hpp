// A trained agent out of one file, as `iqmpc export` writes it: load, reset, act.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "iqmpc/export.hpp"
#include "iqmpc/isa.hpp"
#include "iqmpc/planner.hpp"

namespace iqmpc {

// Why a file is no agent for this library; the message is a sentence that names the file.
class IQMPC_API AgentError : public std::runtime_error {
 public:
  enum class Reason {
    unreadable,   // there is no such file, or it cannot be read
    damaged,      // no agent's file, or one whose content does not match its digest
    version,      // of a format that this library does not read
    unsupported,  // an agent that this library cannot act for
  };

  AgentError(Reason reason, const std::string& message)
      : std::runtime_error(message), reason(reason) {}

  const Reason reason;
};

// What an agent's file says of it, beside the weights.
struct AgentInfo {
  std::string task;
  std::string provenance;  // JSON: run, steps, evaluation, versions
  std::vector<std::string> observation_names;
  std::vector<std::string> action_names;
  // What an action of -1 and 1 meant to the environment, in its own units.
  std::vector<double> action_low, action_high;
  std::ptrdiff_t action_repeat = 1;
  std::optional<double> control_period;  // seconds from one action to the next, where known
  double entropy_coef = 0;               // in force; planning needs none
  std::uint64_t seed = 0;                // of the planner's draws
  PlannerSettings planner;
  Precision precision = Precision::float32;
};

// In place of what the file says.
struct AgentOptions {
  std::optional<int> threads;
  std::optional<double> budget_us;  // 0: none
  std::optional<bool> planning;     // false: act with the policy prior
  std::optional<Precision> precision;
  std::optional<std::uint64_t> seed;
  std::optional<Isa> isa;
  std::shared_ptr<PlanClock> clock;
};

// Acts for one environment, as the Python package's `Agent.load` of the same file does: the same
// observations give the same actions, bit for bit, on the same instruction set.
//
// As with a Planner, calls from several threads wait for each other.
class IQMPC_API Agent {
 public:
  // Throws AgentError for the file and std::invalid_argument for options that cannot be.
  static Agent load(const std::string& path, const AgentOptions& options = {});
  // The same for a file's content; `name` stands for it in messages.
  static Agent from_memory(const void* data, std::size_t size, const AgentOptions& options = {},
                           const std::string& name = "the agent");

  ~Agent();
  Agent(Agent&&) noexcept;
  Agent& operator=(Agent&&) noexcept;

  std::size_t obs_size() const noexcept;
  std::size_t action_size() const noexcept;
  const AgentInfo& info() const noexcept;

  // An episode starts: forget the previous plan.
  void reset() noexcept;

  // obs [obs_size()] -> action [action_size()] in [-1, 1], never non-finite. `explore` adds noise.
  // Allocates nothing.
  PlanResult act(const float* obs, float* action, bool explore = false) noexcept;
  // The same; throws std::invalid_argument where a size is another.
  PlanResult act(const std::vector<float>& obs, std::vector<float>& action, bool explore = false);

  // `action` [action_size()] from [-1, 1] to the environment's own units, in double precision.
  void to_units(const float* action, double* command) const noexcept;

  Planner& planner() noexcept;
  const Planner& planner() const noexcept;

 private:
  struct State;
  explicit Agent(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace iqmpc
