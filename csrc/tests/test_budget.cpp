#include "check.hpp"
#include "cpu/budget.hpp"

using iqmpc::detail::Estimate;

int main() {
  Estimate estimate;
  CHECK(!estimate.known());
  estimate.observe(4, 8);
  CHECK(estimate.known());
  CHECK(estimate.upper(1) > 2 && estimate.upper(1) < 3);
  CHECK(estimate.upper(10) == 10 * estimate.upper(1));

  // Steady times: the margin shrinks to nothing.
  for (int i = 0; i < 200; ++i) estimate.observe(1, 2);
  CHECK(estimate.upper(1) >= 2 && estimate.upper(1) < 2.01);

  // One slow moment widens it at once, by no more than a few times the mean, however slow it was,
  // and is forgotten.
  estimate.observe(1, 20);
  CHECK(estimate.upper(1) > 4 && estimate.upper(1) < 8);
  for (int i = 0; i < 200; ++i) estimate.observe(1, 2);
  CHECK(estimate.upper(1) < 2.01);

  // A machine that has become slower is known to be so after a few observations.
  for (int i = 0; i < 8; ++i) estimate.observe(1, 20);
  CHECK(estimate.upper(1) > 20);

  // Without observations, misses alone bring it back below any budget.
  estimate.observe(1, 1e6);
  int misses = 0;
  while (estimate.upper(1) > 3) {
    estimate.relax();
    ++misses;
  }
  CHECK(misses > 0 && misses < 200);
  return 0;
}
