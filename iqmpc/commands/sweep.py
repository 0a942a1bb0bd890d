"""`iqmpc train -m`: many runs, by Hydra's multirun, its launchers and its sweepers."""

from __future__ import annotations

import importlib.util
import math
import os
import shlex
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from iqmpc.commands.train import anywhere, train_run
from iqmpc.composition import composed, full_key, parse_words
from iqmpc.config import Config, differences, may_change
from iqmpc.console import console, print_error, show_warning
from iqmpc.errors import CheckpointError, ConfigError, IqmpcError, one_line
from iqmpc.run_folder import RunFolder

# What has no plugin here needs none (`basic`), or is somebody else's.
_EXTRAS = {
    "hydra/launcher=joblib": ("hydra_joblib_launcher", "joblib"),
    "hydra/launcher=submitit_local": ("hydra_submitit_launcher", "submitit"),
    "hydra/launcher=submitit_slurm": ("hydra_submitit_launcher", "submitit"),
    "hydra/launcher=ray": ("hydra_ray_launcher", "ray"),
    "hydra/sweeper=optuna": ("hydra_optuna_sweeper", "optuna"),
}
_ERROR = "error.txt"  # in the folder of a run that failed: what ended it


def sweep(words: Sequence[str]) -> None:
    """Make the runs that `words` describe, in Hydra's syntax, each in a folder of the sweep's.

    A run that is there and has ended is left as it is, one that has not is gone on with.
    Raises `ConfigError` for what cannot begin, before anything has, and `IqmpcError` at the end
    where runs have failed, which costs the others nothing.
    """
    overrides = parse_words([full_key(word) for word in words])
    ours = [o for o in overrides if not _is_hydras(o)]
    _check_plugins(words)
    _check_settings(ours)
    folder = _folder(overrides)
    given = [o.input_line or "" for o in overrides if o.key_or_group != "hydra.sweep.dir"]
    again = shlex.join(["iqmpc", "train", "-m", *given, f"hydra.sweep.dir={folder}"])
    for path in folder.rglob(_ERROR):  # what is made again now
        path.unlink()
    console.print(f"sweep folder {folder}", markup=False, highlight=False, soft_wrap=True)
    try:
        _run_hydra([*given, *_own_words(overrides, ours, folder)])
    except (KeyboardInterrupt, SystemExit):
        console.print(f"interrupted; continue with: {again}", markup=False, soft_wrap=True)
        raise
    failed = sorted(path.parent.name for path in folder.rglob(_ERROR))
    if failed:
        raise IqmpcError(
            f"{len(failed)} runs have failed, each of which says why in its {_ERROR}: "
            f"{'; '.join(failed)}\ngo on with them: {again}"
        )
    reached = f"what they reached: iqmpc table {shlex.quote(str(folder))}"
    console.print(reached, markup=False, highlight=False, soft_wrap=True)


def _check_plugins(words: Sequence[str]) -> None:
    for word in words:
        plugin, extra = _EXTRAS.get(word, (None, None))
        try:
            missing = plugin and importlib.util.find_spec(f"hydra_plugins.{plugin}") is None
        except ModuleNotFoundError:
            missing = True
        if missing:
            raise ConfigError(f"{word} needs the extra {extra!r}: pip install 'iqmpc[{extra}]'")


def _check_settings(ours: Sequence[Override]) -> None:
    """`ConfigError` for a setting that is none, or a value of one, each looked at once."""
    for override in ours:
        if override.key_or_group in ("run_dir", "resume"):
            raise ConfigError(
                f"{override.key_or_group} is of a single run: hydra.sweep.dir=FOLDER names a "
                "sweep's folder, and continues the sweep that is there"
            )
    choices = {o.key_or_group: _values(o) for o in ours}
    first = {key: values[0] for key, values in choices.items() if values}
    composed(first)
    for key, values in choices.items():
        for value in values[1:]:
            composed({**first, key: value})


def _values(override: Override) -> list[Any]:
    """Those that the setting has in turn; none where only Hydra knows them, such as of a glob."""
    if not override.is_sweep_override():
        return [override.value()]
    if not (override.is_choice_sweep() or override.is_range_sweep()):
        return []
    words = [f"{override.key_or_group}={v}" for v in override.sweep_string_iterator()]
    return [o.value() for o in parse_words(words)]


def _folder(overrides: Sequence[Override]) -> Path:
    """The sweep's folder, which is no run's."""
    folder = Path("sweeps", time.strftime("%Y%m%d-%H%M%S"))
    for override in overrides:
        if override.key_or_group == "hydra.sweep.dir":
            folder = Path(str(override.value()))
    if "${" in str(folder):
        raise ConfigError(f"hydra.sweep.dir must be a plain path, got {folder}")
    if RunFolder(folder).holds_run:
        raise ConfigError(
            f"{folder} is the folder of a run, not of a sweep: continue it with resume={folder}, "
            "or give another hydra.sweep.dir"
        )
    return folder.resolve()


