"""Ticks that come too late, of an environment that does not wait: lock-step against `control_hz`.

    python -m benchmarks.realtime [--hz 50] [--ticks 10000] [--modes off async control] [--out FILE]

The environment is no simulator: `step` sleeps until the next tick of the wall clock, as a robot's
driver does, and counts an action as late that came after its tick. What is measured is the program
beside it, with the sizes of `--overrides` (by default ones at which an update takes some 35 ms on
one core).
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from iqmpc import Demonstrations, Trainer, compose
from iqmpc.episode import Episode
from iqmpc.latency import LatencyHistogram
from iqmpc.provenance import commit, machine

OBS, ACTIONS, LENGTH = 24, 6, 500
SIZES = ("model=small", "learner.batch=256")


class Robot(gymnasium.Env):
    """A body that moves with the wall clock: `step` returns at its tick, `late` counts actions.

    An action is late where it comes after the tick at which the last observation's successor was
    due; the clock then goes on from now, so that one delay is counted once.
    """

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (OBS,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (ACTIONS,), np.float32)

    def __init__(self, hz: float):
        self.period_s, self.late, self.steps = 1 / hz, 0, 0
        self.response = LatencyHistogram(self.period_s)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.state, self.left = self.np_random.normal(size=OBS).astype(np.float32), LENGTH
        self.returned = time.monotonic()
        return self.state.copy(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        now, due = time.monotonic(), self.returned + self.period_s
        self.response.add(now - self.returned)
        self.steps += 1
        if now > due:
            self.late += 1
        else:
            time.sleep(due - now)
        self.state = 0.9 * self.state + 0.1 * np.resize(action, OBS).astype(np.float32)
        self.left -= 1
        self.returned = max(due, now)
        return self.state.copy(), float(-np.abs(self.state).mean()), False, self.left == 0, {}


def demonstrations() -> Demonstrations:
    rng = np.random.default_rng(0)
    episodes = tuple(
        Episode(
            rng.normal(size=(LENGTH + 1, OBS)).astype(np.float32),
            rng.uniform(-1, 1, (LENGTH, ACTIONS)).astype(np.float32),
        )
        for _ in range(10)
    )
    return Demonstrations("robot", episodes)


def run(mode: str, hz: float, ticks: int, overrides: list[str]) -> dict[str, Any]:
    """One run of `ticks` ticks; "control" is `train.control_hz`, another a `train.overlap`."""
    words = [
        *("task.name=robot", "task.suite=own", f"task.episode_length={LENGTH}"),
        *(f"train.steps={ticks}", "train.random_steps=1000", "train.initial_updates=500"),
        *("train.eval_every=1000000000", "train.final_episodes=1", "train.checkpoint_every=5000"),
        f"train.control_hz={hz}" if mode == "control" else f"train.overlap={mode}",
        *overrides,
    ]
    robot, before = Robot(hz), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            compose(words),
            robot,
            demonstrations(),
            run=Path(folder) / "run",
            eval_env=None if mode == "control" else Robot(1e6),
        )
        started = time.monotonic()
        summary = trainer.train()
        took = time.monotonic() - started
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    keys = ("weights_age_p50_ms", "weights_age_max_ms", "weights_age_max_updates", "late_ticks")
    return {
        "mode": mode,
        "hz": hz,
        "ticks": robot.steps,
        "late": robot.late,
        "late_share": robot.late / robot.steps,
        **{k: v for k, v in robot.response.summary("action").items() if k.endswith("_ms")},
        "updates": summary["updates"],
        "updates_per_s": summary["updates"] / took,
        **{key: summary[key] for key in keys if key in summary},
        "peak_memory_grown_mb": (after - before) / 1024,
    }


def update_ms(overrides: list[str]) -> float:
    """What an update takes here on one thread: the least of 20."""
    from iqmpc import Learner
    from iqmpc.expert_data import expert_replay

    config = compose(["task.name=robot", "task.suite=own", "threads=1", *overrides])
    learner = Learner(OBS, ACTIONS, config)
    replay = expert_replay(demonstrations(), config, learner.model.observation_spec, ACTIONS, "cpu")
    times = []
    for _ in range(20):
        started = time.perf_counter()
        learner.learn(replay, replay)
        times.append(time.perf_counter() - started)
    return 1e3 * min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hz", type=float, default=50)
    parser.add_argument("--ticks", type=int, default=10_000)
    parser.add_argument("--modes", nargs="+", default=["off", "async", "control"])
    parser.add_argument("--overrides", nargs="*", default=list(SIZES))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    report = {
        "machine": machine(),
        "commit": commit(),
        "overrides": " ".join(arguments.overrides),
        "update_ms": update_ms(arguments.overrides),
        "runs": [],
    }
    print(f"an update takes {report['update_ms']:.1f} ms on one thread", flush=True)
    for mode in arguments.modes:
        report["runs"].append(run(mode, arguments.hz, arguments.ticks, arguments.overrides))
        print(json.dumps(report["runs"][-1]), flush=True)
        if arguments.out is not None:
            arguments.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
