"""What the numbers of a task's observations and actions are: for whoever acts without the task."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from iqmpc.config import TaskConfig
from iqmpc.errors import CheckpointError
from iqmpc.files import write_atomically
from iqmpc.frames import is_image

_FILE = "interface.json"


@dataclass(frozen=True)
class Description:
    """An environment's interface, behind [-1, 1]: what the agent's own numbers stand for.

    `observation_names` [O] (none of images), in their order; `action_names` [A]; an action of -1 is
    `action_low` [A] and one of 1 `action_high` [A] in the environment's units. Between two actions
    lie `action_repeat` of its own steps and `control_period_s` seconds (None where it says none).
    """

    observation_names: tuple[str, ...]
    action_names: tuple[str, ...]
    action_low: tuple[float, ...]
    action_high: tuple[float, ...]
    action_repeat: int
    control_period_s: float | None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Description:
        """As `to_dict` gave it; `ValueError` for what it cannot have given."""
        try:
            low, high = (tuple(map(float, values[k])) for k in ("action_low", "action_high"))
            period = values["control_period_s"]
            found = cls(
                tuple(map(str, values["observation_names"])),
                tuple(map(str, values["action_names"])),
                low,
                high,
                int(values["action_repeat"]),
                None if period is None else float(period),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"it describes no environment: {error}") from error
        if not len(found.action_names) == len(low) == len(high):
            raise ValueError("it has names and bounds of different numbers of actions")
        return found


def describe(env: gymnasium.Env, task: TaskConfig) -> Description:
    """The interface of a task's environment; of one that says nothing of itself, by numbers."""
    obs, action = env.observation_space, env.action_space
    try:
        found = env.get_wrapper_attr("describe_interface")()
    except AttributeError:
        found = None
    if not isinstance(found, Description):  # of somebody else's environment
        found = Description(
            indexed("obs", obs.shape),
            indexed("action", action.shape),
            tuple(map(float, action.low)),
            tuple(map(float, action.high)),
            task.action_repeat,
            None,
        )
    return dataclasses.replace(found, observation_names=()) if is_image(obs.shape) else found


def indexed(name: str, shape: Iterable[int]) -> tuple[str, ...]:
    """Names of an array's numbers in their order: `name`, or `name[0,1]` where it has sides."""
    places = np.ndindex(*shape)
    return tuple(f"{name}[{','.join(map(str, p))}]" if p else name for p in places)


def seconds(env: Any) -> float | None:
    """From one step of an unwrapped environment to the next, where it says so."""
    step, frequency = getattr(env, "dt", None), getattr(env, "control_freq", None)
    if step is None and frequency:
        step = 1 / frequency
    try:
        step = float(step)
    except (TypeError, ValueError):
        return None
    return step if math.isfinite(step) and step > 0 else None


def save(run: str | Path, description: Description) -> None:
    """Keep it in a run folder."""
    text = json.dumps(description.to_dict(), indent=1, allow_nan=False)
    write_atomically(Path(run) / _FILE, text.encode())


def load(run: str | Path) -> Description | None:
    """The one that a run folder keeps; None where it keeps none, as those of 0.1 do.

    Raises `CheckpointError` for a file that describes no environment.
    """
    path = Path(run) / _FILE
    try:
        return Description.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