def _own_words(
    overrides: Sequence[Override], ours: Sequence[Override], folder: Path
) -> Iterator[str]:
    """What Hydra is told besides: where runs go, named by what differs among them."""
    keys = {o.key_or_group for o in overrides}
    swept = [o.key_or_group for o in ours if o.is_sweep_override()]
    if not swept and not any(key.startswith("hydra/sweeper") for key in keys):
        raise ConfigError(
            "a sweep needs several values of something, such as seed=1,2,3 (a single run has no -m)"
        )
    alike = [o.key_or_group for o in ours if not o.is_sweep_override()]
    yield "hydra.sweep.dir=" + _quoted(str(folder))
    yield f"hydra.job.config.override_dirname.exclude_keys=[{','.join(map(_quoted, alike))}]"
    lines = {o.input_line for o in overrides}
    if "hydra/sweeper=optuna" in lines and "hydra.sweeper.direction" not in keys:
        yield "hydra.sweeper.direction=maximize"
    # Where there is a cluster, Ray refuses the size that the launcher sets unless one is given.
    size = "hydra.launcher.ray.init.object_store_memory"
    if "hydra.launcher.ray.init.address" in keys and size not in keys:
        yield f"+{size}=null"


def _run_hydra(words: Sequence[str]) -> None:
    """Hydra's own command line. What it raises about the words is a `ConfigError`.

    What a launcher or a sweeper raises, such as of a cluster that is not there, is an `IqmpcError`.
    """
    ConfigStore.instance().store("schema", Config().to_dict())
    main = hydra.main(version_base="1.3", config_path="pkg://iqmpc.configs", config_name="sweep")
    with _command_line(["iqmpc", "--multirun", *words]):
        try:
            main(run_job)()
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(one_line(error)) from error
        except Exception as error:  # of a launcher or a sweeper: runs raise none
            cluster = any("launcher=ray" in word for word in words)
            hint = " (is the cluster up, and hydra.launcher.ray.init.address its head's?)" * cluster
            said = f"{type(error).__name__}: {one_line(error)}"
            raise IqmpcError(f"the sweep could not be made: {said}{hint}") from error


@contextmanager
def _command_line(words: list[str]) -> Iterator[None]:
    """Hydra reads its words there, and with the variable raises what it would print."""
    theirs, full = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv, os.environ["HYDRA_FULL_ERROR"] = words, "1"
    try:
        yield
    finally:
        sys.argv = theirs
        if full is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = full


def run_job(_: DictConfig) -> float:
    """One run, in whatever process the launcher has chosen. Returns its return, for a sweeper.

    What ends it is told and kept in its folder, and costs other runs nothing: its return is then
    not a number.
    """
    warnings.showwarning = show_warning
    job: Any = HydraConfig.get()
    folder, name = RunFolder(job.runtime.output_dir), job.job.override_dirname
    try:
        settings = {o.key_or_group: o.value() for o in parse_words(job.overrides.task)}
        config = composed({**settings, "run_dir": str(folder)})
        config = anywhere(config, Path(job.runtime.cwd))
        summary = _finished(folder, config)
        if summary is None:
            summary = train_run(config, folder.path, resume=folder.holds_run, name=name)[0]
        else:
            console.print(f"{name}: has ended, and is kept", markup=False, highlight=False)
    except Exception as error:
        ours = isinstance(error, (IqmpcError, OSError))
        (folder.path / _ERROR).write_text(f"{error}\n" if ours else traceback.format_exc())
        print_error(f"{name}: {error if ours else f'{type(error).__name__}: {one_line(error)}'}")
        return math.nan
    reached = summary["return_mean"]
    return math.nan if reached is None else reached


def _finished(folder: RunFolder, config: Config) -> dict[str, Any] | None:
    """The summary of a run that has ended; None where there is something to do.

    Raises `CheckpointError` where the folder holds a run of other settings.
    """
    if not folder.holds_run:
        return None
    found = folder.load_config()
    other = [
        text for key, text in differences(found.to_dict(), config.to_dict()) if not may_change(key)
    ]
    if other:
        raise CheckpointError(
            f"{folder} holds another run ({'; '.join(other)}): move it away, or give another "
            "hydra.sweep.dir"
        )
    if found.train != config.train:  # such as more steps
        return None
    return folder.load_figures(folder.summary, {"return_mean"}) or None


def _is_hydras(override: Override) -> bool:
    return override.key_or_group.partition(".")[0].partition("/")[0] == "hydra"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "\\'") + "'"
