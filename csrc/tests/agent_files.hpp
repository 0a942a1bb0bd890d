// Files of agents, made of random models, as `iqmpc export` writes them.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "cpu/sha256.hpp"
#include "models.hpp"

// Parts of a file's header, to be spoiled before it is written.
struct AgentText {
  std::string format = "iqmpc-agent", version = "1";
  std::string planner =
      R"({"horizon": 3, "samples": 40, "elites": 8, "policy_trajectories": 6, "iterations": 2,)"
      R"( "temperature": 0.5, "std_min": 0.05, "std_max": 2.0, "discount": 0.97, "enabled": true,)"
      R"( "threads": null, "budget_us": null, "seed": 7, "precision": "float32", "mode": "eager"})";
  std::string shape = "[5]";
  std::string names = R"(["a", "b", "\u03b8", "d", "e"])";
  std::string low = "[-1, -2, 0]";
  std::string repeat = "2", period = "0.05";
};

inline std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    out += c;
  }
  return out + "\"";
}

// The bytes with the digest of what they are now.
inline std::string with_digest(std::string bytes) {
  const std::string key = "\"digest\":\"";
  const std::size_t at = bytes.find(key);
  if (at == bytes.npos || at + key.size() + 64 > bytes.size()) return bytes;
  bytes.replace(at + key.size(), 64, std::string(64, '0'));
  iqmpc::detail::Sha256 hash;
  hash.add(bytes.data(), bytes.size());
  return bytes.replace(at + key.size(), 64, hash.hex());
}

inline std::string with_length(const std::string& header, const std::string& data) {
  std::string bytes;
  for (int i = 0; i < 8; ++i) bytes += static_cast<char>(std::uint64_t{header.size()} >> (8 * i));
  return bytes + header + data;
}

inline std::string agent_file(const iqmpc::WorldModelView& view, const AgentText& text = {}) {
  std::string tensors, data;
  const auto add = [&](const std::string& name, const std::string& shape,
                       const std::vector<std::pair<const float*, std::ptrdiff_t>>& parts) {
    const std::size_t begin = data.size();
    for (const auto& [values, count] : parts) {
      data.append(reinterpret_cast<const char*>(values), static_cast<std::size_t>(count) * 4);
    }
    tensors += "," + quoted(name) + R"(:{"dtype":"F32","shape":)" + shape + R"(,"data_offsets":[)" +
               std::to_string(begin) + "," + std::to_string(data.size()) + "]}";
  };
  // The same layer of each of `stacks`; stacked where there are several.
  const auto part = [&](const std::string& name,
                        const std::vector<std::vector<iqmpc::LinearView>>& stacks, bool stacked) {
    for (std::size_t i = 0; !stacks.empty() && i < stacks[0].size(); ++i) {
      const iqmpc::LinearView& first = stacks[0][i];
      const std::string lead = stacked ? std::to_string(stacks.size()) + "," : "";
      const std::string out = std::to_string(first.out), at = name + "." + std::to_string(i) + ".";
      const auto each = [&](const float* iqmpc::LinearView::* field, std::ptrdiff_t count) {
        std::vector<std::pair<const float*, std::ptrdiff_t>> parts;
        for (const auto& stack : stacks) parts.emplace_back(stack[i].*field, count);
        return parts;
      };
      using View = iqmpc::LinearView;
      add(at + "weight", "[" + lead + out + "," + std::to_string(first.in) + "]",
          each(&View::weight, first.out * first.in));
      add(at + "bias", "[" + lead + out + "]", each(&View::bias, first.out));
      if (first.gamma == nullptr) continue;
      add(at + "gamma", "[" + lead + out + "]", each(&View::gamma, first.out));
      add(at + "beta", "[" + lead + out + "]", each(&View::beta, first.out));
    }
  };
  part("encoder", {view.encoder}, false);
  part("dynamics", {view.dynamics}, false);
  part("policy", {view.policy}, false);
  part("critics", view.critics, true);
  if (!view.termination.empty()) part("termination", {view.termination}, false);
  const std::string model = R"({"critics": )" + std::to_string(view.critics.size()) +
                            R"(, "simnorm_dim": )" + std::to_string(view.simnorm_dim) +
                            R"(, "log_std_min": -10.0, "log_std_max": 2.0, "termination": )" +
                            (view.termination.empty() ? "false" : "true") + "}";
  const std::string agent =
      R"({"task": "point", "model": )" + model + R"(, "planner": )" + text.planner +
      R"(, "discount": 0.97, "beta": 0.0003, "observation": {"names": )" + text.names +
      R"(, "shape": )" + text.shape + R"(}, "action": {"names": ["x", "y", "z"], "low": )" +
      text.low + R"(, "high": [1, 2, 4]}, "action_repeat": )" + text.repeat +
      R"(, "control_period_s": )" + text.period + "}";
  const std::string header = R"({"__metadata__":{"digest":")" + std::string(64, '0') +
                             R"(","format":)" + quoted(text.format) + R"(,"format_version":)" +
                             quoted(text.version) + R"(,"agent":)" + quoted(agent) +
                             R"(,"provenance":"{}"})" + tensors + "}";
  return with_digest(with_length(header, data));
}
