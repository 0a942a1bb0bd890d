// In place of a registry of plugins: a function that makes the one there is.
#pragma once

#include <memory>

#define PLUGINLIB_EXPORT_CLASS(Class, Base) \
  std::unique_ptr<Base> make_controller() { return std::make_unique<Class>(); }
