"""Run folders and their checkpoints: one safetensors file each, written whole or not at all.

    RUN/config.yaml  metrics.csv  summary.json  tensorboard/  checkpoints/step_000010000.safetensors
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
import yaml
from torch import Tensor

from iqmpc.config import Config
from iqmpc.errors import CheckpointError, ConfigError

FORMAT, VERSION = "iqmpc-checkpoint", 1
KEPT = 2


def write_atomically(path: Path, data: bytes) -> None:
    """Temporary file, fsync, rename, fsync of the folder."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def save(
    run: str | Path, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]
) -> Path:
    """Write the checkpoint of `step` atomically and keep the newest two. Returns its path."""
    folder = Path(run) / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    header = {"format": FORMAT, "version": str(VERSION), "digest": _digest(tensors),
              "meta": json.dumps(dict(meta))}
    path = folder / f"step_{step:09d}.safetensors"
    write_atomically(path, safetensors.torch.save(tensors, header))
    for old in _paths(folder)[KEPT:]:
        old.unlink()
    return path


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, meta) of one file; `CheckpointError` for anything but a whole checkpoint."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if header.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is no {FORMAT} file (its format says {header.get('format')!r})")
    if header.get("version") != str(VERSION):
        raise CheckpointError(
            f"{path} has version {header.get('version')}, this program reads {VERSION}")
    if _digest(tensors) != header.get("digest"):
        raise CheckpointError(f"{path} is damaged: its content does not match its digest")
    return tensors, json.loads(header["meta"])


def newest(run: str | Path) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """(path, tensors, meta) of the newest whole checkpoint; a damaged one is named in a warning.

    Raises `CheckpointError` where the folder holds none.
    """
    folder = Path(run) / "checkpoints"
    paths = _paths(folder)
    for path in paths:
        try:
            return path, *load(path)
        except CheckpointError as error:
            warnings.warn(f"skipping a checkpoint: {error}", RuntimeWarning, stacklevel=2)
    found = f"none of {len(paths)} can be used" if paths else "there is none"
    raise CheckpointError(f"no checkpoint in {folder}: {found}")


def save_config(run: str | Path, config: Config) -> None:
    text = yaml.safe_dump(config.to_dict(), sort_keys=False)
    write_atomically(Path(run) / "config.yaml", text.encode())


def load_config(run: str | Path) -> Config:
    """The settings of a run; `CheckpointError` where the folder is none."""
    path = Path(run) / "config.yaml"
    try:
        values = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{run} is no run folder: it has no config.yaml") from None
    except yaml.YAMLError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    try:
        return Config.from_dict(values)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _paths(folder: Path) -> list[Path]:
    """Checkpoints, newest first."""
    return sorted(folder.glob("step_*.safetensors"), reverse=True)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """Of names, dtypes, shapes and bytes: what a flipped bit changes."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}:{tensor.dtype}:{list(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
