"""Where a run's figures go beside metrics.csv: TensorBoard and Weights & Biases."""

from __future__ import annotations

import math
import os
import secrets
import warnings
from collections.abc import Callable, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any, Protocol

from iqmpc.config import Config, all_keys
from iqmpc.errors import ConfigError, one_line
from iqmpc.files import write_atomically
from iqmpc.run_folder import RunFolder
from iqmpc.runlog import LEARNING, RESULTS, TIMING

SECTIONS = {"results": RESULTS, "learning": LEARNING, "timing": TIMING}
_INIT_S = 30.0  # for Weights & Biases to answer, or a person to say who they are
_FINISH_S = 60.0  # for it to take what is left when a run ends


def check_loggers(config: Config) -> None:
    """`ConfigError` where one of `train.loggers` needs a package that is not there."""
    if "wandb" in config.train.loggers:
        try:
            from wandb import init  # noqa: F401 - a folder ./wandb is importable too
        except ImportError:
            raise ConfigError(
                "train.loggers has wandb, which needs the extra 'wandb': pip install 'iqmpc[wandb]'"
            ) from None


class _Tracker(Protocol):
    def write(self, step: int, scalars: Mapping[str, float]) -> None: ...

    def video(self, step: int, path: Path) -> None: ...

    def close(self) -> None: ...


class Trackers:
    """Those of `train.loggers` that are not metrics.csv, which is always written.

    They get the run's settings once, then every row's finite figures as `section/metric`. `since`
    is the step that a run goes on from. One that fails, at any time, is left out from then on with
    a warning: it never ends a run. `on_message(text)` is told where to look.
    """

    def __init__(
        self,
        config: Config,
        run: RunFolder,
        *,
        since: int | None = None,
        on_message: Callable[[str], None] | None = None,
    ):
        self._open: dict[str, _Tracker] = {}
        for name in config.train.loggers:
            if name == "tensorboard":
                self._try(name, lambda: _TensorBoard(config, run, since))
            elif name == "wandb":
                self._try(name, lambda: _Wandb(config, run, on_message or (lambda text: None)))

    def write(self, values: Mapping[str, float | int | None]) -> None:
        """A row, as `RunLog.write` takes it."""
        scalars = {
            f"{section}/{key}": float(value)
            for section, keys in SECTIONS.items()
            for key in keys
            if (value := values.get(key)) is not None and math.isfinite(value)
        }
        step = values["env_steps"]
        self._each(lambda tracker: tracker.write(int(step or 0), scalars))

    def video(self, step: int, path: Path) -> None:
        """An MP4 file of an evaluation at `step`."""
        self._each(lambda tracker: tracker.video(step, path))

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())
        self._open.clear()

    def _each(self, do: Callable[[_Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            self._try(name, lambda tracker=tracker: do(tracker))

    def _try(self, name: str, do: Callable[[], _Tracker | None]) -> None:
        try:
            opened = do()
        except Exception as error:  # of its own, of protobuf, of the file system, of the network
            self._open.pop(name, None)
            warnings.warn(
                f"{name} is not written any more ({one_line(error)}); metrics.csv is",
                RuntimeWarning,
                stacklevel=4,
            )
        else:
            if opened is not None:
                self._open[name] = opened


class _TensorBoard:
    """RUN/tensorboard; the settings stand under HPARAMS. It shows no MP4."""

    def __init__(self, config: Config, run: RunFolder, since: int | None):
        from torch.utils.tensorboard import SummaryWriter  # slow to import
        from torch.utils.tensorboard.summary import hparams

        self._board = SummaryWriter(
            str(run.tensorboard), purge_step=None if since is None else since + 1
        )
        settings = {
            key: value if isinstance(value, (bool, int, float, str)) else str(value)
            for key, value in _settings(config).items()
        }
        # As `add_hparams`, which would write another run and values of its own.
        for summary in hparams(settings, {f"results/{key}": None for key in RESULTS}):
            self._board._get_file_writer().add_summary(summary)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._board.add_scalar(name, value, step)

    def video(self, step: int, path: Path) -> None:
        pass

    def close(self) -> None:
        self._board.close()


class _Wandb:
    """A run of project `iqmpc` (or $WANDB_PROJECT), continued by whoever continues this one.

    Where it cannot be reached, or nobody is logged in, its files are kept in RUN/wandb for
    `wandb sync`, as with WANDB_MODE=offline.
    """

    def __init__(self, config: Config, run: RunFolder, on_message: Callable[[str], None]):
        import wandb

        self._wandb = wandb
        run.wandb_id.parent.mkdir(exist_ok=True)
        if not run.wandb_id.exists():
            write_atomically(run.wandb_id, secrets.token_hex(4).encode())

        def begin(mode: Any) -> Any:
            return wandb.init(
                project=os.environ.get("WANDB_PROJECT", "iqmpc"),
                name=run.path.name,
                group=config.task.name,
                id=run.wandb_id.read_text(),
                resume="allow",
                dir=str(run.path),
                config=_settings(config),
                mode=mode,
                settings=wandb.Settings(
                    silent=True,
                    console="off",
                    init_timeout=_INIT_S,
                    login_timeout=_INIT_S,
                    finish_timeout=_FINISH_S,
                ),
            )

        try:
            self._run = begin(None)
        except Exception as error:
            on_message(f"wandb: {one_line(error)}")
            self._run = begin("offline")
        if self._run.offline:
            on_message(f"wandb is offline; to send this run: wandb sync {run.wandb}/offline-run-*")
        elif self._run.url:
            on_message(f"wandb: {self._run.url}")

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def video(self, step: int, path: Path) -> None:
        self._run.log({"evaluation": self._wandb.Video(str(path), format="mp4")}, step=step)

    def close(self) -> None:
        self._run.finish()


def _settings(config: Config) -> dict[str, Any]:
    return {key: attrgetter(key)(config) for key in all_keys()}
