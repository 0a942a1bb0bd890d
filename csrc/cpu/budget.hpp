// What fits into a plan's time.
#pragma once

#include <algorithm>
#include <array>

#include "cpu/rollout.hpp"

namespace iqmpc::detail {

// A running estimate of a time that one piece of work in two thousand exceeds.
class Estimate {
 public:
  // 0 before the first observation: what is not known is tried.
  double upper() const { return upper_; }

  void observe(double time) {
    if (mean_ == 0) {
      mean_ = time;
      upper_ = 1.25 * time;
      return;
    }
    if (time > upper_) {
      upper_ += mean_ / 4;
    } else {
      pass();
    }
    // One long moment says little about the scale of the next ones.
    mean_ += (std::min(time, 4 * mean_) - mean_) / 8;
    upper_ = std::min(upper_, 4 * mean_);  // more is from when the machine was slower
  }

  // A plan that had no time for the work, which therefore exceeded nothing: what the estimate says
  // is tried again some time, by one plan in two thousand.
  void pass() { upper_ = std::max(upper_ - mean_ / 8000, 0.0); }

 private:
  double mean_ = 0, upper_ = 0;
};

// How long one thread takes to score some rows of a block, known apart for up to 4, 8, 16, 32 and
// 64 rows: a row costs more among few.
class Pace {
 public:
  static constexpr Index kLeast = 4;

  double upper(Index rows) const {
    double per_row = per_row_[0].upper();
    for (std::size_t c = 1; c <= size_class(rows); ++c) {
      // A row costs hardly more among many; what says so is from when the machine was slower.
      const double own = per_row_[c].upper();
      per_row = per_row == 0 ? own : std::min(own, 1.25 * per_row);
    }
    return static_cast<double>(rows) * per_row;
  }

  void observe(Index rows, double time) {
    per_row_[size_class(rows)].observe(time / static_cast<double>(rows));
  }

  // As many of `rows` rows as are expected to be scored in `time`: all of them or a power of two,
  // `kLeast` at the least; 0 where there is no time for that.
  Index fitting(Index rows, double time) const {
    while (rows > 0 && !(upper(rows) <= time)) rows = fewer(rows);
    return rows;
  }

  // The fewest of `rows` rows that `fitting` would take.
  static Index least(Index rows) { return std::min(rows, kLeast); }

  // What `fitting` tries after `rows` rows.
  static Index fewer(Index rows) {
    Index power = kBlockRows;
    while (power >= rows) power /= 2;
    return power < kLeast ? 0 : power;
  }

  // `Estimate::pass` for the fewest rows.
  void pass() { per_row_[0].pass(); }

 private:
  static_assert(kBlockRows == 64, "five size classes");

  static std::size_t size_class(Index rows) {
    std::size_t c = 0;
    while (c + 1 < 5 && (kLeast << c) < rows) ++c;
    return c;
  }

  std::array<Estimate, 5> per_row_;
};

}  // namespace iqmpc::detail
