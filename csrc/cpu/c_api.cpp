#include <algorithm>
#include <cmath>
#include <exception>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>

#include "iqmpc.h"
#include "iqmpc/agent.hpp"

struct iqmpc_agent {
  iqmpc::Agent agent;
};

namespace {

// The last failure of this thread. Kept in place, so that saying it needs no memory.
thread_local char last_error[1024] = "";

iqmpc_status failed(iqmpc_status status, const char* message) noexcept {
  const std::size_t size = std::min(std::char_traits<char>::length(message), sizeof last_error - 1);
  std::copy_n(message, size, last_error);
  last_error[size] = '\0';
  return status;
}

iqmpc_status status_of(iqmpc::AgentError::Reason reason) noexcept {
  using Reason = iqmpc::AgentError::Reason;
  switch (reason) {
    case Reason::unreadable:
      return IQMPC_UNREADABLE;
    case Reason::damaged:
      return IQMPC_DAMAGED;
    case Reason::version:
      return IQMPC_WRONG_VERSION;
    case Reason::unsupported:
      break;
  }
  return IQMPC_UNSUPPORTED;
}

// What `run` returns, or the status of what it throws.
template <class Run>
iqmpc_status guarded(Run run) noexcept {
  try {
    return run();
  } catch (const iqmpc::AgentError& error) {
    return failed(status_of(error.reason), error.what());
  } catch (const std::invalid_argument& error) {
    return failed(IQMPC_INVALID_ARGUMENT, error.what());
  } catch (const std::bad_alloc&) {
    return failed(IQMPC_OUT_OF_MEMORY, "out of memory");
  } catch (const std::exception& error) {
    return failed(IQMPC_INTERNAL, error.what());
  } catch (...) {
    return failed(IQMPC_INTERNAL, "an unknown error");
  }
}

iqmpc_status check_size(const char* what, std::size_t size, std::size_t expected) {
  if (size == expected) return IQMPC_OK;
  const std::string message = std::string(what) + " must have " + std::to_string(expected) +
                              " numbers, got " + std::to_string(size);
  return failed(IQMPC_INVALID_ARGUMENT, message.c_str());
}

iqmpc::AgentOptions converted(const iqmpc_options* given) {
  iqmpc::AgentOptions options;
  if (given == nullptr) return options;
  if (given->size != sizeof(iqmpc_options)) {
    throw std::invalid_argument("options must come from iqmpc_default_options(), got a size of " +
                                std::to_string(given->size));
  }
  if (given->threads != 0) options.threads = given->threads;
  if (!(given->budget_us < 0)) options.budget_us = given->budget_us;
  if (given->policy_only != 0) options.planning = false;
  if (given->isa != nullptr) options.isa = iqmpc::isa_from_name(given->isa, "isa");
  if (given->has_seed != 0) options.seed = given->seed;
  return options;
}

// `load(options)` into *agent.
template <class Load>
iqmpc_status loaded(const void* source, const iqmpc_options* given, iqmpc_agent** agent,
                    Load load) noexcept {
  if (agent != nullptr) *agent = nullptr;
  if (source == nullptr || agent == nullptr) {
    return failed(IQMPC_INVALID_ARGUMENT, "what to load and where to must not be null");
  }
  return guarded([&] {
    *agent = new iqmpc_agent{load(converted(given))};
    return IQMPC_OK;
  });
}

const char* name_at(const std::vector<std::string>& names, std::size_t index) noexcept {
  return index < names.size() ? names[index].c_str() : nullptr;
}

double value_at(const std::vector<double>& values, std::size_t index) noexcept {
  return index < values.size() ? values[index] : std::nan("");
}

}  // namespace

