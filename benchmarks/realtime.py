"""Ticks that come too late, of an environment that does not wait: lock-step against `control_hz`.

    python -m benchmarks.realtime [--hz 50] [--ticks 10000] [--modes off async control] [--out FILE]
    python -m benchmarks.realtime --task walker-walk --modes control --ticks 19500

`step` sleeps until the next tick of the wall clock, as a robot's driver does, and counts an action
as late that came after its tick. Without `--task` there is nothing to learn behind it, and what is
measured is the program beside it, with the sizes of `--overrides` (by default ones at which an
update takes some 35 ms on one core). With it a task is learnt at that pace, from its packaged
demonstrations, by the preset's sizes.
"""

from __future__ import annotations

import argparse
import csv
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from iqmpc import Demonstrations, Trainer, compose
from iqmpc.callbacks import Callback
from iqmpc.envs import make_env
from iqmpc.episode import Episode
from iqmpc.latency import LatencyHistogram
from iqmpc.provenance import commit, machine

OBS, ACTIONS, LENGTH = 24, 6, 500
SIZES: tuple[str, ...] = ("model=small", "learner.batch=256")


class Body(gymnasium.Env):
    """A body with nothing to learn, which takes no time."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (OBS,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (ACTIONS,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.state, self.left = self.np_random.normal(size=OBS).astype(np.float32), LENGTH
        return self.state.copy(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.state = 0.9 * self.state + 0.1 * np.resize(action, OBS).astype(np.float32)
        self.left -= 1
        return self.state.copy(), float(-np.abs(self.state).mean()), False, self.left == 0, {}


class Paced(gymnasium.Wrapper):
    """An environment that moves with the wall clock: `step` returns at its tick, `late` counts.

    An action is late where it comes after the tick at which the last observation's successor was
    due; the clock then goes on from now, so that one delay is counted once.
    """

    def __init__(self, env: gymnasium.Env, hz: float):
        super().__init__(env)
        self.period_s, self.late, self.steps = 1 / hz, 0, 0
        self.response = LatencyHistogram(self.period_s)

    def reset(self, **given: Any) -> tuple[Any, dict[str, Any]]:
        found = self.env.reset(**given)
        self.returned = time.monotonic()
        return found

    def step(self, action: np.ndarray) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        now, due = time.monotonic(), self.returned + self.period_s
        self.response.add(now - self.returned)
        self.steps += 1
        self.late += now > due
        found = self.env.step(action)
        time.sleep(max(0.0, due - time.monotonic()))
        self.returned = max(due, now)
        return found


class Memory(Callback):
    """What the process has resident, in MB, ten times in a run: (step, MB)."""

    def __init__(self, ticks: int):
        self.every, self.samples = max(1, ticks // 10), []

    def on_episode(self, trainer: Trainer, episode: Episode) -> None:
        if trainer.env_steps >= self.every * (len(self.samples) + 1):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.samples.append((trainer.env_steps, round(pages * resource.getpagesize() / 2**20)))


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


def words_of(task: str | None) -> list[str]:
    """The settings of a task of the package, or of the body with nothing to learn."""
    if task is not None:
        return [f"task={task}", "train.eval_episodes=3", "train.final_episodes=20"]
    return [
        *("task.name=robot", "task.suite=own", f"task.episode_length={LENGTH}"),
        *("train.random_steps=1000", "train.initial_updates=500"),
        *("train.eval_every=1000000000", "train.final_episodes=1", "train.checkpoint_every=5000"),
    ]


def run(mode: str, hz: float, ticks: int, overrides: list[str], task: str | None) -> dict[str, Any]:
    """One run of `ticks` ticks; "control" is `train.control_hz`, another a `train.overlap`."""
    paced = f"train.control_hz={hz}" if mode == "control" else f"train.overlap={mode}"
    config = compose([*words_of(task), f"train.steps={ticks}", paced, *overrides])
    robot = Paced(Body() if task is None else make_env(config.task), hz)
    # Nothing is evaluated on a robot, a task's simulator can be had twice.
    eval_env = Body() if mode != "control" else None
    memory = Memory(ticks)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            config,
            robot,
            demonstrations() if task is None else None,
            run=Path(folder) / "run",
            eval_env=eval_env if task is None else make_env(config.task),
            callbacks=[memory],
        )
        started = time.monotonic()
        summary = trainer.train()
        took = time.monotonic() - started
        rows = csv.DictReader(trainer.folder.metrics.read_text().splitlines())
        evaluations = [
            (int(row["env_steps"]), float(row["eval_return_mean"]))
            for row in rows
            if row["eval_return_mean"]
        ]
    keys = ["weights_age_p50_ms", "weights_age_max_ms", "weights_age_max_updates", "late_ticks"]
    if task is not None:
        keys += ["return_mean", "return_std", "demonstrator_return", "ratio"]
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
        **({} if task is None else {"evaluations": evaluations}),
        "resident_mb": memory.samples,
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
    parser.add_argument("--task", help="a task of the package, learnt at this pace")
    parser.add_argument("--overrides", nargs="*", help=f"settings (without --task: {SIZES})")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    task, overrides = arguments.task, arguments.overrides
    if overrides is None:
        overrides = [] if task else list(SIZES)
    report = {
        "machine": machine(),
        "commit": commit(),
        "task": task,
        "overrides": " ".join(overrides),
        "update_ms": update_ms(overrides),
        "runs": [],
    }
    print(f"an update takes {report['update_ms']:.1f} ms on one thread", flush=True)
    for mode in arguments.modes:
        report["runs"].append(run(mode, arguments.hz, arguments.ticks, overrides, task))
        print(json.dumps(report["runs"][-1]), flush=True)
        if arguments.out is not None:
            arguments.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
