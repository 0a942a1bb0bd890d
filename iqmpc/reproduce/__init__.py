"""The paper's tables and figures: which runs they are, what these cost here, what they reached.

`experiments.yaml` beside this says what is compared. A run that has ended under the same settings,
wherever it lies, is taken as it is.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import re
import shlex
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from iqmpc import table
from iqmpc.agent import resolve_device
from iqmpc.composition import compose
from iqmpc.config import Config, all_keys, may_change
from iqmpc.demos.demonstrations import packaged_tasks
from iqmpc.envs import make_env
from iqmpc.errors import CheckpointError, ConfigError
from iqmpc.evaluation import Random, rollout
from iqmpc.methods import agent_class, learner_class
from iqmpc.observation import ObservationSpec
from iqmpc.replay import SliceReplay
from iqmpc.run_folder import RunFolder
from iqmpc.threads import prepare_torch

# Of the settings that a continuation may change, those on which depends what is learnt.
_LEARNT_BY = {
    "train.steps",
    "train.random_steps",
    "train.initial_updates",
    "train.demo_updates",
    "train.updates_per_step",
    "train.stop_at",
}
_TIMED = 20  # steps, plans and updates of a measurement


@dataclass(frozen=True)
class Experiment:
    """A table or figure: the words of `iqmpc train` by variant, and what the paper reports.

    `measure` is a field of `iqmpc.table`'s records; `paper` is [mean, standard error] or [mean] by
    task and variant.
    """

    name: str
    title: str
    measure: str
    tasks: tuple[str, ...]
    variants: Mapping[str, tuple[str, ...]]
    paper: Mapping[str, Mapping[str, Sequence[float]]]

    def only(self, tasks: Sequence[str], variants: Sequence[str]) -> Experiment:
        """The same of some tasks and variants, all where none are given.

        Raises `ConfigError` for one that is not there.
        """
        for given, known in ((tasks, self.tasks), (variants, self.variants)):
            for name in given:
                if name not in known:
                    raise ConfigError(f"{self.name} has no {name!r} (known: {', '.join(known)})")
        return replace(
            self,
            tasks=tuple(t for t in self.tasks if not tasks or t in tasks),
            variants={v: w for v, w in self.variants.items() if not variants or v in variants},
        )


class PlannedRun(NamedTuple):
    """A run of an experiment; without `words` its task has no demonstrations here."""

    task: str
    variant: str
    seed: int
    words: tuple[str, ...]

    @property
    def config(self) -> Config:
        """Its settings."""
        return compose(self.words)

    @property
    def name(self) -> str:
        """Its folder's name."""
        variant = re.sub(r"[^\w.]+", "-", self.variant)
        return f"{self.task}-{variant}-seed{self.seed}"


def names() -> list[str]:
    """The experiments there are."""
    return list(_read()["experiments"])


def experiment(name: str) -> Experiment:
    """The experiment of that name; `ConfigError` with the nearest for another."""
    known = _read()["experiments"]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"no experiment {name!r}{hint} (known: {', '.join(known)})")
    found = known[name]
    return Experiment(
        name,
        found["title"],
        found["measure"],
        tuple(found["tasks"]),
        {variant: tuple(shlex.split(words)) for variant, words in found["variants"].items()},
        found.get("paper", {}),
    )


def scales() -> list[str]:
    """The scales there are."""
    return list(_read()["scales"])


def planned(
    what: Experiment,
    scale: str,
    seeds: int,
    demos: Path,
    ours: Sequence[str] = (),
) -> list[PlannedRun]:
    """Its runs of seeds 0 to `seeds` - 1, variant by variant.

    Demonstrations are `demos`/TASK.h5 or .npz, else those packaged with the task. `ours` are
    further words for runs of IQ-MPC. Raises `ConfigError` for an unknown scale.
    """
    if scale not in scales():
        raise ConfigError(f"no scale {scale!r} (known: {', '.join(scales())})")
    at = _read()["scales"][scale]
    runs = []
    for task in what.tasks:
        steps = at["steps_of"].get(task, at["steps"])
        found = _demonstrations(task, demos)
        for variant, words in what.variants.items():
            further = () if any(word.startswith("agent=") for word in words) else ours
            for seed in range(seeds):
                all_words = _later_wins(
                    [
                        f"task={task}",
                        *shlex.split(at["words"]),
                        f"train.steps={steps}",
                        *(found or ()),
                        *words,
                        *further,
                        f"seed={seed}",
                    ]
                )
                runs.append(PlannedRun(task, variant, seed, all_words if found is not None else ()))
    return runs


def _later_wins(words: Sequence[str]) -> tuple[str, ...]:
    return tuple({word.partition("=")[0]: word for word in words}.values())


def _demonstrations(task: str, folder: Path) -> tuple[str, ...] | None:
    """Words that name a task's demonstrations; None where there are none."""
    for suffix in (".h5", ".npz"):
        if (path := folder / f"{task}{suffix}").exists():
            return (f"demos.path={path}",)
    return () if task in packaged_tasks() else None