extern "C" {

const char* iqmpc_version(void) { return IQMPC_VERSION_STRING; }

const char* iqmpc_last_error(void) { return last_error; }

iqmpc_options iqmpc_default_options(void) {
  iqmpc_options options{};
  options.size = sizeof options;
  options.budget_us = -1;
  return options;
}

iqmpc_status iqmpc_agent_load(const char* path, const iqmpc_options* options, iqmpc_agent** agent) {
  return loaded(path, options, agent, [path](const iqmpc::AgentOptions& converted) {
    return iqmpc::Agent::load(path, converted);
  });
}

iqmpc_status iqmpc_agent_from_memory(const void* data, size_t size, const iqmpc_options* options,
                                     iqmpc_agent** agent) {
  return loaded(data, options, agent, [data, size](const iqmpc::AgentOptions& converted) {
    return iqmpc::Agent::from_memory(data, size, converted);
  });
}

void iqmpc_agent_free(iqmpc_agent* agent) { delete agent; }

size_t iqmpc_agent_obs_size(const iqmpc_agent* agent) {
  return agent == nullptr ? 0 : agent->agent.obs_size();
}
size_t iqmpc_agent_action_size(const iqmpc_agent* agent) {
  return agent == nullptr ? 0 : agent->agent.action_size();
}
const char* iqmpc_agent_task(const iqmpc_agent* agent) {
  return agent == nullptr ? nullptr : agent->agent.info().task.c_str();
}
const char* iqmpc_agent_obs_name(const iqmpc_agent* agent, size_t index) {
  return agent == nullptr ? nullptr : name_at(agent->agent.info().observation_names, index);
}
const char* iqmpc_agent_action_name(const iqmpc_agent* agent, size_t index) {
  return agent == nullptr ? nullptr : name_at(agent->agent.info().action_names, index);
}
double iqmpc_agent_action_low(const iqmpc_agent* agent, size_t index) {
  return agent == nullptr ? std::nan("") : value_at(agent->agent.info().action_low, index);
}
double iqmpc_agent_action_high(const iqmpc_agent* agent, size_t index) {
  return agent == nullptr ? std::nan("") : value_at(agent->agent.info().action_high, index);
}
double iqmpc_agent_control_period(const iqmpc_agent* agent) {
  return agent == nullptr ? std::nan("")
                          : agent->agent.info().control_period.value_or(std::nan(""));
}
size_t iqmpc_agent_action_repeat(const iqmpc_agent* agent) {
  return agent == nullptr ? 0 : static_cast<size_t>(agent->agent.info().action_repeat);
}

iqmpc_status iqmpc_agent_reset(iqmpc_agent* agent) {
  if (agent == nullptr) return failed(IQMPC_INVALID_ARGUMENT, "the agent must not be null");
  agent->agent.reset();
  return IQMPC_OK;
}

iqmpc_status iqmpc_agent_act(iqmpc_agent* agent, const float* obs, size_t obs_size, float* action,
                             size_t action_size, int explore, iqmpc_plan* plan) {
  if (agent == nullptr || obs == nullptr || action == nullptr) {
    return failed(IQMPC_INVALID_ARGUMENT, "agent, obs and action must not be null");
  }
  return guarded([&] {
    iqmpc_status status = check_size("obs", obs_size, agent->agent.obs_size());
    if (status == IQMPC_OK) {
      status = check_size("action", action_size, agent->agent.action_size());
    }
    if (status != IQMPC_OK) return status;
    const iqmpc::PlanResult result = agent->agent.act(obs, action, explore != 0);
    if (plan != nullptr) {
      *plan = {result.iterations, result.samples, static_cast<int>(result.nonfinite),
               result.missed,     result.late,    result.elapsed_us};
    }
    return IQMPC_OK;
  });
}

iqmpc_status iqmpc_agent_statistics(const iqmpc_agent* agent, iqmpc_statistics* statistics) {
  if (agent == nullptr || statistics == nullptr) {
    return failed(IQMPC_INVALID_ARGUMENT, "agent and statistics must not be null");
  }
  return guarded([&] {
    const iqmpc::PlanStatistics s = agent->agent.planner().statistics();
    const double mean = s.plans == 0 ? 0 : s.total_us / static_cast<double>(s.plans);
    *statistics = {s.plans,
                   s.missed,
                   s.late,
                   s.nonfinite,
                   mean,
                   s.quantile_us(0.5),
                   s.quantile_us(0.99),
                   s.quantile_us(0.999),
                   s.max_us};
    return IQMPC_OK;
  });
}

}  // extern "C"
