"""What the numbers of a task's observations and actions are: for whoever acts without the task."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TaskInterface:
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
    def from_dict(cls, values: Mapping[str, Any]) -> TaskInterface:
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
