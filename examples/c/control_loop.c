/* A robot's control loop with an agent's file, in C: `control_loop_c AGENT HZ TICKS`.
 *
 * The robot here is nobody's; replace robot_read and robot_command by yours. */

#define _POSIX_C_SOURCE 200809L

#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "iqmpc.h"

static float state = 1;

static void robot_read(float* obs, size_t size) {
  for (size_t i = 0; i < size; ++i) obs[i] = state / (float)(i + 1);
}

static void robot_command(const float* action) { state += 0.1f * (action[0] - state); }

static int failed(void) {
  fprintf(stderr, "%s\n", iqmpc_last_error());
  return 1;
}

int main(int argc, char** argv) {
  if (argc != 4 || atof(argv[2]) <= 0) {
    fprintf(stderr, "usage: control_loop_c AGENT HZ TICKS\n");
    return 2;
  }
  const double hz = atof(argv[2]);

  /* ---- Yours from here: load, and act once a tick ---------------------------------------------
   */
  iqmpc_options options = iqmpc_default_options();
  options.budget_us = 0.8e6 / hz; /* of a tick; the rest is the robot's */
  iqmpc_agent* agent;
  if (iqmpc_agent_load(argv[1], &options, &agent) != IQMPC_OK) return failed();
  const size_t obs_size = iqmpc_agent_obs_size(agent);
  const size_t action_size = iqmpc_agent_action_size(agent);
  float* obs = calloc(obs_size, sizeof *obs);
  float* action = calloc(action_size, sizeof *action);
  if (obs == NULL || action == NULL) return 1;
  struct timespec due;
  clock_gettime(CLOCK_MONOTONIC, &due);
  for (long tick = 0; tick < atol(argv[3]); ++tick) {
    robot_read(obs, obs_size);
    if (iqmpc_agent_act(agent, obs, obs_size, action, action_size, 0, NULL) != IQMPC_OK) {
      return failed();
    }
    robot_command(action);
    due.tv_nsec += (long)(1e9 / hz);
    due.tv_sec += due.tv_nsec / 1000000000;
    due.tv_nsec %= 1000000000;
    clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &due, NULL);
  }
  /* ---- to here --------------------------------------------------------------------------------
   */

  iqmpc_statistics plans;
  iqmpc_agent_statistics(agent, &plans);
  printf("%llu plans: p50 %.0f us, p99.9 %.0f us, max %.0f us, %llu late, %llu missed\n",
         (unsigned long long)plans.plans, plans.p50_us, plans.p999_us, plans.max_us,
         (unsigned long long)plans.late, (unsigned long long)plans.missed);
  iqmpc_agent_free(agent);
  free(obs);
  free(action);
  return 0;
}
