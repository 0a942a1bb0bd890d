// Drives the controller as a controller manager does: `run_controller AGENT TICKS`. Prints each
// tick's commands.

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "controller_interface/controller_interface.hpp"
#include "iqmpc/agent.hpp"

std::unique_ptr<controller_interface::ControllerInterface> make_controller();

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: run_controller AGENT TICKS\n");
    return 2;
  }
  using controller_interface::CallbackReturn;
  const iqmpc::Agent agent = iqmpc::Agent::load(argv[1]);
  const auto controller = make_controller();
  if (controller->on_init() != CallbackReturn::SUCCESS) return 1;
  auto& parameters = controller->get_node()->parameters;
  parameters["agent"] = std::string(argv[1]);
  parameters["state_interfaces"] = agent.info().observation_names;
  parameters["command_interfaces"] = agent.info().action_names;
  if (controller->on_configure({}) != CallbackReturn::SUCCESS) return 1;
  std::vector<double> states(controller->state_interface_configuration().names.size(), 0.5);
  std::vector<double> commands(controller->command_interface_configuration().names.size());
  for (double& state : states) controller->state_interfaces_.push_back({&state});
  for (double& command : commands) controller->command_interfaces_.push_back({&command});
  if (controller->on_activate({}) != CallbackReturn::SUCCESS) return 1;
  for (int tick = 0; tick < std::atoi(argv[2]); ++tick) {
    if (controller->update({}, {}) != controller_interface::return_type::OK) return 1;
    for (const double command : commands) std::printf("%.17g ", command);
    std::printf("\n");
  }
  return controller->on_deactivate({}) == CallbackReturn::SUCCESS ? 0 : 1;
}
