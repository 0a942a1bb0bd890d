"""One checkpoint: a safetensors file, written whole or not at all, with a digest of its content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from iqmpc.config import shortened
from iqmpc.errors import CheckpointError, one_line
from iqmpc.files import write_atomically
from iqmpc.observation import ObservationSpec

FORMAT, VERSION = "iqmpc-checkpoint", 1
# What a description says at least; of the rest some is younger than some checkpoints.
_COUNTS = ("action_dim", "env_steps", "updates", "episodes", "evaluated_at")
_NEEDED = ("wall_s", "demonstrator_return", "demonstrations")
_NONE = type(None)
_FIELDS = (
    ("wall_s", (int, float), "seconds"),
    ("demonstrator_return", (int, float, _NONE), "a number or null"),
    ("demonstrations", (str, _NONE), "a digest or null"),
    ("settings", (dict, _NONE), "settings by name"),
    ("started", (int, _NONE), "a count"),
    ("env_restarts", (int, _NONE), "a count"),
    ("device", (str, _NONE), "a name"),
    ("mode", (str, _NONE), "a name"),
    ("best", (list, _NONE), "the best evaluation's score or null"),
)


def save(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write `tensors` and `meta` (what JSON can hold) to `path` atomically.

    Raises `CheckpointError`, and leaves what is there, where a tensor of the learner (`learner.…`)
    is not finite.
    """
    bad = [
        name
        for name, tensor in tensors.items()
        if name.startswith("learner.")
        and tensor.is_floating_point()
        and not tensor.isfinite().all()
    ]
    if bad:
        raise CheckpointError(
            f"{path}: {len(bad)} tensors of the learner are not finite (the first is {bad[0]}), "
            "so it is not written"
        )
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    text = json.dumps(dict(meta))
    header = {
        "format": FORMAT,
        "version": str(VERSION),
        "meta": text,
        "digest": digest(tensors, text),
    }
    write_atomically(path, safetensors.torch.save(tensors, header))


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, meta) of one file; `CheckpointError` for anything but a whole checkpoint."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (OSError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {one_line(error)}") from error
    if header.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is no {FORMAT} file (its format says {shortened(header.get('format'))})"
        )
    if header.get("version") != str(VERSION):
        raise CheckpointError(
            f"{path} has version {shortened(header.get('version'))}, this program reads {VERSION}: "
            "use the iqmpc that wrote it, or a newer one"
        )
    text = header.get("meta", "")
    if digest(tensors, text) != header.get("digest"):
        raise CheckpointError(f"{path} is damaged: its content does not match its digest")
    try:
        return tensors, json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} holds no description of itself: {one_line(error)}"
        ) from error


def check_description(path: Path, meta: Any) -> None:
    """`CheckpointError` for what no run has written, though its digest is right."""

    def refuse(found: str) -> None:
        raise CheckpointError(f"{path} does not describe itself: {found}")

    if not isinstance(meta, dict):
        refuse(f"it is {shortened(meta)}, expected names and values")
    shape = meta.get("obs_shape") or [meta.get("obs_dim")]  # the latter before there were images
    if not isinstance(shape, list) or not all(map(_is_count, shape)):
        refuse(f"obs_shape is {shortened(shape)}, expected counts")
    for key in _COUNTS:
        if not _is_count(meta.get(key)):
            refuse(f"{key} is {shortened(meta.get(key))}, expected a count")
    for key, kinds, expected in _FIELDS:
        if key in _NEEDED and key not in meta:
            refuse(f"it has no {key}")
        value = meta.get(key)
        if not isinstance(value, kinds) or isinstance(value, bool):
            refuse(f"{key} is {shortened(value)}, expected {expected}")


def shapes(meta: Mapping[str, Any]) -> tuple[ObservationSpec, int]:
    """What the agent of a checkpoint observes, and A."""
    # "obs_dim" stands in checkpoints from before there were images
    observed = meta.get("obs_shape") or int(meta["obs_dim"])
    return ObservationSpec.of(observed), int(meta["action_dim"])


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def digest(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """Of names, dtypes, shapes and bytes, and of `text`: a flipped bit changes it."""
    total = hashlib.blake2b(text.encode(), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"{name}:{tensor.dtype}:{list(tensor.shape)};".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
