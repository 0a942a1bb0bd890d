"""Run folders and their checkpoints: one safetensors file each, written whole or not at all.

    RUN/config.yaml  metrics.csv  summary.json  tensorboard/  checkpoints/step_000010000.safetensors
"""

from __future__ import annotations

import hashlib
import json
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
from iqmpc.files import write_atomically

FORMAT, VERSION = "iqmpc-checkpoint", 1
KEPT = 2


def save(
    run: str | Path, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]
) -> Path:
    """Write the checkpoint of `step` atomically and keep the newest two. Returns its path."""
    folder = Path(run) / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    text = json.dumps(dict(meta))
    header = {"format": FORMAT, "version": str(VERSION), "meta": text,
              "digest": digest(tensors, text)}
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
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if header.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is no {FORMAT} file (its format says {header.get('format')!r})")
    if header.get("version") != str(VERSION):
        raise CheckpointError(
            f"{path} has version {header.get('version')}, this program reads {VERSION}")
    text = header.get("meta", "")
    if digest(tensors, text) != header.get("digest"):
        raise CheckpointError(f"{path} is damaged: its content does not match its digest")
    return tensors, json.loads(text)


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


def set_aside(run: str | Path, path: Path) -> None:
    """Rename the checkpoints newer than `path`, which could not be used, to `….damaged`."""
    for other in _paths(Path(run) / "checkpoints"):
        if other.name > path.name:
            other.rename(other.with_name(other.name + ".damaged"))


def exists(run: str | Path) -> bool:
    """Whether the run has written a checkpoint, whole or not."""
    return bool(_paths(Path(run) / "checkpoints"))


def save_config(run: str | Path, config: Config, *, new: bool) -> None:
    """Write config.yaml; a `new` run claims its folder with it (`FileExistsError` if taken)."""
    text = yaml.safe_dump(config.to_dict(), sort_keys=False)
    write_atomically(Path(run) / "config.yaml", text.encode(), exclusive=new)


def load_config(run: str | Path) -> Config:
    """The settings of a run; `CheckpointError` where the folder is none."""
    path = Path(run) / "config.yaml"
    try:
        values = yaml.safe_load(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{run} is no run folder: it has no config.yaml") from None
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    try:
        return Config.from_dict(values)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _paths(folder: Path) -> list[Path]:
    """Checkpoints, newest first."""
    return sorted(folder.glob("step_*.safetensors"), reverse=True)


def digest(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """Of names, dtypes, shapes and bytes, and of `text`: a flipped bit changes it."""
    total = hashlib.blake2b(text.encode(), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"{name}:{tensor.dtype}:{list(tensor.shape)};".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
