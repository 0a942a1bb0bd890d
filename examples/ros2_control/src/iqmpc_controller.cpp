// An agent's file as a ros2_control controller: it reads state interfaces, plans and commands.

#include <algorithm>
#include <cmath>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#include "controller_interface/controller_interface.hpp"
#include "iqmpc/agent.hpp"
#include "pluginlib/class_list_macros.hpp"

namespace iqmpc_controller {

using controller_interface::CallbackReturn;
using controller_interface::InterfaceConfiguration;
using controller_interface::return_type;

class IqmpcController : public controller_interface::ControllerInterface {
 public:
  CallbackReturn on_init() override {
    auto_declare<std::string>("agent", "");
    auto_declare<std::vector<std::string>>("state_interfaces", {});
    auto_declare<std::vector<std::string>>("command_interfaces", {});
    auto_declare<double>("budget_us", -1.0);
    auto_declare<int>("threads", 0);
    return CallbackReturn::SUCCESS;
  }

  InterfaceConfiguration state_interface_configuration() const override {
    return {controller_interface::interface_configuration_type::INDIVIDUAL, states_};
  }

  InterfaceConfiguration command_interface_configuration() const override {
    return {controller_interface::interface_configuration_type::INDIVIDUAL, commands_};
  }

  // Everything that takes memory or time: the file, its threads, the first plans.
  CallbackReturn on_configure(const rclcpp_lifecycle::State&) override {
    const auto node = get_node();
    try {
      iqmpc::AgentOptions options;
      const double budget_us = node->get_parameter("budget_us").as_double();
      const auto threads = node->get_parameter("threads").as_int();
      if (budget_us >= 0) options.budget_us = budget_us;
      if (threads > 0) options.threads = static_cast<int>(threads);
      agent_ = std::make_unique<iqmpc::Agent>(
          iqmpc::Agent::load(node->get_parameter("agent").as_string(), options));
    } catch (const std::exception& error) {
      RCLCPP_ERROR(node->get_logger(), "%s", error.what());
      return CallbackReturn::ERROR;
    }
    states_ = node->get_parameter("state_interfaces").as_string_array();
    commands_ = node->get_parameter("command_interfaces").as_string_array();
    if (states_.size() != agent_->obs_size() || commands_.size() != agent_->action_size()) {
      RCLCPP_ERROR(node->get_logger(),
                   "the agent takes %zu numbers and gives %zu, there are %zu state interfaces and "
                   "%zu command interfaces",
                   agent_->obs_size(), agent_->action_size(), states_.size(), commands_.size());
      return CallbackReturn::ERROR;
    }
    obs_.resize(states_.size());
    action_.resize(commands_.size());
    units_.resize(commands_.size());
    return CallbackReturn::SUCCESS;
  }

  CallbackReturn on_activate(const rclcpp_lifecycle::State&) override {
    agent_->reset();
    return CallbackReturn::SUCCESS;
  }

  CallbackReturn on_deactivate(const rclcpp_lifecycle::State&) override {
    return CallbackReturn::SUCCESS;
  }

  // In the real-time thread: allocates nothing.
  return_type update(const rclcpp::Time&, const rclcpp::Duration&) override {
    for (std::size_t i = 0; i < obs_.size(); ++i) {
      obs_[i] = static_cast<float>(state_interfaces_[i].get_value());
    }
    if (!std::all_of(obs_.begin(), obs_.end(), [](float x) { return std::isfinite(x); })) {
      return return_type::ERROR;  // a sensor without a value; the manager deactivates us
    }
    agent_->act(obs_.data(), action_.data());
    agent_->to_units(action_.data(), units_.data());
    for (std::size_t i = 0; i < units_.size(); ++i) command_interfaces_[i].set_value(units_[i]);
    return return_type::OK;
  }

 private:
  std::unique_ptr<iqmpc::Agent> agent_;
  std::vector<std::string> states_, commands_;
  std::vector<float> obs_, action_;
  std::vector<double> units_;
};

}  // namespace iqmpc_controller

PLUGINLIB_EXPORT_CLASS(iqmpc_controller::IqmpcController, controller_interface::ControllerInterface)
