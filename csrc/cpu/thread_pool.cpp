#include "iqmpc/thread_pool.hpp"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <string>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace iqmpc {

namespace {

constexpr int kTaskBits = 24;
constexpr std::uint64_t kTaskMask = (std::uint64_t{1} << kTaskBits) - 1;

std::uint64_t task_of(std::uint64_t ticket) { return ticket & kTaskMask; }
std::uint64_t count_of(std::uint64_t ticket) { return ticket >> kTaskBits; }

// How long a thread spins, in nanoseconds: at most longer than what lies between two loops of a
// plan, and shorter than a control step. On a machine whose cores are wanted by others, spinning
// takes from those that have work, our own caller among them, and what it waits for comes late
// anyway: a thread that was kept from running sets it to the least, and each time that one has spun
// undisturbed and in vain it grows a little.
constexpr int kMostPatience = 50'000, kLeastPatience = 4'000, kPatienceStep = 200;
// Kept from running: so long between two looks at the clock, or from being woken to running.
constexpr std::int64_t kGap = 200'000, kLate = 500'000;
constexpr int kSpinsPerLook = 32;

std::int64_t now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

void relax() {
#if defined(__x86_64__) || defined(__i386__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

ThreadPool::ThreadPool(int threads)
    : patience_(kMostPatience),
      process_(::getpid()),
      sleep_(std::make_unique<Sleep>()),
      workers_(std::make_unique<std::vector<std::thread>>()) {
  if (threads < 1 || threads > kMaxThreads) {
    throw std::invalid_argument("threads must lie in [1, " + std::to_string(kMaxThreads) +
                                "], got " + std::to_string(threads));
  }
  workers_->reserve(static_cast<std::size_t>(threads - 1));
  try {
    for (int thread = 1; thread < threads; ++thread) {
      workers_->emplace_back([this, thread] { work(thread); });
    }
  } catch (...) {
    stop_ = true;
    wake();
    for (std::thread& worker : *workers_) worker.join();
    throw;
  }
}

bool ThreadPool::forked() const noexcept { return ::getpid() != process_; }

ThreadPool::~ThreadPool() {
  if (forked()) {
    static_cast<void>(workers_.release());
    static_cast<void>(sleep_.release());
    return;
  }
  stop_ = true;
  wake();
  for (std::thread& worker : *workers_) worker.join();
}

void ThreadPool::wake() noexcept {
  if (forked()) return;
  calls_.fetch_add(1);
  // The increment before this read, and the sleeper's registration before its own reading of what
  // it waits for, are sequentially consistent: one of the two sees the other.
  if (asleep_.load() == 0) return;
  woken_.store(now(), std::memory_order_relaxed);
  {
    std::lock_guard<std::mutex> lock(sleep_->mutex);
  }
  sleep_->workers.notify_all();
}

// Takes and runs one task; false where none is left.
bool ThreadPool::take(int thread) noexcept {
  const std::uint64_t seen = ticket_.load(std::memory_order_acquire);
  if (task_of(seen) >= count_of(seen)) return false;
  const std::uint64_t ticket = ticket_.fetch_add(1, std::memory_order_acq_rel);
  const std::uint64_t task = task_of(ticket);
  if (task >= count_of(ticket)) return false;
  // This task is not done, so the loop it belongs to is the current one and job_ is its own.
  job_.call(job_.context, static_cast<std::ptrdiff_t>(task), thread);
  if (done_.fetch_add(1) + 1 == static_cast<std::ptrdiff_t>(count_of(ticket)) &&
      caller_asleep_.load()) {
    {
      std::lock_guard<std::mutex> lock(sleep_->mutex);
    }
    sleep_->caller.notify_one();
  }
  return true;
}

// Spins until `done`, or in vain: false.
template <class Done>
bool ThreadPool::spin(Done&& done) noexcept {
  const std::int64_t start = now();
  for (std::int64_t last = start;;) {
    for (int i = 0; i < kSpinsPerLook; ++i) {
      relax();
      if (done()) return true;
    }
    const std::int64_t time = now();
    const int patience = patience_.load(std::memory_order_relaxed);
    if (time - last > kGap) {
      patience_.store(kLeastPatience, std::memory_order_relaxed);
      return false;
    }
    if (time - start > patience) {
      // Another thread's change may be lost: it comes again.
      patience_.store(std::min(patience + kPatienceStep, kMostPatience), std::memory_order_relaxed);
      return false;
    }
    last = time;
  }
}

void ThreadPool::work(int thread) noexcept {
  while (!stop_.load()) {
    const std::uint32_t calls = calls_.load();
    if (take(thread)) continue;
    if (spin([&] { return take(thread) || stop_.load(std::memory_order_relaxed); })) continue;
    std::unique_lock<std::mutex> lock(sleep_->mutex);
    const std::int64_t asleep = now();
    asleep_.fetch_add(1);
    sleep_->workers.wait(lock, [&] { return calls_.load() != calls || stop_.load(); });
    asleep_.fetch_sub(1);
    // A call that came before it slept woke nobody.
    const std::int64_t woken = woken_.load(std::memory_order_relaxed);
    if (woken > asleep && now() - woken > kLate) {
      patience_.store(kLeastPatience, std::memory_order_relaxed);
    }
  }
}

void ThreadPool::run_job(const Job& job, std::ptrdiff_t tasks) noexcept {
  if (workers_->empty() || tasks == 1 || forked()) {
    for (std::ptrdiff_t task = 0; task < tasks; ++task) job.call(job.context, task, 0);
    return;
  }
  if (tasks == 0) return;
  job_ = job;
  done_.store(0);
  ticket_.store(static_cast<std::uint64_t>(tasks) << kTaskBits);
  wake();
  while (take(0)) {
  }
  const auto done = [&] { return done_.load(std::memory_order_acquire) == tasks; };
  // The caller waits as long for others' last tasks before it sleeps too: past that something else
  // holds a core, which ours may then have.
  if (done() || spin(done)) return;
  std::unique_lock<std::mutex> lock(sleep_->mutex);
  caller_asleep_.store(true);
  sleep_->caller.wait(lock, [&] { return done_.load() == tasks; });
  caller_asleep_.store(false);
}

}  // namespace iqmpc
