#include "iqmpc/agent.hpp"

#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <deque>
#include <fstream>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "cpu/json.hpp"
#include "cpu/planner_checks.hpp"
#include "cpu/safetensors.hpp"
#include "cpu/sha256.hpp"
#include "iqmpc/version.h"

namespace iqmpc {

namespace {

using detail::Json;
using detail::Safetensors;
using Reason = AgentError::Reason;
using Layers = std::vector<LinearView>;

constexpr char kFormat[] = "iqmpc-agent";
constexpr std::size_t kDigest = 64;
constexpr off_t kLargestFile = off_t{1} << 31;
// Beyond these a plan would take memory and time that no robot gives it.
constexpr std::int64_t kMostSamples = 1 << 16, kMostSteps = 64, kMostIterations = 1000;

std::vector<unsigned char> content_of(const std::string& path) {
  const auto fail = [&](const std::string& why) {
    throw AgentError(Reason::unreadable, path + " cannot be read: " + why);
  };
  struct stat about{};
  if (::stat(path.c_str(), &about) != 0) fail(std::strerror(errno));
  if (!S_ISREG(about.st_mode)) fail("it is no file");
  if (about.st_size > kLargestFile) fail("it is larger than any agent");
  std::ifstream file(path, std::ios::binary);
  if (!file) fail(std::strerror(errno));
  std::vector<unsigned char> bytes(static_cast<std::size_t>(about.st_size));
  file.read(reinterpret_cast<char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
  if (static_cast<std::size_t>(file.gcount()) != bytes.size()) fail("it became shorter");
  return bytes;
}

// Of all bytes, with zeros in place of the digest itself, where it stands first.
std::string digest_of(const unsigned char* bytes, std::size_t size, const std::string& digest) {
  const unsigned char* end = bytes + size;
  const unsigned char* place = std::search(bytes, end, digest.begin(), digest.end());
  detail::Sha256 hash;
  hash.add(bytes, static_cast<std::size_t>(place - bytes));
  if (place != end) {
    hash.add(std::string(digest.size(), '0').data(), digest.size());
    place += digest.size();
    hash.add(place, static_cast<std::size_t>(end - place));
  }
  return hash.hex();
}

// One stack of layers, "NAME.0.weight" and so on; of `members` stacked ones, each apart.
class Weights {
 public:
  explicit Weights(const Safetensors& file) : tensors_(file.tensors) {}

  std::vector<Layers> stacks(const std::string& name, std::size_t members, bool stacked) {
    std::vector<Layers> result(members);
    for (int i = 0;; ++i) {
      const std::string layer = name + "." + std::to_string(i) + ".";
      const detail::Tensor* weight = take(layer + "weight");
      if (weight == nullptr) break;
      const std::size_t lead = stacked ? 1 : 0;
      if (weight->shape.size() != 2 + lead) {
        throw std::invalid_argument(layer + "weight must have " + std::to_string(2 + lead) +
                                    " sides, got " + std::to_string(weight->shape.size()));
      }
      const std::ptrdiff_t out = weight->shape[lead], in = weight->shape[lead + 1];
      check_members(layer + "weight", *weight, members, stacked);
      const detail::Tensor* bias = row(layer + "bias", out, members, stacked);
      const detail::Tensor* gamma = row(layer + "gamma", out, members, stacked);
      const detail::Tensor* beta = row(layer + "beta", out, members, stacked);
      for (std::size_t k = 0; k < members; ++k) {
        const auto at = [&](const detail::Tensor* tensor, std::ptrdiff_t each) {
          return tensor == nullptr ? nullptr : tensor->data + static_cast<std::ptrdiff_t>(k) * each;
        };
        result[k].push_back(
            {at(weight, out * in), at(bias, out), at(gamma, out), at(beta, out), out, in});
      }
    }
    return result;
  }

  void check_all_taken() const {
    if (!tensors_.empty()) {
      throw std::invalid_argument("tensor \"" + tensors_.begin()->first +
                                  "\" belongs to no part of a model");
    }
  }

 private:
  const detail::Tensor* take(const std::string& name) {
    const auto found = tensors_.find(name);
    if (found == tensors_.end()) return nullptr;
    taken_.push_back(found->second);
    tensors_.erase(found);
    return &taken_.back();
  }

  const detail::Tensor* row(const std::string& name, std::ptrdiff_t out, std::size_t members,
                            bool stacked) {
    const detail::Tensor* tensor = take(name);
    if (tensor == nullptr) return nullptr;
    check_members(name, *tensor, members, stacked);
    if (tensor->shape.size() != 1 + std::size_t{stacked} || tensor->shape.back() != out) {
      throw std::invalid_argument(name + " must be as long as its layer is wide, " +
                                  std::to_string(out));
    }
    return tensor;
  }

  static void check_members(const std::string& name, const detail::Tensor& tensor,
                            std::size_t members, bool stacked) {
    if (stacked &&
        (tensor.shape.empty() || tensor.shape.front() != static_cast<std::ptrdiff_t>(members))) {
      throw std::invalid_argument(name + " must be of " + std::to_string(members) + " critics");
    }
  }

  std::map<std::string, detail::Tensor> tensors_;
  std::deque<detail::Tensor> taken_;
};

WorldModelView view_of(const Safetensors& file, const Json& model) {
  const std::string where = "model";
  const std::int64_t critics = model.at("critics", where).count("model.critics");
  if (critics > 1024) {
    throw std::invalid_argument("model.critics must be at most 1024, got " +
                                std::to_string(critics));
  }
  Weights weights(file);
  WorldModelView view;
  view.encoder = weights.stacks("encoder", 1, false)[0];
  view.dynamics = weights.stacks("dynamics", 1, false)[0];
  view.policy = weights.stacks("policy", 1, false)[0];
  view.critics = weights.stacks("critics", static_cast<std::size_t>(critics), true);
  view.termination = weights.stacks("termination", 1, false)[0];
  weights.check_all_taken();
  if (view.encoder.empty()) throw std::invalid_argument("the model has no encoder");
  if (model.at("termination", where).boolean("model.termination") == view.termination.empty()) {
    throw std::invalid_argument("model.termination is not what the tensors say");
  }
  view.simnorm_dim = model.at("simnorm_dim", where).count("model.simnorm_dim");
  view.log_std_min = static_cast<float>(model.at("log_std_min", where).number("log_std_min"));
  view.log_std_max = static_cast<float>(model.at("log_std_max", where).number("log_std_max"));
  return view;
}

// The planner's settings, and the seed and precision that stand among them.
void read_planner(const Json& planner, AgentInfo& info) {
  const auto at = [&](const char* name) -> const Json& { return planner.at(name, "planner"); };
  const auto count = [&](const char* name, std::int64_t most) {
    const std::int64_t value = at(name).count(std::string("planner.") + name);
    if (value > most) {
      throw std::invalid_argument(std::string("planner.") + name + " must be at most " +
                                  std::to_string(most) + ", got " + std::to_string(value));
    }
    return static_cast<std::ptrdiff_t>(value);
  };
  const auto number = [&](const char* name) {
    return at(name).number(std::string("planner.") + name);
  };
  PlannerSettings& s = info.planner;
  s.horizon = count("horizon", kMostSteps);
  s.samples = count("samples", kMostSamples);
  s.elites = count("elites", kMostSamples);
  s.policy_trajectories = count("policy_trajectories", kMostSamples);
  s.iterations = count("iterations", kMostIterations);
  s.temperature = static_cast<float>(number("temperature"));
  s.std_min = static_cast<float>(number("std_min"));
  s.std_max = static_cast<float>(number("std_max"));
  s.discount = static_cast<float>(number("discount"));
  s.enabled = at("enabled").boolean("planner.enabled");
  s.threads = at("threads").is_null() ? 1 : static_cast<int>(count("threads", 256));
  s.budget_us = at("budget_us").is_null() ? 0 : number("budget_us");
  info.seed = static_cast<std::uint64_t>(at("seed").count("planner.seed"));
  info.precision = precision_from_name(at("precision").text("planner.precision"));
}

template <class Value, class Read>
std::vector<Value> list(const Json& values, const std::string& where, std::ptrdiff_t size,
                        Read read) {
  std::vector<Value> result;
  for (const Json& value : values.items(where)) result.push_back(read(value));
  if (static_cast<std::ptrdiff_t>(result.size()) != size) {
    throw std::invalid_argument(where + " must have " + std::to_string(size) + " entries, got " +
                                std::to_string(result.size()));
  }
  return result;
}

// Sizes as the model has them.
void read_interface(const Json& about, std::ptrdiff_t obs_dim, std::ptrdiff_t action_dim,
                    AgentInfo& info) {
  const auto text = [](const char* where) {
    return [where](const Json& value) { return value.text(where); };
  };
  const auto number = [](const char* where) {
    return [where](const Json& value) { return value.number(where); };
  };
  const Json& observation = about.at("observation", "the agent");
  info.observation_names =
      list<std::string>(observation.at("names", "observation"), "observation.names", obs_dim,
                        text("observation.names"));
  const Json& action = about.at("action", "the agent");
  info.action_names = list<std::string>(action.at("names", "action"), "action.names", action_dim,
                                        text("action.names"));
  info.action_low =
      list<double>(action.at("low", "action"), "action.low", action_dim, number("action.low"));
  info.action_high =
      list<double>(action.at("high", "action"), "action.high", action_dim, number("action.high"));
  info.action_repeat =
      static_cast<std::ptrdiff_t>(about.at("action_repeat", "the agent").count("action_repeat"));
  const Json& period = about.at("control_period_s", "the agent");
  if (!period.is_null()) info.control_period = period.number("control_period_s");
  info.task = about.at("task", "the agent").text("task");
}

void apply(const AgentOptions& options, AgentInfo& info) {
  if (options.threads) info.planner.threads = *options.threads;
  if (options.budget_us) info.planner.budget_us = *options.budget_us;
  if (options.planning) info.planner.enabled = *options.planning;
  if (options.precision) info.precision = *options.precision;
  if (options.seed) info.seed = *options.seed;
  info.planner.clock = options.clock;
}

}  // namespace

struct Agent::State {
  AgentInfo info;
  std::unique_ptr<Planner> planner;
};

Agent::Agent(std::unique_ptr<State> state) : state_(std::move(state)) {}
Agent::~Agent() = default;
Agent::Agent(Agent&&) noexcept = default;
Agent& Agent::operator=(Agent&&) noexcept = default;

Agent Agent::load(const std::string& path, const AgentOptions& options) {
  const std::vector<unsigned char> bytes = content_of(path);
  return from_memory(bytes.data(), bytes.size(), options, path);
}

Agent Agent::from_memory(const void* data, std::size_t size, const AgentOptions& options,
                         const std::string& name) {
  const auto* bytes = static_cast<const unsigned char*>(data);
  auto state = std::make_unique<State>();
  std::unique_ptr<WorldModel> model;
  try {
    const Safetensors file = detail::read_safetensors(bytes, size);
    const auto said = [&](const char* key) {
      const auto found = file.metadata.find(key);
      return found == file.metadata.end() ? std::string() : found->second;
    };
    if (said("format") != kFormat) {
      throw AgentError(Reason::damaged, name + " is no agent's file: its format is not " + kFormat);
    }
    if (said("format_version") != std::to_string(IQMPC_AGENT_FORMAT_VERSION)) {
      throw AgentError(Reason::version, name + " has format version " + said("format_version") +
                                            ", this library reads " +
                                            std::to_string(IQMPC_AGENT_FORMAT_VERSION));
    }
    const std::string digest = said("digest");
    if (digest.size() != kDigest || digest_of(bytes, size, digest) != digest) {
      throw AgentError(Reason::damaged,
                       name + " is damaged: its content does not match its digest");
    }
    const Json about = Json::parse(said("agent"));
    const Json& observation = about.at("observation", "the agent");
    if (observation.at("shape", "observation").items("observation.shape").size() != 1) {
      throw AgentError(Reason::unsupported,
                       name + " observes images, which this library does not encode");
    }
    const Json& model_facts = about.at("model", "the agent");
    const WorldModelView view = view_of(file, model_facts);
    AgentInfo& info = state->info;
    read_planner(about.at("planner", "the agent"), info);
    info.entropy_coef = about.at("beta", "the agent").number("beta");
    info.provenance = said("provenance");
    detail::check(info.planner);
    apply(options, info);
    model = std::make_unique<WorldModel>(view, info.precision,
                                         options.isa ? *options.isa : active_isa());
    read_interface(about, model->obs_dim(), model->action_dim(), info);
    const double floats = static_cast<double>(info.planner.samples) *
                          static_cast<double>(info.planner.horizon) *
                          static_cast<double>(model->action_dim());
    if (floats > 1 << 27) {
      throw std::invalid_argument("planner.samples, planner.horizon and the actions are too many");
    }
  } catch (const std::invalid_argument& error) {
    throw AgentError(Reason::damaged, name + " is no agent for this library: " + error.what());
  }
  const AgentInfo& info = state->info;
  state->planner = std::make_unique<Planner>(std::shared_ptr<const WorldModel>(std::move(model)),
                                             info.planner, info.seed);
  return Agent(std::move(state));
}

std::size_t Agent::obs_size() const noexcept {
  return static_cast<std::size_t>(state_->planner->obs_dim());
}
std::size_t Agent::action_size() const noexcept {
  return static_cast<std::size_t>(state_->planner->action_dim());
}
const AgentInfo& Agent::info() const noexcept { return state_->info; }
Planner& Agent::planner() noexcept { return *state_->planner; }
const Planner& Agent::planner() const noexcept { return *state_->planner; }

void Agent::reset() noexcept { state_->planner->reset(); }

PlanResult Agent::act(const float* obs, float* action, bool explore) noexcept {
  return state_->planner->plan(obs, explore, action);
}

PlanResult Agent::act(const std::vector<float>& obs, std::vector<float>& action, bool explore) {
  const auto check = [](const char* what, std::size_t size, std::size_t expected) {
    if (size == expected) return;
    throw std::invalid_argument(std::string(what) + " must have " + std::to_string(expected) +
                                " numbers, got " + std::to_string(size));
  };
  check("obs", obs.size(), obs_size());
  check("action", action.size(), action_size());
  return act(obs.data(), action.data(), explore);
}

void Agent::to_units(const float* action, double* command) const noexcept {
  const AgentInfo& info = state_->info;
  for (std::size_t i = 0; i < info.action_low.size(); ++i) {
    const double low = info.action_low[i], high = info.action_high[i];
    command[i] = low + (static_cast<double>(action[i]) + 1) * 0.5 * (high - low);
  }
}

}  // namespace iqmpc
