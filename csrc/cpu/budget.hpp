// Whether another iteration fits into a plan's time.
#pragma once

namespace iqmpc::detail {

// A running estimate of the time a unit of work takes and of how much that varies, as TCP's
// retransmission timer keeps it (RFC 6298): mean and mean deviation, both exponentially forgotten.
class Estimate {
 public:
  bool known() const { return known_; }

  // Time that `work` is expected not to exceed; 0 before the first observation.
  double upper(double work) const { return work * (mean_ + 2 * deviation_); }

  void observe(double work, double time) {
    const double unit = time / work;
    if (!known_) {
      mean_ = unit;
      deviation_ = unit / 8;
      known_ = true;
      return;
    }
    // A thread that was off its core for a moment says little about the next iteration; if the
    // machine has become slower for good, a few observations get there all the same.
    const double bounded = unit < 4 * mean_ ? unit : 4 * mean_;
    const double error = bounded - mean_;
    deviation_ += ((error < 0 ? -error : error) - deviation_) / 4;
    mean_ += error / 8;
  }

  // After a plan without any iteration: nothing was observed, and one slow moment must not stop
  // planning for good.
  void relax() {
    mean_ *= 0.8;
    deviation_ *= 0.8;
  }

 private:
  double mean_ = 0, deviation_ = 0;
  bool known_ = false;
};

}  // namespace iqmpc::detail
