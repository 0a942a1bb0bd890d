"""Which format a file or folder has, and its reader."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import h5py
import numpy as np

from iqmpc.demos.formats import (
    budget,
    d4rl,
    legacy,
    lerobot,
    maniskill,
    minari,
    native,
    npz,
    robomimic,
    safe_hdf5,
)
from iqmpc.demos.types import Defect, DemonstrationError, Draft, Facts

_PICKLES = (".pkl", ".pickle", ".p", ".pt", ".pth", ".joblib")
_SUFFIXES = {".h5": "hdf5", ".hdf5": "hdf5", ".npz": "npz"}
_ALWAYS = {"task", "action_low", "action_high", "clip_actions", "episodes", "task_obs_keys"}


@dataclass(frozen=True)
class _Format:
    """A reader, the facts that it can use beside those of every format, and whether of a folder."""

    read: Callable[[Path, Facts], Draft | Defect]
    facts: frozenset[str] = frozenset()
    folder: bool = False


FORMATS = {
    "hdf5": _Format(native.read),
    "npz": _Format(npz.read),
    "minari": _Format(minari.read, frozenset({"obs_keys"}), folder=True),
    "d4rl": _Format(d4rl.read, frozenset({"episode_length"})),
    "robomimic": _Format(robomimic.read, frozenset({"obs_keys", "mask"})),
    "maniskill": _Format(maniskill.read, frozenset({"obs_keys"})),
    "lerobot": _Format(
        lerobot.read, frozenset({"obs_keys", "action_key", "allow_gaps"}), folder=True
    ),
}


# Never detected: it must be asked for by this name.
LEGACY = "legacy pickle"


def read(
    path: str | os.PathLike[str], format: str | None = None, facts: Facts | None = None
) -> Draft | Defect:
    """Read a file or folder for the checks, by its content unless a format is named.

    `isolated.read` does the same in a process of its own, for files that may hang or crash their
    libraries. Raises DemonstrationError where there is no reader, where it cannot be opened, and
    for facts that the format has no use for.
    """
    path, facts = Path(path), facts or Facts()
    try:
        with budget.of(path):
            return _read(path, format, facts)
    except budget.OverBudget as error:
        return Defect(str(path), "", str(error), "no more than its size can hold")


def _read(path: Path, format: str | None, facts: Facts) -> Draft | Defect:
    if path.suffix.lower() in _PICKLES and format != LEGACY:
        raise _refused(path)
    if format not in (None, LEGACY, *FORMATS):
        raise DemonstrationError(f"unknown format {format!r}; readable: {', '.join(FORMATS)}")
    if not path.is_dir():
        try:
            # The libraries below would call an unreadable file a damaged one.
            open(path, "rb").close()
        except OSError as error:
            raise DemonstrationError(f"{path}: cannot be read: {error.strerror}") from error
    elif format is not None and not (format in FORMATS and FORMATS[format].folder):
        raise DemonstrationError(f"{path}: a folder, and format {format} is a file")
    name = format or detect(path)
    chosen = _Format(legacy.read) if name == LEGACY else FORMATS[name]
    if name == "lerobot" and not path.is_dir():
        raise DemonstrationError(f"{path}: a file, and format lerobot is a folder")
    for field in fields(Facts):
        given = getattr(facts, field.name) not in (None, False)
        if given and field.name not in chosen.facts | _ALWAYS:
            option = field.name.replace("_", "-")
            raise DemonstrationError(f"{path}: --{option} means nothing in the format {name}")
    if facts.obs_keys is None and "obs_keys" in chosen.facts:
        facts = replace(facts, obs_keys=facts.task_obs_keys)
    draft = chosen.read(path, facts)
    return in_range(draft, facts) if isinstance(draft, Draft) else draft


def detect(path: Path) -> str:
    """The name of a file's or folder's format, from its content.

    Raises DemonstrationError for pickles and for what has no reader.
    """
    if path.is_dir():
        if (path / lerobot.INFO).is_file():
            return "lerobot"
        if minari.locate(path) is not None:
            return "minari"
        raise DemonstrationError(
            f"{path}: a folder that is neither a LeRobot dataset (meta/info.json) nor a Minari one "
            "(data/main_data.hdf5)"
        )
    with open(path, "rb") as file:
        start = file.read(4)
    if start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05":
        raise _refused(path)
    try:
        if h5py.is_hdf5(path):
            with h5py.File(path, "r") as file:
                return _hdf5_layout(file)
    except safe_hdf5.DAMAGE:
        return "hdf5"  # whose reader says what is damaged
    if start == b"PK\x03\x04":
        if any(name.endswith(".pkl") for name in _members(path)):
            raise _refused(path)
        return "npz"
    if path.suffix.lower() in _SUFFIXES:
        return _SUFFIXES[path.suffix.lower()]
    raise DemonstrationError(
        f"{path}: unknown extension {path.suffix!r} and no content of a known format; "
        f"readable: {', '.join(FORMATS)}"
    )


def _members(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError):
        return []  # the reader says what is damaged


def _refused(path: Path) -> DemonstrationError:
    return DemonstrationError(
        f"{path}: pickled files are refused, since loading one can run any code in it; write the "
        "arrays to .npz or .h5 instead, or convert older code's lists of arrays with "
        "iqmpc demos convert --legacy-pickle"
    )


def _hdf5_layout(file: h5py.File) -> str:
    names = set(file)
    if "format" in file.attrs or "episodes" in names:
        return "hdf5"
    if "data" in names and file.get("data", getlink=True).__class__ is h5py.HardLink:
        if isinstance(file["data"], h5py.Group):
            return "robomimic"
    if safe_hdf5.numbered(file, "traj_"):
        return "maniskill"
    if safe_hdf5.numbered(file, "episode_"):
        return "minari"
    if {"observations", "actions"} <= names:
        return "d4rl"
    return "hdf5"


def in_range(draft: Draft, facts: Facts) -> Draft:
    """The set with its actions rescaled to [-1, 1], from the range that `facts` or the file gives,
    and clipped to it where facts.clip_actions says so.

    Raises DemonstrationError for a range that is none.
    """
    draft.range_hint = (
        "; --clip-actions where the simulator clipped them, --action-low and --action-high rescale "
        "from another range"
    )
    _rescale(draft, facts)
    if facts.clip_actions:
        _clip(draft)
    return draft


def _are_numbers(value: object) -> bool:
    """What is not is left for the checks to find."""
    return isinstance(value, np.ndarray) and value.dtype.kind in "fiu"


def _clip(draft: Draft) -> None:
    values = steps = 0
    for episode in draft.episodes:
        if isinstance(episode, Defect) or not _are_numbers(episode["actions"]):
            continue
        actions = episode["actions"]
        beyond = np.isfinite(actions) & (np.abs(actions) > 1)
        if beyond.any():
            values += int(beyond.sum())
            steps += int(beyond.reshape(len(beyond), -1).any(axis=1).sum())
            episode["actions"] = np.where(beyond, np.sign(actions), actions).astype(actions.dtype)
    if values and isinstance(draft.provenance, dict):
        draft.provenance["actions_clipped"] = f"{values} values to [-1, 1], in {steps} steps"


def _rescale(draft: Draft, facts: Facts) -> None:
    found = draft.action_range
    if (facts.action_low is None) != (facts.action_high is None):
        raise DemonstrationError("--action-low and --action-high must be given together")
    if facts.action_low is not None:
        found = np.array(facts.action_low), np.array(facts.action_high)
    if found is None:
        return
    # Rounded as the actions are, so that one at a bound stays there.
    low, high = (bound.astype(np.float32).astype(np.float64) for bound in found)
    finite = np.isfinite(low).all() and np.isfinite(high).all()
    if not finite or (len(low) != len(high) and 1 not in (len(low), len(high))):
        raise DemonstrationError(f"{draft.source}: {_said(low, high)} is no range of actions")
    if not (low < high).all():
        raise DemonstrationError(f"{draft.source}: action range {_said(low, high)} is empty")
    if (low == -1).all() and (high == 1).all():
        return
    for index, episode in enumerate(draft.episodes):
        if isinstance(episode, Defect) or not _are_numbers(episode["actions"]):
            continue
        actions = episode["actions"]
        at = partial(Defect, draft.source, "actions", episode=index)
        width = max(len(low), len(high))
        if actions.ndim != 2 or width not in (1, actions.shape[1]):
            episode["actions"] = at(f"shape {list(actions.shape)}", f"[T, {width}], as the range")
        else:
            scaled = 2 * ((actions - low) / (high - low)) - 1
            episode["actions"] = scaled.astype(np.float32)
    if isinstance(draft.provenance, dict):
        draft.provenance["actions_rescaled_from"] = _said(low, high)


def _said(low: np.ndarray, high: np.ndarray) -> str:
    one = len(set(low)) == 1 and len(set(high)) == 1
    low, high = (low[:1], high[:1]) if one else (low, high)
    return f"[{', '.join(f'{x:g}' for x in low)}] to [{', '.join(f'{x:g}' for x in high)}]"
