"""A run's folder: the only place that spells the names of its files.

RUN/config.yaml  interface.json  metrics.csv  summary.json  tensorboard/  wandb/
RUN/checkpoints/step_000010000.safetensors  best.safetensors  RUN/videos/step_000010000.mp4
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import json
import os
import re
import time
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from iqmpc import checkpoint
from iqmpc.config import Config, differences, may_change, shortened
from iqmpc.errors import CheckpointError, ConfigError, one_line
from iqmpc.files import remove_temporary, strict_json, write_atomically
from iqmpc.task_interface import TaskInterface

_NAME = re.compile(r"step_(\d+)\.safetensors")
# What file systems say that lock nothing, or (NFS) nothing that is not open for writing.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL, errno.EBADF, errno.EISDIR}
_MAX_CONFIG = 2**16  # bytes; a config.yaml has some 3,000
_LARGEST = 1e300
_MAY_BE_NULL = {
    "return_mean", "return_std", "success_rate", "demonstrator_return", "reward_correlation",
}  # fmt: skip

Checkpoint = tuple[Path, dict[str, Tensor], dict[str, Any]]  # path, tensors, meta


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases, of which a few lines make a text without end."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not read in settings")
        return super().compose_node(parent, index)


class RunFolder:
    """The folder of one run, there or not yet. `RunFolder(RunFolder(path))` is the same."""

    def __init__(self, path: str | Path | RunFolder):
        self.path = path.path if isinstance(path, RunFolder) else Path(path)

    def __str__(self) -> str:
        return str(self.path)

    @classmethod
    def unused(cls, config: Config, *, claim: bool = False) -> RunFolder:
        """`runs/TASK/TIME-seedN`, not there yet; with `claim` made by this process and no other."""
        stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-seed{config.seed}"
        parent = Path("runs", config.task.name)
        for number in itertools.count(1):
            path = parent / (stamp if number == 1 else f"{stamp}-{number}")
            if not claim and not path.exists():
                return cls(path)
            if claim:
                with contextlib.suppress(FileExistsError):
                    path.mkdir(parents=True)
                    return cls(path)
        raise AssertionError("unreachable")

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.csv"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def interface(self) -> Path:
        return self.path / "interface.json"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def wandb(self) -> Path:
        return self.path / "wandb"

    @property
    def wandb_id(self) -> Path:
        """By which Weights & Biases knows the run, also when it is continued."""
        return self.wandb / "iqmpc-id"

    def video(self, step: int) -> Path:
        """Where the video of an evaluation at a step lies."""
        return self.path / "videos" / f"step_{step:09d}.mp4"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def evaluation(self, agent: str) -> Path:
        """Where `iqmpc table` keeps what it measured of "planner", "prior" or a baseline."""
        return self.path / f"evaluation-{agent}.json"

    @property
    def holds_run(self) -> bool:
        return self.config.exists()

    def save_config(self, config: Config, *, new: bool) -> None:
        """Write config.yaml; a `new` run claims its folder with it (`FileExistsError` if taken)."""
        text = yaml.safe_dump(config.to_dict(), sort_keys=False)
        write_atomically(self.config, text.encode(), exclusive=new)

    def load_config(self) -> Config:
        """The settings of the run; `CheckpointError` where the folder holds none."""
        try:
            with open(self.config, "rb") as file:
                data = file.read(_MAX_CONFIG + 1)
            if len(data) > _MAX_CONFIG:
                raise CheckpointError(
                    f"{self.config} has over {_MAX_CONFIG} bytes, which no settings have"
                )
            values = yaml.load(data.decode(), _PlainLoader)
        except (FileNotFoundError, NotADirectoryError):
            raise CheckpointError(f"{self} is no run folder: it has no config.yaml") from None
        except (OSError, UnicodeError, ValueError, RecursionError, yaml.YAMLError) as error:
            raise CheckpointError(f"{self.config} cannot be read: {one_line(error)}") from error
        try:
            return Config.restored(values)
        except ConfigError as error:
            raise CheckpointError(f"{self.config}: {error}") from error

    def check_settings(self, found: Config, path: Path, meta: Mapping[str, Any]) -> None:
        """`CheckpointError` that names what differs in `found`, as read from config.yaml, from the
        settings with which the checkpoint at `path` was written, and where it says none."""
        checkpoint.check_description(path, meta)
        other = [
            text
            for key, text in differences(meta.get("settings", {}), found.to_dict())
            if not may_change(key)
        ]
        if other:
            raise CheckpointError(
                f"{self.config} is not what {path.name} was made with: " + "; ".join(other)
            )

    def save_summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json, in which a number that is not finite is null."""
        write_atomically(self.summary, (strict_json(summary) + "\n").encode())

    def load_figures(self, path: Path, names: Collection[str]) -> dict[str, Any]:
        """The figures that a JSON file holds, `names` at least, {} where there is no file.

        Null, or absent, are those of `_MAY_BE_NULL` where there is none or one that is not finite.
        Raises `CheckpointError` for anything else.
        """
        found = self._load_json(path)
        for name in sorted(names) if found else ():
            value = found.setdefault(name)
            number = isinstance(value, (int, float)) and not abs(value) > _LARGEST
            if not number and not (value is None and name in _MAY_BE_NULL):
                raise CheckpointError(
                    f"{path} cannot be read: {name} is {shortened(value)}, expected a number"
                )
        return found

    def _load_json(self, path: Path) -> dict[str, Any]:
        try:
            found = json.loads(path.read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        if not isinstance(found, dict):
            raise CheckpointError(f"{path} cannot be read: it holds no figures by name")
        return found

    def save_interface(self, interface: TaskInterface) -> None:
        """Keep what the task's numbers are."""
        write_atomically(self.interface, (strict_json(interface.to_dict()) + "\n").encode())

    def load_interface(self) -> TaskInterface | None:
        """What the task's numbers are; None of a run of 0.1, which did not keep it.

        Raises `CheckpointError` for a file that describes no interface.
        """
        found = self._load_json(self.interface)
        try:
            return TaskInterface.from_dict(found) if found else None
        except ValueError as error:
            raise CheckpointError(f"{self.interface} cannot be read: {error}") from error

    def save(
        self, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], *, keep: int = 2
    ) -> Path:
        """Write the checkpoint of `step` and keep the newest `keep`. Returns its path.

        Raises as `checkpoint.save` does, and leaves those that are there then.
        """
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        path = self.step_path(step)
        checkpoint.save(path, tensors, meta)
        for old in [other for other in self._steps() if other != path][keep - 1 :]:
            old.unlink(missing_ok=True)
        return path

    def step_path(self, step: int) -> Path:
        """Where the checkpoint of a step lies, as long as it is kept."""
        return self.checkpoints / f"step_{step:09d}.safetensors"

    @property
    def best(self) -> Path:
        """Where the agent of the best evaluation lies: its weights alone, nothing to go on from."""
        return self.checkpoints / "best.safetensors"

    def save_best(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Write the agent of the best evaluation in the place of the one before."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        checkpoint.save(self.best, tensors, meta)

    def checkpoint(self, which: str = "newest") -> Checkpoint:
        """The `newest` whole checkpoint, the `best` agent, or the checkpoint of a step.

        Raises `CheckpointError` where there is none, with those that are there.
        """
        if which == "newest":
            return self.newest()
        if which == "best":
            path = self.best
        else:
            steps = {str(_step(path)): path for path in self._steps()}
            if which not in steps:
                kept = ", ".join([*reversed(steps), *(["best"] if self.best.exists() else [])])
                raise CheckpointError(
                    f"{self} has no checkpoint {which!r}: it has {kept or 'none'} "
                    "(newest, best or a number of steps)"
                )
            path = steps[which]
        if not path.exists():
            raise CheckpointError(
                f"{self} has no best agent: none was evaluated on the way, or the run was made "
                "before they were kept"
            )
        return path, *checkpoint.load(path)

    @property
    def has_checkpoint(self) -> bool:
        """Whether the run has written a checkpoint, whole or not."""
        return bool(self._steps())

    def newest(self) -> Checkpoint:
        """The newest whole checkpoint; a damaged one is named in a warning.

        Raises `CheckpointError` where the folder holds none.
        """
        tried: set[Path] = set()
        while True:
            paths = self._steps()
            for path in paths:
                try:
                    return path, *checkpoint.load(path)
                except CheckpointError as error:
                    # a run that is going on removes the old ones, and has newer ones then
                    if path.exists():
                        warnings.warn(
                            f"skipping a checkpoint: {error}", RuntimeWarning, stacklevel=2
                        )
            tried.update(paths)
            if tried.issuperset(self._steps()):
                break
        found = f"none of {len(paths)} can be used" if paths else "there is none"
        raise CheckpointError(f"no checkpoint in {self.checkpoints}: {found}")

    def newer(self, path: Path) -> list[Path]:
        """The run's checkpoints of more steps than `path`."""
        return [other for other in self._steps() if _step(other) > _step(path)]

    def tidy(self, *, keep: int = 2) -> None:
        """Remove what a run that was killed has left: parts of files, checkpoints too many."""
        for place in (self.path, self.checkpoints):
            remove_temporary(place)
        for old in self._steps()[keep:]:
            old.unlink(missing_ok=True)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder, which must exist; `ConfigError` while somebody else does.

        The lock is the process's and leaves no file. A file system without locks is not kept from
        having two runs in one folder.
        """
        folder = os.open(self.path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(
                    f"{self} is being trained by another process: wait for its end, or give "
                    "another run_dir"
                ) from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
            yield
        finally:
            os.close(folder)

    def _steps(self) -> list[Path]:
        """Checkpoints, those of the most steps first; other names are somebody else's files."""
        found = [p for p in self.checkpoints.glob("step_*.safetensors") if _NAME.fullmatch(p.name)]
        return sorted(found, key=_step, reverse=True)


def set_aside(paths: list[Path]) -> None:
    """Rename checkpoints that could not be used to `….damaged`."""
    for path in paths:
        path.rename(path.with_name(path.name + ".damaged"))


def _step(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])
