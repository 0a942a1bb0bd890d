"""Stable-Baselines3 policies, read without that library and without unpickling anything.

A saved model is a zip of tensors (which torch loads as nothing but tensors), and of settings as
JSON: those that are no JSON are pickled inside it, with a description in words beside them. Only
the words are read.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import nn

from iqmpc.demos.types import DemonstrationError

_ACTIVATIONS = {c.__name__: c for c in (nn.ReLU, nn.Tanh, nn.ELU, nn.SiLU, nn.GELU, nn.LeakyReLU)}
_MAX_MEMBER = 2**28  # bytes; the largest MLP policies have a few million weights
_FREE_BYTES, _RATIO = 2**20, 20  # neither the library nor torch compresses what it saves
# Layers of the deterministic actor by kind of policy: hidden ones by prefix, then the last.
_SAC = (("actor.latent_pi.",), ("actor.mu.", "actor.mu.0."))
_PPO = (("mlp_extractor.shared_net.", "mlp_extractor.policy_net."), ("action_net.",))
# Weights beside the actor's: critics, targets, and the spread of what is drawn while training.
_UNUSED = re.compile(
    r"critic|actor_target\.|actor\.log_std|log_std$|value_net|mlp_extractor\.value_net"
)


class Sb3Policy:
    """The deterministic action of a SAC, TQC, TD3, DDPG, PPO or A2C model with an MLP policy.

    Call it with obs float32 [O] for an action float32 [A] in [-1, 1]. Raises DemonstrationError
    for a file that is no such model, or whose sizes are not obs_dim and action_dim.
    """

    def __init__(self, path: str | Path, obs_dim: int, action_dim: int) -> None:
        path = Path(path)
        settings, weights, self.digest = _read(path)
        try:
            self._layers, self._clip = _actor(weights, settings)
        except (_Unsuitable, RuntimeError, ValueError, TypeError) as error:
            raise DemonstrationError(f"{path}: {error}") from None
        linear = [layer for layer in self._layers if isinstance(layer, nn.Linear)]
        sizes = linear[0].in_features, linear[-1].out_features
        if sizes != (obs_dim, action_dim):
            raise DemonstrationError(
                f"{path}: the policy has {sizes[0]} observations and {sizes[1]} actions, the task "
                f"{obs_dim} and {action_dim}"
            )
        beside = [
            *path.parent.glob("*vecnormalize*.pkl"),
            *path.with_suffix("").glob("*vecnormalize*.pkl"),
        ]
        if beside:
            raise DemonstrationError(
                f"{path}: the policy was trained under VecNormalize, whose statistics are in a "
                f"pickle ({beside[0]}), which is not read"
            )

    def reset(self, env: gymnasium.Env) -> None:
        """Nothing is kept from step to step."""

    @torch.no_grad()
    def __call__(self, obs: np.ndarray) -> np.ndarray:
        x = torch.as_tensor(obs, dtype=torch.float32)
        for layer in self._layers:
            x = layer(x)
        if self._clip is None:
            return torch.tanh(x).numpy()
        low, high = self._clip
        return (2 * (x.clamp(low, high) - low) / (high - low) - 1).clamp(-1, 1).numpy()


class _Unsuitable(Exception):
    """Why a model cannot be used."""


def _read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor], str]:
    """(settings, the policy's weights, digest of the file)."""
    try:
        content = path.read_bytes()
        members = _unpacked(content, ("data", "policy.pth"), path)
        _unpacked(members["policy.pth"], (), path)
        settings = json.loads(members["data"])
        weights = torch.load(io.BytesIO(members["policy.pth"]), "cpu", weights_only=True)
    except DemonstrationError:
        raise
    except OSError as error:
        raise DemonstrationError(f"{path}: cannot be read: {error.strerror}") from error
    except Exception as error:  # zipfile, json and torch have a dozen between them
        said = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise DemonstrationError(
            f"{path}: no model as Stable-Baselines3 saves them, with data and policy.pth ({said})"
        ) from error
    if (
        not isinstance(settings, dict)
        or not isinstance(weights, dict)
        or not all(isinstance(tensor, torch.Tensor) for tensor in weights.values())
    ):
        raise DemonstrationError(f"{path}: data or policy.pth is not what Stable-Baselines3 saves")
    claimed = sum(tensor.nelement() * tensor.element_size() for tensor in weights.values())
    if claimed > len(members["policy.pth"]):  # one number that is said to be many
        raise DemonstrationError(
            f"{path}: {claimed} bytes of weights are claimed by a policy.pth "
            f"of {len(members['policy.pth'])} bytes"
        )
    return settings, weights, hashlib.sha256(content).hexdigest()[:16]


def _unpacked(content: bytes, wanted: tuple[str, ...], path: Path) -> dict[str, bytes]:
    """Members of a zip, which may not be larger than its size allows, all of them together."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        claimed = sum(info.file_size for info in archive.infolist())
        limit = min(_FREE_BYTES + _RATIO * len(content), 4 * _MAX_MEMBER)
        if claimed > limit:
            raise DemonstrationError(
                f"{path}: its zip unpacks to {claimed} bytes, expected at most {limit} from "
                f"{len(content)}"
            )
        for name in wanted:
            if archive.getinfo(name).file_size > _MAX_MEMBER:
                raise DemonstrationError(f"{path}: {name} has over {_MAX_MEMBER} bytes")
        return {name: archive.read(name) for name in wanted}


def _actor(
    weights: Mapping[str, torch.Tensor], settings: Mapping[str, Any]
) -> tuple[list[nn.Module], tuple[torch.Tensor, torch.Tensor] | None]:
    """The actor's layers, and the range to clip to where they do not end in tanh."""
    options = settings.get("policy_kwargs") or {}
    if not isinstance(options, dict):
        raise _Unsuitable("policy_kwargs is no dictionary")
    used: set[str] = set()
    clip = None
    if "action_net.weight" in weights:
        if options.get("squash_output"):
            raise _Unsuitable("PPO with squash_output is not read")
        if settings.get("_last_original_obs") is not None:
            raise _Unsuitable(
                "the policy was trained under VecNormalize, whose statistics are in "
                "a pickle, which is not read"
            )
        layers = _mlp(weights, _PPO, _activation(options, "Tanh"), used)
        clip = _action_range(settings, len(weights["action_net.weight"]))
    elif any(name.startswith("actor.log_std") for name in weights):
        layers = _mlp(weights, _SAC, _activation(options, "ReLU"), used)
        if "actor.mu.0.weight" in weights:  # generalised state-dependent exploration
            bound = options.get("clip_mean", 2.0)
            if not isinstance(bound, (int, float)):
                raise _Unsuitable(f"clip_mean must be a number, got {bound!r}")
            if bound > 0:
                layers.append(nn.Hardtanh(-bound, bound))
    elif any(re.fullmatch(r"actor\.mu\.\d+\.weight", name) for name in weights):
        last = max(int(n.split(".")[2]) for n in weights if re.match(r"actor\.mu\.\d+\.", n))
        shape = (("actor.mu.",), (f"actor.mu.{last}.",))
        layers = _mlp(weights, shape, _activation(options, "ReLU"), used)
    else:
        raise _Unsuitable("it has no actor of SAC, TQC, TD3, DDPG, PPO or A2C")
    others = [name for name in weights if name not in used and not _UNUSED.search(name)]
    if others:
        raise _Unsuitable(f"its policy is more than an MLP: it has {others[0]!r}")
    return layers, clip


def _mlp(
    weights: Mapping[str, torch.Tensor],
    names: tuple[tuple[str, ...], tuple[str, ...]],
    activation: type[nn.Module],
    used: set[str],
) -> list[nn.Module]:
    """Linear layers in the order of their numbers, with activations between."""
    hidden, outputs = names
    output = next((name for name in outputs if f"{name}weight" in weights), outputs[0])
    prefixes = []
    for start in hidden:
        found = {
            int(match[1])
            for name in weights
            if (match := re.fullmatch(re.escape(start) + r"(\d{1,4})\.weight", name))
        }
        prefixes += [f"{start}{i}." for i in sorted(found) if f"{start}{i}." != output]
    layers: list[nn.Module] = []
    width = None
    for prefix in [*prefixes, output]:
        weight, bias = weights.get(f"{prefix}weight"), weights.get(f"{prefix}bias")
        if (
            weight is None
            or bias is None
            or (weight.ndim, bias.ndim) != (2, 1)
            or len(weight) != len(bias)
        ):
            raise _Unsuitable(f"{prefix}weight and {prefix}bias make no linear layer")
        if width not in (None, weight.shape[1]):
            raise _Unsuitable(f"{prefix}weight does not take what the layer before gives")
        width = len(weight)
        layer = nn.Linear(weight.shape[1], width)
        layer.load_state_dict({"weight": weight, "bias": bias})
        layers += [layer, activation()]
        used |= {f"{prefix}weight", f"{prefix}bias"}
    return layers[:-1]


def _activation(options: Mapping[str, Any], default: str) -> type[nn.Module]:
    """`activation_fn` is a class: the file has its name in words."""
    said = options.get("activation_fn")
    name = default if said is None else str(said).removesuffix("'>").split(".")[-1]
    if name not in _ACTIVATIONS:
        raise _Unsuitable(f"unknown activation {name!r} (known: {', '.join(_ACTIVATIONS)})")
    return _ACTIVATIONS[name]


def _action_range(settings: Mapping[str, Any], size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The bounds of the action space, which the file has in words: '[-1. -1.]'."""
    space = settings.get("action_space") or {}
    try:
        bounds = [
            torch.tensor([float(x) for x in space[key].strip("[]").split()])
            for key in ("low", "high")
        ]
    except (TypeError, KeyError, AttributeError, ValueError):
        bounds = []
    finite = len(bounds) == 2 and all(len(b) == size and b.isfinite().all() for b in bounds)
    if not finite or not (bounds[0] < bounds[1]).all():
        raise _Unsuitable("its action space is no bounded Box with its bounds in words")
    return bounds[0], bounds[1]
