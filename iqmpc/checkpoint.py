"""Run folders and their checkpoints: one safetensors file each, written whole or not at all.

RUN/config.yaml  metrics.csv  summary.json  tensorboard/  checkpoints/step_000010000.safetensors
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
import yaml
from torch import Tensor

from iqmpc.config import Config, differences, may_change
from iqmpc.errors import CheckpointError, ConfigError
from iqmpc.files import remove_temporary, write_atomically
from iqmpc.observation import ObservationSpec

FORMAT, VERSION = "iqmpc-checkpoint", 1
KEPT = 2
_NAME = re.compile(r"step_(\d+)\.safetensors")
# What file systems say that lock nothing, or (NFS) nothing that is not open for writing.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL, errno.EBADF, errno.EISDIR}
_MAX_CONFIG = 2**16  # bytes; a config.yaml has some 3,000


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases, of which a few lines make a text without end."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not read in settings")
        return super().compose_node(parent, index)


def save(
    run: str | Path, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]
) -> Path:
    """Write the checkpoint of `step` atomically and keep the newest two. Returns its path.

    Raises `CheckpointError`, and leaves those that are there, where a tensor of the learner
    (`learner.…`) is not finite.
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
            f"step {step}: {len(bad)} tensors of the learner are not finite (the first is "
            f"{bad[0]}), so no checkpoint is written in {run}"
        )
    folder = Path(run) / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    text = json.dumps(dict(meta))
    header = {
        "format": FORMAT,
        "version": str(VERSION),
        "meta": text,
        "digest": digest(tensors, text),
    }
    path = folder / f"step_{step:09d}.safetensors"
    write_atomically(path, safetensors.torch.save(tensors, header))
    for old in [other for other in _paths(folder) if other != path][KEPT - 1 :]:
        old.unlink(missing_ok=True)
    return path


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, meta) of one file; `CheckpointError` for anything but a whole checkpoint."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (OSError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if header.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is no {FORMAT} file (its format says {header.get('format')!r})"
        )
    if header.get("version") != str(VERSION):
        raise CheckpointError(
            f"{path} has version {header.get('version')}, this program reads {VERSION}"
        )
    text = header.get("meta", "")
    if digest(tensors, text) != header.get("digest"):
        raise CheckpointError(f"{path} is damaged: its content does not match its digest")
    try:
        return tensors, json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} holds no description of itself: {error}") from error


def newest(run: str | Path) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """(path, tensors, meta) of the newest whole checkpoint; a damaged one is named in a warning.

    Raises `CheckpointError` where the folder holds none.
    """
    folder = Path(run) / "checkpoints"
    tried: set[Path] = set()
    while True:
        paths = _paths(folder)
        for path in paths:
            try:
                return path, *load(path)
            except CheckpointError as error:
                # a run that is going on removes the old ones, and has newer ones then
                if path.exists():
                    warnings.warn(f"skipping a checkpoint: {error}", RuntimeWarning, stacklevel=2)
        tried.update(paths)
        if tried.issuperset(_paths(folder)):
            break
    found = f"none of {len(paths)} can be used" if paths else "there is none"
    raise CheckpointError(f"no checkpoint in {folder}: {found}")


def shapes(meta: Mapping[str, Any]) -> tuple[ObservationSpec, int]:
    """What the agent of a checkpoint observes, and A."""
    # "obs_dim" stands in checkpoints from before there were images
    observed = meta.get("obs_shape") or int(meta["obs_dim"])
    return ObservationSpec.of(observed), int(meta["action_dim"])


def newer(run: str | Path, path: Path) -> list[Path]:
    """The run's checkpoints of more steps than `path`."""
    return [other for other in _paths(Path(run) / "checkpoints") if _step(other) > _step(path)]


def set_aside(paths: list[Path]) -> None:
    """Rename checkpoints that could not be used to `….damaged`."""
    for path in paths:
        path.rename(path.with_name(path.name + ".damaged"))


def tidy(run: str | Path) -> None:
    """Remove what a run that was killed has left: parts of files, and a checkpoint too many."""
    folder = Path(run) / "checkpoints"
    for place in (Path(run), folder):
        remove_temporary(place)
    for old in _paths(folder)[KEPT:]:
        old.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(run: str | Path) -> Iterator[None]:
    """Hold the run folder, which must exist; `ConfigError` while somebody else does.

    The lock is the process's and leaves no file. A file system without locks is not kept from
    having two runs in one folder.
    """
    folder = os.open(run, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{run} is being trained by another process") from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield
    finally:
        os.close(folder)


def check_settings(run: str | Path, found: Config, path: Path, meta: Mapping[str, Any]) -> None:
    """`CheckpointError` that names what differs in `found`, as read from the run's config.yaml,
    from the settings with which the checkpoint was written."""
    other = [
        text
        for key, text in differences(meta.get("settings", {}), found.to_dict())
        if not may_change(key)
    ]
    if other:
        raise CheckpointError(
            f"{Path(run) / 'config.yaml'} is not what {path.name} was made with: "
            + "; ".join(other)
        )


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
        with open(path, "rb") as file:
            data = file.read(_MAX_CONFIG + 1)
        if len(data) > _MAX_CONFIG:
            raise CheckpointError(f"{path} has over {_MAX_CONFIG} bytes, which no settings have")
        values = yaml.load(data.decode(), _PlainLoader)
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{run} is no run folder: it has no config.yaml") from None
    except (OSError, UnicodeError, ValueError, RecursionError, yaml.YAMLError) as error:
        said = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path} cannot be read: {said}") from error
    try:
        return Config.from_dict(values)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _paths(folder: Path) -> list[Path]:
    """Checkpoints, those of the most steps first; other names are somebody else's files."""
    found = [path for path in folder.glob("step_*.safetensors") if _NAME.fullmatch(path.name)]
    return sorted(found, key=_step, reverse=True)


def _step(path: Path) -> int:
    return int(_NAME.fullmatch(path.name)[1])


def digest(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """Of names, dtypes, shapes and bytes, and of `text`: a flipped bit changes it."""
    total = hashlib.blake2b(text.encode(), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"{name}:{tensor.dtype}:{list(tensor.shape)};".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
