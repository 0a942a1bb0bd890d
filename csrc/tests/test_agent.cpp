#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "agent_files.hpp"
#include "allocations.hpp"
#include "check.hpp"
#include "iqmpc.h"
#include "iqmpc/agent.hpp"

namespace {

using iqmpc::Agent;
using iqmpc::AgentError;
using iqmpc::AgentOptions;
using Floats = std::vector<float>;
using Reason = AgentError::Reason;

Sizes small(bool termination) {
  Sizes sizes;
  sizes.hidden = 9;
  sizes.encoder = 7;
  sizes.latent = 16;
  sizes.termination = termination;
  return sizes;
}

Agent loaded(const std::string& bytes, const AgentOptions& options = {}) {
  return Agent::from_memory(bytes.data(), bytes.size(), options, "agent.iqmpc");
}

void refused(const std::string& bytes, Reason reason, const std::string& said) {
  try {
    loaded(bytes);
  } catch (const AgentError& error) {
    if (error.reason == reason && std::string(error.what()).find(said) != std::string::npos) return;
    std::fprintf(stderr, "expected \"%s\", got \"%s\"\n", said.c_str(), error.what());
    std::exit(1);
  }
  std::fprintf(stderr, "taken, where \"%s\" was expected\n", said.c_str());
  std::exit(1);
}

void acts_as_a_planner_of_the_same_model() {
  for (const bool termination : {false, true}) {
    const RandomModel model(small(termination));
    iqmpc::PlannerSettings s;
    s.samples = 40;
    s.elites = 8;
    s.policy_trajectories = 6;
    s.iterations = 2;
    s.discount = 0.97f;
    iqmpc::Planner planner(model.pack(), s, 7);
    Agent agent = loaded(agent_file(model.view));
    CHECK(agent.obs_size() == 5 && agent.action_size() == 3);
    Floats action(3), expected(3);
    for (int i = 0; i < 20; ++i) {
      const Floats obs = normal_floats(5, 100 + static_cast<unsigned>(i));
      if (i == 10) agent.reset(), planner.reset();
      planner.plan(obs.data(), i % 2 == 1, expected.data());
      CHECK(agent.act(obs, action, i % 2 == 1).iterations == 2);
      CHECK(action == expected);
    }
    const Floats obs(5);
    const long before = allocations;
    CHECK(before > 0);  // they are counted
    agent.act(obs.data(), action.data());
    CHECK(allocations == before);
  }
}

void says_what_it_is() {
  const RandomModel model(small(false));
  Agent agent = loaded(agent_file(model.view));
  const iqmpc::AgentInfo& info = agent.info();
  CHECK(info.task == "point" && info.action_repeat == 2 && *info.control_period == 0.05);
  CHECK(info.observation_names[2] == "\u03b8" && info.action_names[2] == "z");
  CHECK(info.seed == 7 && info.entropy_coef == 0.0003 && info.planner.threads == 1);
  const float action[] = {-1, 0, 1};
  double command[3];
  agent.to_units(action, command);
  CHECK(command[0] == -1 && command[1] == 0 && command[2] == 4);
  AgentText text;
  text.period = "null";
  CHECK(!loaded(agent_file(model.view, text)).info().control_period);
}

void options_replace_what_the_file_says() {
  const RandomModel model(small(false));
  const std::string bytes = agent_file(model.view);
  AgentOptions options;
  options.threads = 2;
  options.budget_us = 1e9;
  options.planning = false;
  options.precision = iqmpc::Precision::bf16;
  options.seed = 3;
  options.isa = iqmpc::Isa::portable;
  const Agent agent = loaded(bytes, options);
  const iqmpc::PlannerSettings& s = agent.planner().settings();
  CHECK(s.threads == 2 && s.budget_us == 1e9 && !s.enabled && agent.info().seed == 3);
  options.threads = 0;
  CHECK(!message_of<std::invalid_argument>([&] { loaded(bytes, options); }).empty());
  Agent other = loaded(bytes);
  Floats obs(4), action(3);
  CHECK(message_of<std::invalid_argument>([&] { other.act(obs, action); }) ==
        "obs must have 5 numbers, got 4");
}

void refuses_what_is_no_agent() {
  const RandomModel model(small(true));
  const std::string good = agent_file(model.view);
  AgentText text;
  const auto spoilt = [&] { return agent_file(model.view, text); };
  text.version = "2";
  refused(spoilt(), Reason::version, "format version 2, this library reads 1");
  text = {};
  text.format = "iqmpc-checkpoint";
  refused(spoilt(), Reason::damaged, "is no agent's file");
  text = {};
  text.shape = "[9, 64, 64]";
  refused(spoilt(), Reason::unsupported, "observes images");
  text = {};
  text.names = R"(["a"])";
  refused(spoilt(), Reason::damaged, "observation.names must have 5 entries, got 1");
  text = {};
  text.low = "[1, 2, \"3\"]";
  refused(spoilt(), Reason::damaged, "action.low must be a number");
  text = {};
  text.repeat = "1.5";
  refused(spoilt(), Reason::damaged, "action_repeat must be a whole number");
  const std::string planner = AgentText().planner;
  const auto with = [&](const std::string& from, const std::string& to) {
    text = {};
    text.planner.replace(planner.find(from), from.size(), to);
    return spoilt();
  };
  refused(with("\"elites\": 8", "\"elites\": 41"), Reason::damaged,
          "elites must be at most samples = 40, got 41");
  refused(with("\"samples\": 40", "\"samples\": 1e9"), Reason::damaged,
          "planner.samples must be at most 65536");
  refused(with("\"horizon\": 3", "\"horizons\": 3"), Reason::damaged, "planner has no \"horizon\"");
  refused(with("float32", "float64"), Reason::damaged, "float64");
  refused(with("0.97", "1e999"), Reason::damaged, "a number beyond");
  refused("", Reason::damaged, "too short");
  refused(good.substr(0, good.size() - 4), Reason::damaged, "");
  refused(good + "    ", Reason::damaged, "unused bytes behind");
  CHECK(message_of<AgentError>([] { Agent::load("/nowhere/agent"); }).find("cannot be read") !=
        std::string::npos);
  CHECK(message_of<AgentError>([] { Agent::load("/"); }).find("it is no file") !=
        std::string::npos);
  CHECK(message_of<AgentError>([] { Agent::load("/dev/zero"); }).find("it is no file") !=
        std::string::npos);
}

// Of another model's tensors, whole but not what the rest says.
void refuses_tensors_that_do_not_fit() {
  const RandomModel model(small(true));
  iqmpc::WorldModelView view = model.view;
  view.encoder.clear();
  refused(agent_file(view), Reason::damaged, "the model has no encoder");
  view = model.view;
  view.dynamics[1].in = 8;
  refused(agent_file(view), Reason::damaged, "dynamics layer 1: expected 9 inputs, got 8");
  view = model.view;
  view.critics.resize(1);
  refused(agent_file(view), Reason::damaged, "critics: expected at least 2");
  view = model.view;
  view.policy[0].gamma = view.policy[0].beta = nullptr;
  refused(agent_file(view), Reason::damaged, "policy layer 0: needs weight, bias, gamma and beta");
  std::string good = agent_file(model.view);
  good.replace(good.find("\\\"critics\\\": 3"), 14, "\\\"critics\\\": 4");
  refused(with_digest(good), Reason::damaged, "must be of 4 critics");
  good = agent_file(model.view);
  good.replace(good.find("policy.2.bias"), 13, "police.2.bias");
  refused(with_digest(good), Reason::damaged, "");
}

void every_flipped_byte_is_seen() {
  const RandomModel model(small(false));
  std::string bytes = agent_file(model.view);
  const std::size_t header = bytes.size() < 6000 ? bytes.size() : 6000;
  for (std::size_t i = 0; i < bytes.size(); i += i < header ? 1 : 17) {
    const char was = bytes[i];
    bytes[i] = static_cast<char>(was ^ (1 << (i % 8)));
    try {
      loaded(bytes);
      std::fprintf(stderr, "byte %zu was flipped and nobody saw\n", i);
      std::exit(1);
    } catch (const AgentError&) {
    }
    bytes[i] = was;
  }
  loaded(bytes);
}

// Headers with sizes, offsets and names that cannot be; no digest is looked at before them.
void the_reader_is_strict() {
  const std::string data(16, '\0');
  const auto tensor = [](const std::string& name, const std::string& shape, int begin, int end) {
    return quoted(name) + R"(:{"dtype":"F32","shape":)" + shape + R"(,"data_offsets":[)" +
           std::to_string(begin) + "," + std::to_string(end) + "]}";
  };
  const auto says = [&](const std::string& header, const std::string& said) {
    refused(with_length(header, data), Reason::damaged, said);
  };
  says("{" + tensor("a", "[4]", 0, 16) + "}", "is no agent's file");  // else whole
  says("{" + tensor("a", "[4]", 0, 16) + "," + tensor("a", "[4]", 0, 16) + "}", "comes twice");
  says("{" + tensor("a", "[2]", 0, 8) + "," + tensor("b", "[3]", 4, 16) + "}", "overlaps");
  says("{" + tensor("a", "[1]", 0, 4) + "," + tensor("b", "[2]", 8, 16) + "}", "unused bytes");
  says("{" + tensor("a", "[3]", 0, 12) + "}", "unused bytes behind");
  says("{" + tensor("a", "[4]", 0, 20) + "}", "must lie in the 16 bytes");
  says("{" + tensor("a", "[4]", 16, 0) + "}", "must lie in the 16 bytes");
  says("{" + tensor("a", "[3]", 0, 16) + "}", "takes 12 bytes, its data_offsets are 16 apart");
  says("{" + tensor("a", "[3]", 1, 13) + "}", "does not start at a multiple of 4");
  says("{" + tensor("a", "[4611686018427387905]", 0, 4) + "}", "must be a whole number");
  says("{" + tensor("a", "[65536,65536,65536,65536]", 0, 16) + "}", "needs more than");
  says("{" + tensor("a", "[0]", 0, 0) + "}", "a side of 0");
  says("{" + tensor("a", "[-4]", 0, 16) + "}", "must be a whole number");
  says("{" + tensor("a", "4", 0, 16) + "}", "must be an array");
  says(R"({"a":{"dtype":"F16","shape":[8],"data_offsets":[0,16]}})", "must be F32, got F16");
  says(R"({"a":{"dtype":"F32","shape":[4]}})", "has no \"data_offsets\"");
  says(R"({"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16],"x":1}})", "has \"x\"");
  says(R"({"a":{"dtype":"F32","shape":[4],"data_offsets":[0]}})", "must be two numbers");
  says(R"({"__metadata__":{"a":1}})", "must be a string");
  says("[]", "does not start with '{'");
  says("", "does not start with '{'");
  for (const char* text : {"{",
                           "{}x",
                           "{\"a\"}",
                           "{\"a\":}",
                           "{\"a\":01}",
                           "{\"a\":1.}",
                           "{\"a\":-}",
                           "{\"a\":+1}",
                           "{\"a\":.5}",
                           "{\"a\":1e}",
                           "{\"a\":nan}",
                           "{\"a\":tru}",
                           "{\"a\":\"\\x\"}",
                           "{\"a\":\"\\ud800\"}",
                           "{\"a\":\"\\udc00\"}",
                           "{\"a\":\"\\u12g4\"}",
                           "{\"a\":\"\n\"}",
                           "{\"a\":\"\xff\"}",
                           "{\"a\":\"\xc0\x80\"}",
                           "{\"a\":\"\xed\xa0\x80\"}",
                           "{\"a\":\"",
                           "{\"a\":[1,]}",
                           "{,}",
                           "{\"a\":1,}",
                           "{\"a\":\"\\"}) {
    says(text, "JSON");
  }
  says("{\"a\":" + std::string(100, '[') + std::string(100, ']') + "}", "nested too deep");
  std::string huge = with_length("{}", data);
  for (const std::uint64_t length :
       {std::uint64_t{1} << 23, std::uint64_t{1} << 63, ~std::uint64_t{0}, std::uint64_t{19}}) {
    std::memcpy(huge.data(), &length, 8);
    refused(huge, Reason::damaged, "its header claims");
  }
}

