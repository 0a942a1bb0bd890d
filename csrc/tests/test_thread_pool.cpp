#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <thread>
#include <vector>

#include "check.hpp"
#include "iqmpc/thread_pool.hpp"

namespace {

using iqmpc::ThreadPool;

void every_task_once(int threads) {
  ThreadPool pool(threads);
  CHECK(pool.threads() == threads);
  for (int round = 0; round < 3000; ++round) {
    const std::ptrdiff_t tasks = round % 23;
    std::vector<std::atomic<int>> calls(static_cast<std::size_t>(tasks));
    std::vector<int> by(static_cast<std::size_t>(threads));
    pool.run(tasks, [&](std::ptrdiff_t task, int thread) {
      ++calls[static_cast<std::size_t>(task)];
      ++by[static_cast<std::size_t>(thread)];  // a thread's own: no two have one number
    });
    int total = 0;
    for (const int count : by) total += count;
    CHECK(total == tasks);
    for (const auto& count : calls) CHECK(count == 1);
    // Long enough, now and then, for the workers to fall asleep.
    if (round % 500 == 499) std::this_thread::sleep_for(std::chrono::milliseconds(5));
    if (round % 7 == 0) pool.wake();
  }
}

// A worker whose task outlasts the caller's patience: the caller sleeps and is woken.
void a_slow_task() {
  ThreadPool pool(2);
  for (int round = 0; round < 3; ++round) {
    std::atomic<int> done{0};
    pool.run(2, [&](std::ptrdiff_t, int thread) {
      if (thread != 0) std::this_thread::sleep_for(std::chrono::milliseconds(60));
      ++done;
    });
    CHECK(done == 2);
  }
}

// More threads than cores that all want to run: workers come late, and spin less from then on.
void beside_others() {
  std::atomic<bool> stop{false};
  std::vector<std::thread> others;
  for (unsigned i = 0; i <= std::thread::hardware_concurrency(); ++i) {
    others.emplace_back([&] {
      while (!stop) {
      }
    });
  }
  {
    ThreadPool pool(3);
    for (int round = 0; round < 100; ++round) {
      std::atomic<int> done{0};
      pool.run(round % 9, [&](std::ptrdiff_t, int) {
        ++done;
        if (round % 4 == 0) std::this_thread::sleep_for(std::chrono::microseconds(100));
      });
      CHECK(done == round % 9);
      if (round % 10 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  }
  stop = true;
  for (std::thread& other : others) other.join();
}

void many_pools() {
  for (int i = 0; i < 200; ++i) {
    ThreadPool pool(1 + i % 4);
    int sum = 0;
    if (i % 2) pool.run(1, [&](std::ptrdiff_t, int) { ++sum; });
    CHECK(sum == i % 2);
  }
}

void bad_counts() {
  for (const int threads : {0, -3, ThreadPool::kMaxThreads + 1}) {
    CHECK(message_of<std::invalid_argument>([&] { ThreadPool pool(threads); }) ==
          "threads must lie in [1, 1024], got " + std::to_string(threads));
  }
}

// A child has no workers: its caller does everything, and the pool ends without waiting for them.
void forked() {
  for (const bool during : {false, true}) {
    auto pool = std::make_unique<ThreadPool>(3);
    std::atomic<int> child{-1};
    const auto fork_here = [&] {
      const int number = ::fork();
      CHECK(number >= 0);
      if (number == 0) {
        ::alarm(20);  // instead of hanging
        std::atomic<int> sum{0};
        const bool seen = pool->forked();
        pool->wake();
        if (!during) {
          pool->run(7, [&](std::ptrdiff_t, int thread) { sum += 1 + thread; });
          pool.reset();
        }
        std::_Exit(seen && sum == (during ? 0 : 7) ? 0 : 1);
      }
      child = number;
    };
    if (during) {
      pool->run(3, [&](std::ptrdiff_t task, int) {
        if (task == 1) fork_here();
      });
    } else {
      pool->run(3, [](std::ptrdiff_t, int) {});
      std::this_thread::sleep_for(std::chrono::milliseconds(5));  // they sleep, and are waited in
      fork_here();
    }
    int status = 0;
    CHECK(::waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    CHECK(!pool->forked());
  }
}

}  // namespace

int main() {
  for (const int threads : {1, 2, 3, 8}) every_task_once(threads);
  a_slow_task();
  beside_others();
  many_pools();
  bad_counts();
  forked();
  return 0;
}
