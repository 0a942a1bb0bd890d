"""Reader for ManiSkill's trajectories: traj_0, traj_1, … in HDF5, and a JSON file beside it."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import h5py

from iqmpc.demos.formats import safe_hdf5
from iqmpc.demos.formats.assembly import Assembly, last
from iqmpc.demos.types import Defect, Draft, Facts


def read(path: Path, facts: Facts) -> Draft | Defect:
    """Read a file for the checks; a Defect when it is no readable HDF5 file.

    The task is env_info.env_id of the JSON file of the same name. Success is that of the last
    step.
    """
    return safe_hdf5.read_file(
        path, partial(Defect, str(path)), partial(_read, path=path, facts=facts)
    )


def _read(file: h5py.File, path: Path, facts: Facts) -> Draft | Defect:
    assembly = Assembly("maniskill", path, facts)
    for name in safe_hdf5.numbered(file, "traj_"):
        if assembly.full:
            break
        here = assembly.here()
        group = safe_hdf5.stored(file, name, h5py.Group, here)
        if not isinstance(group, h5py.Group):
            assembly.add_defect(group or here(name, "nothing", "a trajectory's group"))
            continue
        observations = safe_hdf5.observations(group, "obs", facts.obs_keys, here)
        if observations is None:
            observations = here(
                "obs",
                "nothing",
                "observations: replay the trajectories with ManiSkill's replay_trajectory and "
                "--save-traj --obs-mode state",
            )
        ended = last(safe_hdf5.flags(group, "terminated", here))
        assembly.add(
            observations,
            safe_hdf5.numbers(group, "actions", here),
            rewards=safe_hdf5.numbers(group, "rewards", here),
            terminated=False if ended is None else ended,
            success=last(safe_hdf5.flags(group, "success", here)),
        )
    task, notes = _described(path.with_suffix(".json"), facts)
    return assembly.draft(task, notes)


def _described(path: Path, facts: Facts) -> tuple[object, dict[str, str]]:
    """The task and notes for the provenance, from the JSON file if it is there."""
    try:
        content = json.loads(path.read_text())
        info = content["env_info"]
        task, options = info["env_id"], info.get("env_kwargs") or {}
        notes = {key: options[key] for key in ("control_mode", "obs_mode") if key in options}
        return task, {key: str(value) for key, value in notes.items()}
    except FileNotFoundError:
        return facts.task, {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        found = f"no readable description ({type(error).__name__}: {error})"
        return Defect(str(path), "", found, "ManiSkill's JSON with env_info.env_id"), {}
