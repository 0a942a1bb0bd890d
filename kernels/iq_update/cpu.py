"""The C++ backend of `iq_update`: the whole update in one call, in the parameters' own memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from iqmpc.kernels.cpu import as_array
from iqmpc.kernels.iq_update.types import Rows, UpdateSettings, UpdateState
from iqmpc.kernels.weights import Layer

METRICS = (
    "consistency",
    "q_expert",
    "q_behaviour",
    "target_value",
    "reward_expert",
    "reward_behaviour",
    "value_term",
    "gradient_penalty",
    "critic_loss",
    "termination_loss",
    "termination_recall",
    "termination_precision",
    "model_grad_norm",
    "policy_loss",
    "entropy",
    "q_policy",
    "policy_grad_norm",
    "cloning_error",
)


class FusedUpdate:
    """Makes updates of `state` in C++ (csrc/include/iqmpc/learner.hpp).

    Tensors must be float32, contiguous and on the CPU; `ValueError` names one that is not. They are
    borrowed: nothing else may write them during a call, and what is written between two is seen by
    the next. The result depends on them, `seed` and the number of the update, not on `threads`.
    `precision` is that of the operands of products, "float32" or "bf16" (the encoder's are always
    float32). `isa` names one of `iqmpc._C.isa_levels()`, by default the best one or the one named
    by the environment variable IQMPC_ISA. Dropout's probability is rounded to 2⁻¹⁶.
    """

    def __init__(
        self,
        state: UpdateState,
        settings: UpdateSettings,
        *,
        seed: int,
        precision: str = "float32",
        threads: int = 1,
        isa: str | None = None,
    ):
        # Here, so that the package can be imported, and the reference used, without the extension.
        from iqmpc import _C

        w = state.weights
        self.native = _C.Learner(
            **{
                part: _stack(
                    part,
                    state,
                    getattr(w, part),
                    getattr(state.average, part) if state.average else None,
                )
                for part in ("encoder", "dynamics", "policy", "termination")
            },
            critics=[
                _stack(
                    "critics", state, w.critics, state.average.critics if state.average else None, k
                )
                for k in range(w.num_critics)
            ],
            targets=[
                [
                    tuple((as_array("target critics", t[k]),) for t in layer if t is not None)
                    for layer in state.targets
                ]
                for k in range(w.num_critics)
            ],
            simnorm_dim=w.simnorm_dim,
            log_std_min=w.log_std_min,
            log_std_max=w.log_std_max,
            seed=seed,
            precision=precision,
            threads=threads,
            isa=isa,
            **settings._asdict(),
        )

    def learn(
        self,
        experts: Rows | None,
        behaviour: Rows,
        batch: int,
        *,
        update: int,
        model_steps: int,
        policy_steps: int,
    ) -> tuple[dict[str, float], bool, bool]:
        """One update on `batch` slices of each, drawn uniformly.

        `model_steps` and `policy_steps` are the steps that Adam has made. Returns the metrics that
        the objective has, and whether the model's and the policy's step were skipped because a
        loss or gradient was not finite.
        """
        return _result(
            self.native.learn(
                None if experts is None else _arrays(experts),
                _arrays(behaviour),
                batch,
                update,
                model_steps,
                policy_steps,
            )
        )

    def update(
        self,
        obs: Tensor,
        action: Tensor,
        reward: Tensor,
        terminated: Tensor,
        experts: int,
        *,
        update: int,
        model_steps: int,
        policy_steps: int,
    ) -> tuple[dict[str, float], bool, bool]:
        """The same on slices given, as `iqmpc.losses.Batch` has them."""
        arrays = [
            as_array(name, t)
            for name, t in (
                ("obs", obs),
                ("action", action),
                ("reward", reward),
                ("terminated", terminated),
            )
        ]
        return _result(self.native.update(*arrays, experts, update, model_steps, policy_steps))


def _arrays(rows: Rows) -> tuple[np.ndarray, ...]:
    return (
        *(as_array(name, t) for name, t in zip(rows._fields[:4], rows[:4], strict=True)),
        rows.starts.numpy(),
    )


def _result(values: Sequence[float]) -> tuple[dict[str, float], bool, bool]:
    *metrics, model_skipped, policy_skipped = values
    return dict(zip(METRICS, metrics, strict=True)), bool(model_skipped), bool(policy_skipped)


def _stack(
    part: str,
    state: UpdateState,
    layers: tuple[Layer, ...],
    averages: tuple[Layer, ...] | None,
    member: int | None = None,
) -> list[tuple]:
    def parameter(name: str, t: Tensor, average: Tensor | None) -> tuple:
        held = (t, state.first(t), state.second(t), average)
        return tuple(
            x if x is None else as_array(name, x if member is None else x[member]) for x in held
        )

    result = []
    for i, layer in enumerate(layers):
        other = None if averages is None else averages[i]
        result.append(
            tuple(
                parameter(f"{part} layer {i} {name}", t, getattr(other, name, None))
                for name, t in zip(Layer._fields, layer, strict=True)
                if t is not None
            )
        )
    return result
