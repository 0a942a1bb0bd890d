// An agent's actions for what comes on the standard input: `actions AGENT < records > actions`. A
// record is float32: whether an episode begins, whether to explore, the observation.

#include <cstdio>
#include <exception>
#include <vector>

#include "iqmpc/agent.hpp"

int main(int, char** argv) {
  try {
    iqmpc::Agent agent = iqmpc::Agent::load(argv[1]);
    std::vector<float> record(2 + agent.obs_size()), action(agent.action_size());
    while (std::fread(record.data(), sizeof(float), record.size(), stdin) == record.size()) {
      if (record[0] != 0) agent.reset();
      agent.act(record.data() + 2, action.data(), record[1] != 0);
      std::fwrite(action.data(), sizeof(float), action.size(), stdout);
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
