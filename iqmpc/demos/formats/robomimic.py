"""Reader for robomimic's HDF5 files: data/demo_0, data/demo_1, …, subsets under mask/."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import h5py

from iqmpc.demos.checks import describe
from iqmpc.demos.formats import safe_hdf5
from iqmpc.demos.formats.assembly import Assembly
from iqmpc.demos.types import Defect, Draft, Facts


def read(path: Path, facts: Facts) -> Draft | Defect:
    """Read a file for the checks; a Defect when it is no readable HDF5 file.

    facts.mask chooses the demonstrations that mask/NAME lists. `dones` mark success or the end of
    a recording, no terminal state, so `terminated` is false throughout.
    """
    return safe_hdf5.read_file(
        path, partial(Defect, str(path)), partial(_read, path=path, facts=facts)
    )


def _read(file: h5py.File, path: Path, facts: Facts) -> Draft | Defect:
    assembly = Assembly("robomimic", path, facts)
    at = assembly.at
    data = safe_hdf5.stored(file, "data", h5py.Group, at)
    if not isinstance(data, h5py.Group):
        return data or at("data", "nothing", "a group of demonstrations")
    names = (
        safe_hdf5.numbered(data, "demo_") if facts.mask is None else _listed(file, facts.mask, at)
    )
    if isinstance(names, Defect):
        return names
    for name in names:
        if assembly.full:
            break
        here = assembly.here()
        demo = safe_hdf5.stored(data, name, h5py.Group, here)
        if not isinstance(demo, h5py.Group):
            assembly.add_defect(demo or here(f"data/{name}", "nothing", f"what {facts.mask} lists"))
            continue
        observations = safe_hdf5.observations(demo, "obs", facts.obs_keys, here)
        if observations is None and "states" in demo:
            observations = here(
                "obs",
                "nothing but simulator states",
                "observations: extract them with robomimic's dataset_states_to_obs.py",
            )
        assembly.add(
            observations,
            safe_hdf5.numbers(demo, "actions", here),
            rewards=safe_hdf5.numbers(demo, "rewards", here),
            next_observations=safe_hdf5.observations(demo, "next_obs", facts.obs_keys, here),
        )
    notes = {} if facts.mask is None else {"mask": facts.mask}
    return assembly.draft(_task(data, facts, at), notes)


def _task(data: h5py.Group, facts: Facts, at: partial[Defect]) -> object:
    arguments = safe_hdf5.text(data, "env_args")
    if arguments is None:
        return facts.task
    try:
        return json.loads(arguments)["env_name"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return at("data/env_args", describe(arguments), "a JSON object with env_name")


def _listed(file: h5py.File, mask: str, at: partial[Defect]) -> list[str] | Defect:
    """The demonstrations of a subset, in the order of their numbers."""
    group = safe_hdf5.stored(file, "mask", h5py.Group, at)
    if isinstance(group, Defect):
        return group
    held = [] if group is None else sorted(group)
    if group is None or mask not in held:
        return at("mask", ", ".join(held[:20]) or "nothing", f"{mask!r}, as --mask says")
    dataset = safe_hdf5.stored(group, mask, h5py.Dataset, at)
    if not isinstance(dataset, h5py.Dataset):
        return dataset or at(f"mask/{mask}", "nothing", "names such as demo_0")
    entries = safe_hdf5.values(dataset, partial(at, f"mask/{mask}"))
    if isinstance(entries, Defect):
        return entries
    try:
        names = [entry.decode() if isinstance(entry, bytes) else entry for entry in entries]
        return sorted(names, key=lambda name: int(name.removeprefix("demo_")))
    except (ValueError, TypeError, AttributeError):
        return at(f"mask/{mask}", describe(entries), "names such as demo_0")
