"""IQ-MPC: reward-free world models for online imitation learning, with compiled kernels."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from iqmpc.agent import Agent
    from iqmpc.composition import compose
    from iqmpc.config import Config
    from iqmpc.demos import Demonstrations
    from iqmpc.envs import make_env
    from iqmpc.episode import Episode
    from iqmpc.errors import IqmpcError
    from iqmpc.evaluation import evaluate
    from iqmpc.learner import Learner
    from iqmpc.model import WorldModel
    from iqmpc.planner import Planner
    from iqmpc.trainer import Trainer

__version__ = "0.2.0"

# Each name comes when it is first asked for. A robot that imports `iqmpc.kernels` needs neither
# Hydra nor gymnasium nor h5py, and a process that only steps an environment no torch, which would
# cost it seconds and some 200 MB. A module may not have the name of one of these: importing it
# would put the module in the name's place.
_MODULES = {
    "Agent": "agent",
    "Config": "config",
    "Demonstrations": "demos",
    "Episode": "episode",
    "IqmpcError": "errors",
    "Learner": "learner",
    "Planner": "planner",
    "Trainer": "trainer",
    "WorldModel": "model",
    "compose": "composition",
    "evaluate": "evaluation",
    "make_env": "envs",
}

__all__ = [
    "Agent",
    "Config",
    "Demonstrations",
    "Episode",
    "IqmpcError",
    "Learner",
    "Planner",
    "Trainer",
    "WorldModel",
    "compose",
    "evaluate",
    "make_env",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
