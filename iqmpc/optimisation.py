"""Gradient steps that a run survives, what follows weights slowly, and optimisers as tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def guarded_step(
    loss: Tensor,
    optimiser: torch.optim.Optimizer,
    parameters: Sequence[Tensor],
    clip: float,
    *,
    allowed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A step of fused Adam, if `allowed` (bool, 0-dim) and finite.

    The gradient of `parameters` is clipped at norm `clip`. A step that is not made changes no
    parameter, moment or step count. Returns the gradient's norm and whether the step was made.
    """
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip).detach()
    made = loss.detach().isfinite() & norm.isfinite()
    if allowed is not None:
        made = made & allowed
    # Fused Adam looks at this where the gradients are, so that the host need not wait: where it is
    # 1, parameters, moments and step counts stay (what gradient scaling uses it for, which sets it
    # from outside too).
    found_inf = (~made).to(torch.float32)
    optimiser.found_inf = found_inf  # pyright: ignore[reportAttributeAccessIssue]
    optimiser.step()
    return norm, made


@torch.no_grad()
def move(old: list[Tensor], new: list[Tensor], rate: Tensor) -> None:
    """old ← old + rate (new - old) in place; rate, 0-dim, on their device."""
    # The public lerp_ goes tensor by tensor.
    torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
        old, new, [rate] * len(old)
    )


def optimiser_tensors(name: str, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What a continuation needs of an optimiser, as `NAME.PARAMETER.KEY`."""
    return {
        # A count may be shared by all parameters, which a file does not allow.
        f"{name}.{index}.{key}": value.clone() if key == "step" else value
        for index, values in optimiser.state_dict()["state"].items()
        for key, value in values.items()
    }


def load_optimiser_tensors(
    name: str, optimiser: torch.optim.Optimizer, state: Mapping[str, Tensor]
) -> None:
    """Restore `optimiser_tensors`, in place where there are moments: a captured step stays valid.

    What `state` does not hold is as before the first step.
    """
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    for index, parameter in enumerate(parameters):
        held, prefix = optimiser.state[parameter], f"{name}.{index}."
        for tensor in held.values():
            tensor.zero_()
        for key, value in state.items():
            if not key.startswith(prefix):
                continue
            field = key.removeprefix(prefix)
            if field in held:
                held[field].copy_(value)
            else:
                held[field] = value.to(parameter.device, copy=True)