// Whatever is changed in a file, also where its digest is made to fit again: it is refused, or is
// an agent that acts.
void nothing_ends_the_process() {
  std::mt19937 random(1);
  const auto below = [&](std::size_t n) { return static_cast<std::size_t>(random() % n); };
  const RandomModel one(small(false)), two(small(true));
  const std::string files[] = {agent_file(one.view), agent_file(two.view)};
  const std::vector<std::string> words = {"0",          "-1",
                                          "1e308",      "9007199254740993",
                                          "4294967296", "\"",
                                          "[",          "]",
                                          "{",          "}",
                                          ",",          ":",
                                          "null",       "true",
                                          "[]",         "\\u0",
                                          "\\\\",       "F16",
                                          "1.5",        "99",
                                          "encoder",    "critics.0.weight",
                                          "2147483648", "\xff",
                                          "-0"};
  int taken = 0;
#if defined(__SANITIZE_THREAD__)
  const int rounds = 500;
#else
  const int rounds = 6000;
#endif
  for (int round = 0; round < rounds; ++round) {
    std::string bytes = files[below(2)];
    std::uint64_t length = 0;
    std::memcpy(&length, bytes.data(), 8);
    std::size_t header = 8 + static_cast<std::size_t>(length);
    for (std::size_t edits = 1 + below(3); edits > 0 && bytes.size() > header; --edits) {
      const std::size_t before = bytes.size(), at = below(below(4) != 0 ? header : before);
      switch (below(6)) {
        case 0:
          bytes[at] = static_cast<char>(bytes[at] ^ (1 << below(8)));
          break;
        case 1:
          bytes[at] = static_cast<char>(random());
          break;
        case 2:
          bytes.erase(at, 1 + below(16));
          break;
        case 3:
          bytes.insert(at, words[below(words.size())]);
          break;
        case 4: {
          const std::string& word = words[below(words.size())];
          bytes.replace(at, std::min(word.size(), before - at), word);
          break;
        }
        default: {  // a number becomes another
          const std::size_t digit = bytes.find_first_of("0123456789", at);
          if (digit != bytes.npos) bytes[digit] = static_cast<char>('0' + below(10));
        }
      }
      if (at < header) header += bytes.size() - before;  // modulo its size: it may have shrunk
    }
    if (below(8) != 0 && header > 8) {
      length = header - 8;
      std::memcpy(bytes.data(), &length, 8);
      bytes = with_digest(bytes);
    }
    try {
      Agent agent = loaded(bytes);
      Floats obs(agent.obs_size(), 0.5f), action(agent.action_size());
      agent.act(obs, action, true);
      for (const float a : action) CHECK(std::isfinite(a) && std::abs(a) <= 1);
      ++taken;
    } catch (const AgentError& error) {
      CHECK(std::strlen(error.what()) > 10);
    } catch (const std::bad_alloc&) {
    }
  }
  CHECK(taken > 0 && taken < rounds);  // both ends are reached
}

