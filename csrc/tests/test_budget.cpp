#include "check.hpp"
#include "cpu/budget.hpp"

using iqmpc::detail::Estimate;
using iqmpc::detail::Pace;

namespace {

void estimates() {
  Estimate estimate;
  CHECK(estimate.upper() == 0);
  estimate.observe(2);
  CHECK(estimate.upper() > 2 && estimate.upper() < 3);

  // Steady times: a margin that shrinks, and comes back once it is gone.
  for (int i = 0; i < 20000; ++i) {
    estimate.observe(2);
    CHECK(estimate.upper() > 1.9 && estimate.upper() < 2.6);
  }

  // One slow moment widens it, by no more than a part of the mean, however slow it was.
  const double before = estimate.upper();
  estimate.observe(1e9);
  CHECK(estimate.upper() > before && estimate.upper() < before + 1);

  // A slow moment in two hundred is kept clear of, one in ten thousand is not.
  Estimate rare, rarest;
  for (int i = 0; i < 100000; ++i) {
    rare.observe(i % 200 == 199 ? 3 : 1);
    rarest.observe(i % 10000 == 9999 ? 3 : 1);
  }
  CHECK(rare.upper() > 2.9 && rare.upper() < 3.3);
  CHECK(rarest.upper() < 1.6);

  // A machine that has become slower is known to be so after some observations.
  int until = 0;
  for (; estimate.upper() < 20; ++until) estimate.observe(20);
  CHECK(until < 16);

  // Without time for the work it is tried again in the end; failing that, one time in two thousand.
  int tried = 0;
  for (int i = 0; i < 100000; ++i) {
    if (estimate.upper() < 3) {
      estimate.observe(20);
      ++tried;
    } else {
      estimate.pass();
    }
  }
  CHECK(tried > 25 && tried <= 51);
}

void paces() {
  Pace pace;
  CHECK(pace.fitting(64, 0) == 64);  // what is not known is tried,
  CHECK(pace.fitting(64, -1) == 0);  // but not when it is too late
  for (int i = 0; i < 1800; ++i) {
    pace.observe(4, 8);  // two a row, half as much among many
    pace.observe(8, 12);
    pace.observe(16, 16);
    pace.observe(32, 32);
    pace.observe(61, 61);
  }
  CHECK(pace.fitting(64, 66) == 64);
  CHECK(pace.fitting(61, 63) == 61);
  CHECK(pace.fitting(61, 60) == 32);
  CHECK(pace.fitting(64, 31) == 16);
  CHECK(pace.fitting(64, 15) == 8);
  CHECK(pace.fitting(64, 9) == 4);
  CHECK(pace.fitting(64, 7) == 0);
  CHECK(pace.fitting(3, 7) == 3);  // as many as there are may be few
  CHECK(pace.fitting(0, 7) == 0);
  CHECK(Pace::least(64) == 4 && Pace::least(3) == 3);
  // What many rows took on a slower machine is not believed once few take much less.
  for (int i = 0; i < 200; ++i) {
    for (const iqmpc::detail::Index rows : {4, 8, 16, 32, 64})
      pace.observe(rows, 10.0 * static_cast<double>(rows));
  }
  CHECK(pace.fitting(64, 100) < 64);
  for (int i = 0; i < 200; ++i) pace.observe(4, 0.4);
  CHECK(pace.fitting(64, 100) == 64);
}

}  // namespace

int main() {
  estimates();
  paces();
  return 0;
}