def fingerprint(config: Config) -> str:
    """What is equal in runs that learn the same: all settings but where things lie, how the same
    numbers are computed, and when the run is evaluated and saved."""
    kept = {
        key: attrgetter(key)(config)
        for key in all_keys()
        if not may_change(key) or key in _LEARNT_BY
    }
    path = config.demos.path
    return json.dumps(kept | {"demos": None if path is None else Path(path).stem}, sort_keys=True)


def finished(patterns: Iterable[str]) -> dict[str, Path]:
    """Run folders that have ended, by `fingerprint`; what is none is passed over."""
    found: dict[str, Path] = {}
    for path in table.find_runs(patterns):
        folder = RunFolder(path)
        if not folder.holds_run or not folder.summary.exists():
            continue
        try:
            found.setdefault(fingerprint(folder.load_config()), path)
        except CheckpointError:
            continue
    return found


class StepTimes(NamedTuple):
    """Seconds of a step of the environment, of acting, of an update."""

    env: float
    act: float
    update: float

    def run_s(self, config: Config) -> float:
        """Seconds of a run without its evaluations and resets."""
        acted = max(0, config.train.steps - config.random_steps)
        updates = config.train.demo_updates + config.initial_updates
        updates += int(acted * config.train.update_rate)
        return config.train.steps * self.env + acted * self.act + updates * self.update


def step_times(config: Config) -> StepTimes:
    """Measured here and now, on the environment itself: the least of some repetitions each.

    Raises as `make_env` does.
    """
    prepare_torch(config)
    env = make_env(config.task, seed=config.seed)
    try:
        spec = ObservationSpec.of(env.observation_space.shape or ())
        (action_dim,) = env.action_space.shape or (0,)
        began = time.perf_counter()
        actor = Random(action_dim, 0)
        length = max(2 * _TIMED, config.learner.horizon)
        episode = rollout(actor, env, seed=config.seed, episode_length=length)
        env_s = (time.perf_counter() - began) / len(episode.actions)
    finally:
        env.close()
    device = resolve_device(config.device)
    replay = SliceReplay(
        spec,
        action_dim,
        horizon=config.learner.horizon,
        capacity=len(episode.actions) + 1,
        device=device,
    )
    replay.add(episode)
    learner = learner_class(config)(spec, action_dim, config, device)
    agent = agent_class(config)(learner.model, config, weights=learner.acting_weights())
    obs = episode.observed()[0]
    return StepTimes(
        env_s,
        _least(lambda: agent.act(obs, explore=True)),
        _least(lambda: learner.learn(replay, replay)),
    )


def _least(call: Any) -> float:
    times = []
    for _ in range(_TIMED):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)


class Row(NamedTuple):
    """A task and variant: mean and standard error over seeds, and the paper's."""

    task: str
    variant: str
    seeds: int
    mean: float | None
    error: float | None
    paper: float | None
    paper_error: float | None


def rows(what: Experiment, values: Mapping[tuple[str, str], Sequence[float]]) -> list[Row]:
    """What was measured, by task and variant, beside the paper's: its methods that were not run
    here have rows too. The standard error is that of the mean over seeds, from two on."""
    found = []
    for task in what.tasks:
        reported = what.paper.get(task, {})
        for variant in [*what.variants, *(v for v in reported if v not in what.variants)]:
            measured = values.get((task, variant), ())
            error = None
            if len(measured) > 1:
                error = statistics.stdev(measured) / len(measured) ** 0.5
            mean, paper_error = (*reported.get(variant, ()), None, None)[:2]
            found.append(
                Row(
                    task,
                    variant,
                    len(measured),
                    statistics.fmean(measured) if measured else None,
                    error,
                    mean,
                    paper_error,
                )
            )
    return found


def measured(
    what: Experiment, made: Mapping[PlannedRun, Path], *, episodes: int
) -> dict[tuple[str, str], list[float]]:
    """The measure of runs that have ended, by task and variant: `iqmpc.table.record`'s."""
    values: dict[tuple[str, str], list[float]] = {}
    for run, folder in made.items():
        value = table.record(folder, episodes=episodes)[what.measure]
        if value is not None:
            values.setdefault((run.task, run.variant), []).append(value)
    return values


def _shown(mean: float | None, error: float | None) -> str:
    if mean is None:
        return "–"
    digits = 0 if abs(mean) >= 100 else 2
    return f"{mean:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def to_markdown(what: Experiment, found: Sequence[Row]) -> str:
    """The table: here and in the paper, mean ± standard error."""
    lines = [f"# {what.title}", "", f"`{what.measure}`, mean ± standard error over seeds.", ""]
    lines += ["| task | variant | here | seeds | paper |", "|---|---|--:|--:|--:|"]
    lines += [
        f"| {r.task} | {r.variant} | {_shown(r.mean, r.error)} | {r.seeds or '–'} | "
        f"{_shown(r.paper, r.paper_error)} |"
        for r in found
    ]
    return "\n".join(lines) + "\n"


def to_csv(found: Sequence[Row]) -> str:
    """The same with all digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Row._fields)
    writer.writerows(found)
    return text.getvalue()


def _read() -> dict[str, Any]:
    return yaml.safe_load(resources.files(__name__).joinpath("experiments.yaml").read_text())
