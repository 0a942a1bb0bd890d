// What of ros2_control the controller uses, for machines without ROS: enough to compile and to run
// it by hand, nothing more. Names and signatures are those of controller_interface (Humble).
#pragma once

#include <cstdint>
#include <cstdio>
#include <map>
#include <memory>
#include <string>
#include <variant>
#include <vector>

namespace rclcpp {

struct Time {};
struct Duration {};
struct Logger {};

class Parameter {
 public:
  using Value = std::variant<std::string, std::vector<std::string>, double, std::int64_t>;
  explicit Parameter(Value value) : value_(std::move(value)) {}
  std::string as_string() const { return std::get<std::string>(value_); }
  std::vector<std::string> as_string_array() const {
    return std::get<std::vector<std::string>>(value_);
  }
  double as_double() const { return std::get<double>(value_); }
  std::int64_t as_int() const { return std::get<std::int64_t>(value_); }

 private:
  Value value_;
};

}  // namespace rclcpp

#define RCLCPP_ERROR(logger, ...) \
  ((void)(logger), std::fprintf(stderr, __VA_ARGS__), std::fputc('\n', stderr))

namespace rclcpp_lifecycle {

struct State {};

struct LifecycleNode {
  rclcpp::Parameter get_parameter(const std::string& name) const {
    return rclcpp::Parameter(parameters.at(name));
  }
  rclcpp::Logger get_logger() const { return {}; }

  std::map<std::string, rclcpp::Parameter::Value> parameters;
};

}  // namespace rclcpp_lifecycle

namespace controller_interface {

enum class CallbackReturn { SUCCESS, FAILURE, ERROR };
enum class return_type { OK, ERROR };
enum class interface_configuration_type { ALL, INDIVIDUAL, NONE };

struct InterfaceConfiguration {
  interface_configuration_type type;
  std::vector<std::string> names;
};

// A state or command interface that the controller manager lends.
struct LoanedInterface {
  double* value;
  double get_value() const { return *value; }
  void set_value(double given) { *value = given; }
};

class ControllerInterface {
 public:
  virtual ~ControllerInterface() = default;
  virtual CallbackReturn on_init() = 0;
  virtual InterfaceConfiguration state_interface_configuration() const = 0;
  virtual InterfaceConfiguration command_interface_configuration() const = 0;
  virtual CallbackReturn on_configure(const rclcpp_lifecycle::State&) = 0;
  virtual CallbackReturn on_activate(const rclcpp_lifecycle::State&) = 0;
  virtual CallbackReturn on_deactivate(const rclcpp_lifecycle::State&) = 0;
  virtual return_type update(const rclcpp::Time&, const rclcpp::Duration&) = 0;

  std::shared_ptr<rclcpp_lifecycle::LifecycleNode> get_node() const { return node_; }

  // What the manager does, for whoever runs a controller by hand.
  std::vector<LoanedInterface> state_interfaces_, command_interfaces_;

 protected:
  template <class T>
  void auto_declare(const std::string& name, const T& value) {
    if constexpr (std::is_integral_v<T>) {
      node_->parameters.emplace(name, static_cast<std::int64_t>(value));
    } else {
      node_->parameters.emplace(name, value);
    }
  }

 private:
  std::shared_ptr<rclcpp_lifecycle::LifecycleNode> node_ =
      std::make_shared<rclcpp_lifecycle::LifecycleNode>();
};

}  // namespace controller_interface
