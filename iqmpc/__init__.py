"""IQ-MPC: reward-free world models for online imitation learning, with compiled kernels."""

from iqmpc.agent import Agent
from iqmpc.compose import compose
from iqmpc.config import Config
from iqmpc.demos import Demonstrations, Episode
from iqmpc.envs import make_env
from iqmpc.errors import IqmpcError
from iqmpc.evaluation import evaluate
from iqmpc.learner import Learner
from iqmpc.model import WorldModel
from iqmpc.planner import Planner
from iqmpc.trainer import Trainer

__version__ = "0.1.0"

__all__ = [
    "Agent", "Config", "Demonstrations", "Episode", "IqmpcError", "Learner", "Planner", "Trainer",
    "WorldModel", "compose", "evaluate", "make_env",
]
