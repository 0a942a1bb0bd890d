"""What an update is given, whoever computes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from torch import Tensor

from iqmpc.kernels.weights import Layer, Weights

if TYPE_CHECKING:
    from iqmpc.config import Config


class UpdateSettings(NamedTuple):
    """Symbols as in `LearnerConfig`. `entropy_coef` is β·A or β, the one in force, `c_gp` is 0
    where there is no gradient penalty, `average_rate` is read where an average is kept."""

    objective: str
    entropy: Literal["exact", "presquash"]
    horizon: int
    rho: float
    discount: float
    alpha: float
    entropy_coef: float
    c_cons: float
    c_iq: float
    c_gp: float
    c_bc: float
    c_termination: float
    termination_weight: float
    dropout: float
    dropout_always: bool
    lr: float
    encoder_lr_scale: float
    grad_clip: float
    tau: float
    average_rate: float

    @classmethod
    def of(cls, config: Config, action_dim: int) -> UpdateSettings:
        """The settings of a run with actions of size `action_dim`."""
        s = config.learner
        values: dict[str, Any] = {
            name: getattr(s, name) for name in cls._fields if hasattr(s, name)
        }
        values |= {
            "discount": config.discount,
            "entropy_coef": config.entropy_coefficient(action_dim),
            "c_gp": s.c_gp if config.gradient_penalty and s.objective != "td" else 0.0,
            "dropout": config.model.dropout,
            "dropout_always": s.dropout == "always",
            "average_rate": config.agent.average_rate,
        }
        return cls(**values)


class UpdateState(NamedTuple):
    """All that an update changes, as tensors that stay where they are.

    `targets` are the target critics, stacked as the critics are; `first` and `second` give Adam's
    moments of a parameter; `average` is the average of the weights, or None.
    """

    weights: Weights
    targets: tuple[Layer, ...]
    first: Callable[[Tensor], Tensor]
    second: Callable[[Tensor], Tensor]
    average: Weights | None = None


class Rows(NamedTuple):
    """Episodes as rows: obs [R, O], action [R, A], reward [R], terminated [R], float32; and
    `starts` int64 [S], the first rows of all slices."""

    obs: Tensor
    action: Tensor
    reward: Tensor
    terminated: Tensor
    starts: Tensor