void digests() {
  const auto hex = [](const std::string& text) {
    iqmpc::detail::Sha256 hash;
    hash.add(text.data(), text.size());
    return hash.hex();
  };
  CHECK(hex("") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  CHECK(hex("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  CHECK(hex("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq") ==
        "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  CHECK(hex(std::string(1000000, 'a')) ==
        "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

void the_c_interface() {
  CHECK(std::string(iqmpc_version()) == IQMPC_VERSION_STRING);
  const RandomModel model(small(true));
  const std::string bytes = agent_file(model.view);
  iqmpc_agent* agent = nullptr;
  CHECK(iqmpc_agent_load(nullptr, nullptr, &agent) == IQMPC_INVALID_ARGUMENT);
  CHECK(iqmpc_agent_load("/nowhere", nullptr, &agent) == IQMPC_UNREADABLE && agent == nullptr);
  CHECK(std::string(iqmpc_last_error()).find("/nowhere cannot be read") == 0);
  CHECK(iqmpc_agent_from_memory(bytes.data(), 9, nullptr, &agent) == IQMPC_DAMAGED);
  AgentText text;
  text.version = "9";
  const std::string newer = agent_file(model.view, text);
  CHECK(iqmpc_agent_from_memory(newer.data(), newer.size(), nullptr, &agent) ==
        IQMPC_WRONG_VERSION);
  text = {};
  text.shape = "[3, 64, 64]";
  const std::string images = agent_file(model.view, text);
  CHECK(iqmpc_agent_from_memory(images.data(), images.size(), nullptr, &agent) ==
        IQMPC_UNSUPPORTED);
  iqmpc_options options = iqmpc_default_options();
  options.isa = "abacus";
  CHECK(iqmpc_agent_from_memory(bytes.data(), bytes.size(), &options, &agent) ==
        IQMPC_INVALID_ARGUMENT);
  CHECK(std::string(iqmpc_last_error()).find("abacus") != std::string::npos);
  options.size = 3;
  CHECK(iqmpc_agent_from_memory(bytes.data(), bytes.size(), &options, &agent) ==
        IQMPC_INVALID_ARGUMENT);
  options = iqmpc_default_options();
  options.isa = "portable";
  options.threads = 2;
  CHECK(iqmpc_agent_from_memory(bytes.data(), bytes.size(), &options, &agent) == IQMPC_OK);

  CHECK(iqmpc_agent_obs_size(agent) == 5 && iqmpc_agent_action_size(agent) == 3);
  CHECK(std::string(iqmpc_agent_task(agent)) == "point");
  CHECK(std::string(iqmpc_agent_obs_name(agent, 4)) == "e");
  CHECK(iqmpc_agent_obs_name(agent, 5) == nullptr);
  CHECK(std::string(iqmpc_agent_action_name(agent, 0)) == "x");
  CHECK(iqmpc_agent_action_low(agent, 1) == -2 && iqmpc_agent_action_high(agent, 2) == 4);
  CHECK(std::isnan(iqmpc_agent_action_high(agent, 3)));
  CHECK(iqmpc_agent_control_period(agent) == 0.05 && iqmpc_agent_action_repeat(agent) == 2);

  AgentOptions same;
  same.isa = iqmpc::Isa::portable;
  Agent expected = loaded(bytes, same);
  Floats obs = normal_floats(5, 1), action(3), other(3);
  iqmpc_plan plan;
  CHECK(iqmpc_agent_reset(agent) == IQMPC_OK);
  CHECK(iqmpc_agent_act(agent, obs.data(), 5, action.data(), 3, 1, &plan) == IQMPC_OK);
  expected.act(obs, other, true);
  CHECK(action == other && plan.iterations == 2 && plan.samples == 74 && plan.elapsed_us > 0);
  CHECK(iqmpc_agent_act(agent, obs.data(), 5, action.data(), 3, 0, nullptr) == IQMPC_OK);
  CHECK(iqmpc_agent_act(agent, obs.data(), 4, action.data(), 3, 0, nullptr) ==
        IQMPC_INVALID_ARGUMENT);
  CHECK(std::string(iqmpc_last_error()) == "obs must have 5 numbers, got 4");
  CHECK(iqmpc_agent_act(agent, obs.data(), 5, action.data(), 2, 0, nullptr) ==
        IQMPC_INVALID_ARGUMENT);
  CHECK(iqmpc_agent_act(nullptr, obs.data(), 5, action.data(), 3, 0, nullptr) ==
        IQMPC_INVALID_ARGUMENT);
  iqmpc_statistics statistics;
  CHECK(iqmpc_agent_statistics(agent, &statistics) == IQMPC_OK);
  CHECK(statistics.plans == 2 && statistics.late == 0 && statistics.max_us >= statistics.p50_us);
  iqmpc_agent_free(agent);
  iqmpc_agent_free(nullptr);
  CHECK(iqmpc_agent_obs_size(nullptr) == 0 && iqmpc_agent_task(nullptr) == nullptr);
}

}  // namespace

int main() {
  digests();
  acts_as_a_planner_of_the_same_model();
  says_what_it_is();
  options_replace_what_the_file_says();
  refuses_what_is_no_agent();
  refuses_tensors_that_do_not_fit();
  the_reader_is_strict();
  every_flipped_byte_is_seen();
  the_c_interface();
  nothing_ends_the_process();
  return 0;
}
