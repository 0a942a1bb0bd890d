/* iqmpc in C: a trained agent out of one file. For C, Rust, Simulink and whatever else calls C.
 *
 * Functions that return an iqmpc_status give IQMPC_OK or say what went wrong, in words too, by
 * iqmpc_last_error(). None throws, ends the process or keeps a pointer that it was given. */
#ifndef IQMPC_H
#define IQMPC_H

#include <stddef.h>
#include <stdint.h>

#include "iqmpc/version.h"

#if defined(__GNUC__)
#define IQMPC_C_API __attribute__((visibility("default")))
#else
#define IQMPC_C_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum iqmpc_status {
  IQMPC_OK = 0,
  IQMPC_INVALID_ARGUMENT = 1, /* a null pointer, a size or an option that cannot be */
  IQMPC_UNREADABLE = 2,       /* there is no such file, or it cannot be read */
  IQMPC_DAMAGED = 3,          /* no agent's file, or one that does not match its digest */
  IQMPC_WRONG_VERSION = 4,    /* of a format that this library does not read */
  IQMPC_UNSUPPORTED = 5,      /* an agent that this library cannot act for */
  IQMPC_OUT_OF_MEMORY = 6,
  IQMPC_INTERNAL = 7
} iqmpc_status;

/* An agent. Calls on one from several threads wait for each other. */
typedef struct iqmpc_agent iqmpc_agent;

/* In place of what the file says: start from iqmpc_default_options(). */
typedef struct iqmpc_options {
  size_t size;      /* sizeof(iqmpc_options), set by iqmpc_default_options() */
  int threads;      /* 0: as the file says */
  double budget_us; /* microseconds a plan may take; 0: none; below 0: as the file says */
  int policy_only;  /* 1: act with the policy alone, 0: as the file says */
  const char* isa;  /* "portable", "avx2", "avx512", "avx512bf16"; null: the best */
  int has_seed;     /* 1: `seed` is that of the planner's draws */
  uint64_t seed;
} iqmpc_options;

typedef struct iqmpc_plan {
  int64_t iterations; /* whole ones */
  int64_t samples;    /* scored, in all iterations */
  int nonfinite;      /* 1: no score was finite, and the policy's mean acted */
  int missed;         /* 1: the budget had no room for any sample */
  int late;           /* 1: it took longer than the budget */
  double elapsed_us;
} iqmpc_plan;

typedef struct iqmpc_statistics {
  uint64_t plans, missed, late, nonfinite;
  double mean_us, p50_us, p99_us, p999_us, max_us;
} iqmpc_statistics;

/* The library's version: IQMPC_VERSION_STRING of the headers that it was built with. */
IQMPC_C_API const char* iqmpc_version(void);

/* What went wrong in this thread's last call that failed; empty before. Valid until the next. */
IQMPC_C_API const char* iqmpc_last_error(void);

IQMPC_C_API iqmpc_options iqmpc_default_options(void);

/* `options` may be null. On success *agent is to be given to iqmpc_agent_free; else it is null. */
IQMPC_C_API iqmpc_status iqmpc_agent_load(const char* path, const iqmpc_options* options,
                                          iqmpc_agent** agent);
/* The same for a file's content. */
IQMPC_C_API iqmpc_status iqmpc_agent_from_memory(const void* data, size_t size,
                                                 const iqmpc_options* options, iqmpc_agent** agent);
IQMPC_C_API void iqmpc_agent_free(iqmpc_agent* agent); /* null is taken */

/* 0, null or NaN for a null agent, an index beyond the size, and what the file does not say. */
IQMPC_C_API size_t iqmpc_agent_obs_size(const iqmpc_agent* agent);
IQMPC_C_API size_t iqmpc_agent_action_size(const iqmpc_agent* agent);
IQMPC_C_API const char* iqmpc_agent_task(const iqmpc_agent* agent);
IQMPC_C_API const char* iqmpc_agent_obs_name(const iqmpc_agent* agent, size_t index);
IQMPC_C_API const char* iqmpc_agent_action_name(const iqmpc_agent* agent, size_t index);
/* What an action of -1 and of 1 meant to the environment. */
IQMPC_C_API double iqmpc_agent_action_low(const iqmpc_agent* agent, size_t index);
IQMPC_C_API double iqmpc_agent_action_high(const iqmpc_agent* agent, size_t index);
IQMPC_C_API double iqmpc_agent_control_period(const iqmpc_agent* agent); /* seconds */
IQMPC_C_API size_t iqmpc_agent_action_repeat(const iqmpc_agent* agent);

/* An episode starts: forget the previous plan. */
IQMPC_C_API iqmpc_status iqmpc_agent_reset(iqmpc_agent* agent);

/* obs [obs_size] -> action [action_size] in [-1, 1]; `explore` (0 or 1) adds noise, `plan` may be
 * null. Allocates nothing where it succeeds. */
IQMPC_C_API iqmpc_status iqmpc_agent_act(iqmpc_agent* agent, const float* obs, size_t obs_size,
                                         float* action, size_t action_size, int explore,
                                         iqmpc_plan* plan);

IQMPC_C_API iqmpc_status iqmpc_agent_statistics(const iqmpc_agent* agent,
                                                iqmpc_statistics* statistics);

#ifdef __cplusplus
}
#endif

#endif
