// Counts the calls under way in an object, for a forked process to see: there they never end.
#pragma once

#include <atomic>
#include <mutex>

namespace iqmpc::detail {

// One call, for as long as this lives.
class Call {
 public:
  explicit Call(std::atomic<int>& calls) noexcept : calls_(calls) { calls_.fetch_add(1); }
  ~Call() { calls_.fetch_sub(1); }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

 private:
  std::atomic<int>& calls_;
};

// One that others of its kind wait for; counted before it locks, and until it has unlocked.
class ExclusiveCall {
 public:
  ExclusiveCall(std::atomic<int>& calls, std::mutex& mutex) : call_(calls), lock_(mutex) {}

 private:
  Call call_;
  std::lock_guard<std::mutex> lock_;
};

}  // namespace iqmpc::detail
