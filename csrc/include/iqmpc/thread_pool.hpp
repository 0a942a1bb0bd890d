// A persistent pool for short parallel loops.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

#include "iqmpc/export.hpp"

namespace iqmpc {

// Workers spin for a moment after each loop, so that the next one starts without a system call, and
// then sleep; for a shorter moment where others want the machine's cores. One caller at a time:
// `run` must not be called from two threads at once. In a process that was forked there are no
// workers: the caller does everything, with the same results.
class IQMPC_API ThreadPool {
 public:
  // `threads` includes the caller; throws std::invalid_argument below 1 or above kMaxThreads, and
  // std::system_error where a thread cannot be started.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  static constexpr int kMaxThreads = 1024;

  int threads() const noexcept { return static_cast<int>(workers_->size()) + 1; }

  // Whether this process was forked since the pool was made.
  bool forked() const noexcept;

  // Calls f(task, thread) for every task in [0, tasks), thread in [0, threads()), and returns when
  // all are done. Tasks are taken one by one, by whoever is free; f must not throw. Up to 2^24 - 1
  // tasks.
  template <class F>
  void run(std::ptrdiff_t tasks, F&& f) noexcept {
    Job job{[](void* context, std::ptrdiff_t task, int thread) {
              (*static_cast<std::remove_reference_t<F>*>(context))(task, thread);
            },
            &f};
    run_job(job, tasks);
  }

  // Starts waking sleepers, for a caller that will soon have work for them.
  void wake() noexcept;

 private:
  struct Job {
    void (*call)(void* context, std::ptrdiff_t task, int thread) = nullptr;
    void* context = nullptr;
  };

  void run_job(const Job& job, std::ptrdiff_t tasks) noexcept;
  void work(int thread) noexcept;
  bool take(int thread) noexcept;
  template <class Done>
  bool spin(Done&& done) noexcept;

  // Task count and next task in one word: a worker that comes late to a finished loop cannot take a
  // task of the next one under the old count.
  std::atomic<std::uint64_t> ticket_{0};
  std::atomic<std::ptrdiff_t> done_{0};
  std::atomic<std::uint32_t> calls_{0};  // to be awake: incremented by wake()
  std::atomic<int> asleep_{0};
  std::atomic<std::int64_t> woken_{0};  // when sleepers were last, in nanoseconds
  std::atomic<int> patience_;           // nanoseconds that a thread spins
  std::atomic<bool> caller_asleep_{false};
  std::atomic<bool> stop_{false};
  Job job_;
  const long process_;
  // A forked process leaves both as they are: it has none of these threads to wait for, and what
  // they wait in would wait for them.
  struct Sleep {
    std::mutex mutex;
    std::condition_variable workers, caller;
  };
  std::unique_ptr<Sleep> sleep_;
  std::unique_ptr<std::vector<std::thread>> workers_;
};

}  // namespace iqmpc
