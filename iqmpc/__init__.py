"""IQ-MPC: reward-free world models for online imitation learning, with compiled kernels."""

import importlib
from typing import TYPE_CHECKING, Any

from iqmpc.compose import compose
from iqmpc.config import Config
from iqmpc.demos import Demonstrations
from iqmpc.envs import make_env
from iqmpc.episode import Episode
from iqmpc.errors import IqmpcError

if TYPE_CHECKING:
    from iqmpc.agent import Agent
    from iqmpc.evaluation import evaluate
    from iqmpc.learner import Learner
    from iqmpc.model import WorldModel
    from iqmpc.planner import Planner
    from iqmpc.trainer import Trainer

__version__ = "0.1.0"

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

# What imports torch comes when it is first asked for: a process that only steps an environment
# would pay seconds and some 200 MB for it.
_WITH_TORCH = {
    "Agent": "agent",
    "Learner": "learner",
    "Planner": "planner",
    "Trainer": "trainer",
    "WorldModel": "model",
    "evaluate": "evaluation",
}


def __getattr__(name: str) -> Any:
    if name not in _WITH_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_WITH_TORCH[name]}"), name)
    globals()[name] = value
    return value
