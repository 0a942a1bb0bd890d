"""The command line's edge: Hydra's groups and overrides in, one `Config` out."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import resources
from operator import attrgetter
from pathlib import Path
from typing import Any, cast

from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf

from iqmpc.config import Config, all_keys, may_change, shortened, text_keys
from iqmpc.errors import ConfigError

SUITES = ("dmcontrol", "myosuite", "maniskill", "gym")  # whose environments are made here
GROUPS = ("task", "model", "planner", "learner", "agent", "preset")
# Keys that may be given without their section.
_SHORT = {"env_id": "task.env_id", "init": "init.path"}
# Whose values are text, taken as they stand unless they are quoted or null.
_TEXTS = {*GROUPS, *text_keys(), "resume"}
# Whose values are files, of which tables show the names.
_FILES = ("demos.path", "demos.add", "init.path")
_LONGEST = 100  # characters of any other value, each a number or a word
# What changes how a run is computed or watched, or is told beside its figures.
_NO_DEPARTURES = {
    "seed",
    "device",
    "threads",
    "run_dir",
    "preset",
    "train.steps",
    "train.loggers",
    "train.log_every",
    "train.video_every",
    "train.eval_every",
    "train.eval_episodes",
    "train.final_episodes",
    "train.checkpoint_every",
    "train.keep",
    "train.stop_at",
    "train.env_workers",
    "train.env_restarts",
    "train.env_timeout_s",
    "planner.threads",
}


def options(group: str) -> list[str]:
    """The choices of a group, such as every task."""
    folder = resources.files("iqmpc.configs") / group
    return sorted(
        f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml")
    )


def full_key(word: str) -> str:
    """`key=value` with the key's section, where it may be given without."""
    key, equals, value = word.partition("=")
    return f"{_SHORT.get(key, key)}{equals}{value}"


def parse_words(words: Sequence[str]) -> list[Override]:
    """`key=value` words of a sweep in Hydra's syntax; `ConfigError` where one is none."""
    parser, parsed = OverridesParser.create(), []
    for word in words:
        try:
            override = parser.parse_override(word)
        except (HydraException, ValueError, RecursionError) as error:
            raise ConfigError(
                f"cannot read {shortened(word)}: expected key=value, or key=value,value,… "
                "(quote a value that has commas, spaces or brackets of its own)"
            ) from error
        if override.is_delete():
            raise ConfigError(f"expected key=value, got {shortened(word)}")
        parsed.append(override)
    return parsed


def parse(overrides: Sequence[str]) -> dict[str, Any]:
    """`key=value` words as a dictionary, in Hydra's value syntax; `ConfigError` where not."""
    parser = OverridesParser.create()
    parsed = {}
    for word in overrides:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise ConfigError(f"expected key=value, got {shortened(word)}")
        if _SHORT.get(key, key) in _TEXTS and value != "null" and value[:1] not in ("'", '"'):
            parsed[key] = value
            continue
        if len(value) > _LONGEST and key not in _TEXTS:
            raise ConfigError(
                f"{shortened(key)} is given {len(value)} characters, expected a number or a word"
            )
        try:
            override = parser.parse_override(word)
            value = override.value()
        except (HydraException, ValueError, RecursionError) as error:
            expected = "text, or quotes that end" if key in _TEXTS else "a number or a word"
            raise ConfigError(f"cannot read {shortened(word)}: expected {expected}") from error
        if override.is_delete() or override.is_add() or override.is_sweep_override():
            raise ConfigError(
                f"expected key=value, got {shortened(word)} (one value; several need -m)"
            )
        parsed[override.key_or_group] = value
    return parsed


def compose(overrides: Sequence[str] = ()) -> Config:
    """The run that `iqmpc train OVERRIDES` describes; raises as `parse` and `composed` do."""
    return composed(parse(overrides))


def composed(settings: Mapping[str, Any]) -> Config:
    """The run of choices of groups and dotted keys.

    Hydra composes the groups; single keys are set on top, checked against the schema. A task of
    another suite than `SUITES`, one's own, has no action repeat, gradient penalty or terminal
    states unless they are given.
    Raises `ConfigError` that names the key and the nearest valid one.
    """
    groups = {k: v for k, v in settings.items() if k in GROUPS}
    keys = {_SHORT.get(k, k): v for k, v in settings.items() if k not in GROUPS}
    for key in keys:
        _check_name(key)
    for group, value in groups.items():
        _check_option(group, value)
    with _own_hydra(), initialize_config_module("iqmpc.configs", version_base="1.3"):
        node = hydra_compose("config", [f"{k}={v}" for k, v in groups.items()])
    config = Config.from_dict(cast("dict[str, Any]", OmegaConf.to_container(node)))
    if keys.get("task.suite", config.task.suite) not in SUITES:  # nothing of the default task's
        config = config.replace(
            {"task.action_repeat": 1, "task.gradient_penalty": False, "task.terminates": False}
        )
    return config.replace(keys)


def resumed(config: Config, changes: Mapping[str, Any]) -> Config:
    """The settings of a run that goes on with `changes`, by dotted key.

    Raises `ConfigError` for what a continuation may not change (`iqmpc.config.may_change`).
    """
    for key in changes:
        if key in GROUPS or not may_change(key):
            raise ConfigError(
                f"{key} cannot change when a run is resumed (only train.* and what iqmpc train "
                "--help names)"
            )
    return config.replace(changes)


def departures(config: Config) -> dict[str, Any]:
    """The settings, by dotted key, in which a run departs from its task and agent under its preset.

    They are compared with what the groups say now; the default preset where `config` names none,
    and without the settings of a task that has no group. Of files their names. Left out:
    seed and steps, which are told beside them, and what changes how a run is computed or watched
    but not what it learns (`_NO_DEPARTURES`).
    Raises `ConfigError` where the preset is unknown.
    """
    known = "gym" if config.task.suite == "gym" else config.task.name
    grouped = known in options("task")
    base = compose(
        [
            *([f"task={known}"] if grouped else []),
            *([f"preset={config.preset}"] if config.preset else []),
            f"agent={config.agent.name}",
        ]
    )
    if known == "gym":
        base = base.replace({"task.env_id": config.task.env_id})
    found = {}
    for key in all_keys():
        if key in _NO_DEPARTURES or (key.startswith("task.") and not grouped):
            continue
        value = attrgetter(key)(config)
        if value != attrgetter(key)(base):
            if value and key in _FILES:
                value = ",".join(Path(path).name for path in value.split(","))
            found[key] = value
    return found


def ablation(config: Config) -> str:
    """`departures` as words of the command line, such as "learner.batch=128"; "" for none."""
    return " ".join(
        f"{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in departures(config).items()
    )


@contextmanager
def _own_hydra() -> Iterator[None]:
    """Hydra holds one instance a process; a caller that is a Hydra program keeps its own."""
    theirs = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        yield
    finally:
        GlobalHydra.instance().hydra = theirs


def _check_name(key: str) -> None:
    """`ConfigError` for what is nearest to something that is no single setting, as tsk=…."""
    known = [*GROUPS, *_SHORT, "resume"]
    near = difflib.get_close_matches(key, [*known, *all_keys()], n=1, cutoff=0.5)
    if key not in all_keys() and near and near[0] in known:
        raise ConfigError(f"unknown setting {shortened(key)}; did you mean {near[0]!r}?")


def _check_option(group: str, value: Any) -> None:
    known = options(group)
    if value not in known:
        near = difflib.get_close_matches(str(value), known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"unknown {group} {shortened(value)}{hint} (known: {', '.join(known)})")
