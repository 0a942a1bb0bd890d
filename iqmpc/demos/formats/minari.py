"""Reader for Minari datasets: episode_0, episode_1, … in HDF5, and what metadata.json says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from iqmpc.demos.checks import describe
from iqmpc.demos.formats import safe_hdf5
from iqmpc.demos.formats.assembly import Assembly, last
from iqmpc.demos.types import Defect, Draft, Facts

MAIN = "main_data.hdf5"
METADATA = "metadata.json"
_USED = ("env_spec", "observation_space", "action_space", "total_episodes", "dataset_id")
_COMPOSED = ("Dict", "Tuple")


def locate(folder: Path) -> Path | None:
    """The data folder of a dataset: the folder itself or its data/; None where it is none."""
    for place in (folder, folder / "data"):
        if (place / MAIN).is_file() or (place / METADATA).is_file():
            return place
    return None


def read(path: Path, facts: Facts) -> Draft | Defect:
    """Read a dataset's folder, or its main_data.hdf5, for the checks.

    The task is the environment's id. Of a dictionary of observations those members are read that
    the dataset's observation space has. Actions are rescaled from its action space. Success
    is infos/success (or infos/is_success) after the last step, where the environment tells it.
    """
    at = partial(Defect, str(path))
    place = locate(path) if path.is_dir() else path.parent
    if place is None:
        return at("", "neither data/main_data.hdf5 nor data/metadata.json", "a Minari dataset")
    metadata: object = {}
    try:
        metadata = json.loads((place / METADATA).read_text())
    except FileNotFoundError:
        pass  # before Minari 0.5 it was in the HDF5 file's attributes
    except (OSError, ValueError, RecursionError) as error:
        return at(METADATA, f"an unreadable file ({error})", "a JSON object")
    if not isinstance(metadata, dict):
        return at(METADATA, describe(metadata), "a JSON object")
    if metadata.get("data_format", "hdf5") != "hdf5":
        return at("data_format", describe(metadata["data_format"]), "'hdf5'")
    main = path if path.is_file() else place / MAIN
    if not main.is_file():
        return at(MAIN, "nothing", "the dataset's episodes")
    return safe_hdf5.read_file(main, at, partial(_read, path=path, metadata=metadata, facts=facts))


def _read(file: h5py.File, path: Path, metadata: dict[str, object], facts: Facts) -> Draft | Defect:
    assembly = Assembly("minari", path, facts)
    at = assembly.at
    metadata = {key: metadata.get(key, safe_hdf5.text(file, key)) for key in _USED}
    action_range = _action_range(metadata["action_space"], at)
    if isinstance(action_range, Defect):
        assembly.add_defect(action_range)
        action_range = None
    keys, named = facts.obs_keys, "--obs-keys"
    if keys is None:
        keys, named = _members(metadata["observation_space"], at), "observation_space"
    if isinstance(keys, Defect):
        assembly.add_defect(keys)
        keys = None
    names, total = safe_hdf5.numbered(file, "episode_"), metadata["total_episodes"]
    if total is not None and describe(total) != str(len(names)):
        expected = f"{describe(total)}, as total_episodes says"
        assembly.add_defect(at("", f"{len(names)} episodes", expected))
    for name in names:
        if assembly.full:
            break
        here = assembly.here()
        group = safe_hdf5.stored(file, name, h5py.Group, here)
        if not isinstance(group, h5py.Group):
            assembly.add_defect(group or here(name, "nothing", "an episode's group"))
            continue
        assembly.add(
            safe_hdf5.observations(group, "observations", keys, here, named=named),
            safe_hdf5.numbers(group, "actions", here),
            rewards=safe_hdf5.numbers(group, "rewards", here),
            terminated=last(safe_hdf5.flags(group, "terminations", here)),
            success=_success(group, here),
        )
    dataset = metadata["dataset_id"]
    notes = {"dataset": dataset} if isinstance(dataset, str) else {}
    return assembly.draft(_task(metadata, facts, at), notes, action_range)


def _task(metadata: dict[str, Any], facts: Facts, at: partial[Defect]) -> object:
    spec = metadata["env_spec"]
    if spec is None:
        return facts.task
    try:
        return json.loads(spec)["id"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return at("env_spec", describe(spec), "a JSON object with the environment's id")


def _members(space: Any, at: partial[Defect]) -> tuple[str, ...] | Defect | None:
    """The members of a serialised space, in the order in which an environment's are observed.

    None where no space is given or it is neither a Dict nor a Tuple.
    """
    if space is None:
        return None
    try:
        found = json.loads(space)
        return tuple(_leaves(found)) if found["type"] in _COMPOSED else None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return at("observation_space", describe(space), "a serialised space")


def _leaves(space: dict[str, Any], path: str = "") -> Iterator[str]:
    if space["type"] not in _COMPOSED:
        yield path
        return
    parts = space["subspaces"]
    if space["type"] == "Dict":
        names = sorted(parts.items())
    else:  # as Minari names the members of a tuple
        names = [(f"_index_{index}", part) for index, part in enumerate(parts)]
    for name, part in names:
        yield from _leaves(part, f"{path}/{name}" if path else name)


def _action_range(space: Any, at: partial[Defect]) -> tuple[np.ndarray, np.ndarray] | Defect | None:
    """The bounds of a serialised action space, float64 [A]; None where none are given."""
    if space is None:
        return None
    try:
        found = json.loads(space)
        if found["type"] != "Box":
            return at("action_space", found["type"], "a Box")
        low, high = (np.ravel(np.array(found[key], np.float64)) for key in ("low", "high"))
    except (ValueError, TypeError, KeyError, RecursionError):
        return at("action_space", describe(space), "a serialised Box")
    if low.shape != high.shape or not (low < high).all():
        return at("action_space", describe(space), "a Box with low < high")
    return (low, high) if np.isfinite(low).all() and np.isfinite(high).all() else None


def _success(group: h5py.Group, at: partial[Defect]) -> bool | None:
    """What the environment told; None where it is no truth value."""
    infos = safe_hdf5.stored(group, "infos", h5py.Group, at)
    for key in ("success", "is_success"):
        if isinstance(infos, h5py.Group) and key in infos:
            found = last(safe_hdf5.flags(infos, key, at))
            return found if isinstance(found, bool) else None
    return None
