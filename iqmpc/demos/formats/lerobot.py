"""Reader for LeRobot datasets (v2 and v3): Parquet files under data/ and meta/info.json."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from iqmpc.demos.checks import describe
from iqmpc.demos.formats import budget
from iqmpc.demos.formats.assembly import Assembly, last
from iqmpc.demos.formats.safe_hdf5 import MAX_RATIO
from iqmpc.demos.types import Defect, DemonstrationError, Draft, Facts

INFO = "meta/info.json"
_VERSIONS = ("v2.", "v3.")
_FREE_ROWS = 2**22
_OPTIONAL = ("next.reward", "next.success", "frame_index")


def read(path: Path, facts: Facts) -> Draft | Defect:
    """Read a dataset's folder for the checks; a Defect when it is none.

    Observations are the numeric observation.* columns in sorted order, or facts.obs_keys; actions
    are facts.action_key. Episodes without gaps in their numbers, unless facts.allow_gaps. The
    tasks are described in words, which go to the provenance: facts.task gives the name. Success is
    next.success of an episode's last recorded step; `terminated` is false throughout, as
    next.done does not tell a terminal state from the end of a recording.
    Raises DemonstrationError without pyarrow.
    """
    try:
        import pyarrow
    except ImportError as error:  # missing, or for another NumPy
        raise DemonstrationError(
            f"{path}: LeRobot datasets need the extra 'lerobot': pip install 'iqmpc[lerobot]' "
            f"({error})"
        ) from error
    assembly = Assembly("lerobot", path, facts)
    at = assembly.at
    info = _info(path, facts, at)
    if isinstance(info, Defect):
        return info
    columns, total, version = info
    action = facts.action_key or "action"
    seen, before = 0, -1
    try:
        for number, parts in _episodes(path, columns, action, at):
            if assembly.full:
                break
            here = partial(at, episode=seen if facts.allow_gaps else number)
            if number <= before or (number != seen and not facts.allow_gaps):
                expected = (
                    f"above {before}"
                    if facts.allow_gaps
                    else f"{seen}, without gaps or repeats (--allow-gaps takes those there are)"
                )
                assembly.add_defect(at("episode_index", str(number), expected))
                break
            seen, before = seen + 1, number
            observations, actions, rest = _fields(parts, columns, action, here)
            assembly.add(observations, actions, **rest)
        else:
            if total != seen and not facts.allow_gaps:
                expected = f"{describe(total)}, as total_episodes says"
                assembly.add_defect(at("data", f"{seen} episodes", expected))
    except (pyarrow.ArrowException, OSError, ValueError, MemoryError, _Unreadable) as error:
        found = error.args[0] if isinstance(error, _Unreadable) else f"damage ({error})"
        expected = "whole Parquet files with the columns of meta/info.json"
        assembly.add_defect(at("data", found, expected))
    notes = {}
    if seen and before + 1 != seen:
        notes["episodes_missing"] = f"{before + 1 - seen} of {before + 1}"
    if action != "action":
        notes["action_key"] = action
    notes = {"dataset_version": version, **notes, **_described(path)}
    return assembly.draft(facts.task, notes)


class _Unreadable(Exception):
    """A file or column that cannot be used; says what was found."""


def _info(path: Path, facts: Facts, at: partial[Defect]) -> tuple[list[str], object, str] | Defect:
    """(observation columns, number of episodes, version)."""
    try:
        info = json.loads((path / INFO).read_text())
        version, features = info["codebase_version"], info["features"]
        kinds = {name: feature["dtype"] for name, feature in features.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        found = f"an unreadable file ({type(error).__name__}: {error})"
        return at(INFO, found, "a JSON object with codebase_version and features")
    if not isinstance(version, str) or not version.startswith(_VERSIONS):
        return at("codebase_version", describe(version), "v2.0, v2.1 or v3.0")
    numeric = sorted(name for name, kind in kinds.items() if _is_numeric(kind))
    observed = [name for name in numeric if name.startswith("observation.")]
    columns = observed if facts.obs_keys is None else list(facts.obs_keys)
    held = ", ".join(observed) or "no numeric observation.* feature"
    if not columns:
        return at("features", held, "observations of numbers (images are not read)")
    for name in columns:
        if name not in numeric:
            return at("features", f"no {name} of numbers", f"one of: {held}")
    action = facts.action_key or "action"
    if action not in numeric:
        held = ", ".join(name for name in numeric if "action" in name) or "none"
        return at(
            "features",
            f"no {action} of numbers",
            f"actions; --action-key names another column (of numbers there are: {held})",
        )
    return columns, info.get("total_episodes"), version


def _is_numeric(kind: object) -> bool:
    return isinstance(kind, str) and kind.startswith(("float", "int", "uint", "bool"))


def _episodes(
    path: Path, columns: list[str], action: str, at: partial[Defect]
) -> Iterator[tuple[int, dict[str, list[np.ndarray]]]]:
    """(episode_index, parts of each column) of one episode after the other."""
    import pyarrow.parquet as parquet

    files = sorted(
        path.glob("data/chunk-*/*.parquet"),
        key=lambda file: [int(n) for n in re.findall(r"\d+", f"{file.parent.name} {file.name}")],
    )
    if not files:
        raise _Unreadable("no data/chunk-*/*.parquet")
    current, parts, widths = None, {}, {}
    for name in files:
        with parquet.ParquetFile(name) as file:
            rows, size = file.metadata.num_rows, name.stat().st_size
            if rows > _FREE_ROWS + MAX_RATIO * size:
                raise _Unreadable(f"{name.name}, which claims {rows} rows in {size} bytes")
            held = set(file.schema_arrow.names)
            missing = {*columns, action, "episode_index"} - held
            if missing:
                raise _Unreadable(f"{name.name} without {', '.join(sorted(missing))}")
            wanted = [*columns, action, "episode_index", *(k for k in _OPTIONAL if k in held)]
            budget.spend(_claimed(file.metadata, wanted))
            for batch in file.iter_batches(batch_size=4096, columns=wanted):
                if not len(batch):
                    continue
                arrays = {key: _array(batch.column(key), f"{name.name}, {key}") for key in wanted}
                for key, array in arrays.items():
                    width = widths.setdefault(key, array.shape[1])
                    if array.shape[1] != width:
                        raise _Unreadable(
                            f"{array.shape[1]} values a step in {name.name}, {key}, and {width} "
                            "before"
                        )
                indices = arrays.pop("episode_index")
                cuts = np.flatnonzero(np.diff(indices[:, 0])) + 1
                bounds = [0, *cuts.tolist(), len(indices)]
                for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
                    number = int(indices[start, 0])
                    if number != current:
                        if current is not None:
                            yield current, parts
                        current, parts = number, {key: [] for key in arrays}
                    for key, array in arrays.items():
                        if key not in parts:
                            raise _Unreadable(f"{name.name} with {key}, which others lack")
                        parts[key].append(array[start:stop])
    if current is not None:
        yield current, parts


def _claimed(metadata: Any, wanted: list[str]) -> int:
    """The bytes that columns take when they are unpacked, at 8 each value."""
    total = 0
    for group in range(metadata.num_row_groups):
        for index in range(metadata.num_columns):
            column = metadata.row_group(group).column(index)
            name = column.path_in_schema
            if any(name == key or name.startswith(f"{key}.") for key in wanted):
                total += 8 * column.num_values
    return total


def _array(column: Any, name: str) -> np.ndarray:
    """A column float32 [rows, values]; indices stay whole numbers."""
    import pyarrow as pa

    if column.null_count:
        raise _Unreadable(f"{column.null_count} empty values in {name}")
    rows, values = len(column), column
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        lengths = column.value_lengths().to_numpy(zero_copy_only=False)
        if (lengths != lengths[0]).any():
            raise _Unreadable(f"rows of different lengths in {name}")
        values = column.flatten()
    elif pa.types.is_fixed_size_list(column.type):
        values = column.flatten()
    number = pa.types.is_floating(values.type) or pa.types.is_integer(values.type)
    if not (number or pa.types.is_boolean(values.type)) or values.null_count:
        raise _Unreadable(f"{column.type} in {name}")
    array = values.to_numpy(zero_copy_only=False)
    if array.dtype.kind == "f":
        with np.errstate(over="ignore"):  # becomes inf, which the checks find
            array = array.astype(np.float32)
    return array.reshape(rows, -1) if len(array) else array.reshape(rows, 0)


def _fields(
    parts: dict[str, list[np.ndarray]], columns: list[str], action: str, at: partial[Defect]
) -> tuple[object, object, dict[str, object]]:
    """(observations, actions, rewards and success) of an episode."""
    whole = {key: np.concatenate(arrays) for key, arrays in parts.items()}
    frames = whole.pop("frame_index", None)
    observations: object = np.concatenate([whole[key] for key in columns], 1).astype(np.float32)
    if frames is not None and not np.array_equal(frames[:, 0], np.arange(len(frames))):
        observations = at("frame_index", "a gap or another order", "0, 1, 2, … without gaps")
    rewards, success = whole.get("next.reward"), whole.get("next.success")
    return (
        observations,
        whole[action].astype(np.float32),
        {
            "rewards": None if rewards is None else rewards.astype(np.float32),
            "success": None if success is None else last(success[:, 0] == 1),
        },
    )


def _described(path: Path) -> dict[str, str]:
    """What the dataset says of its tasks, in words: v2 keeps lines of JSON, v3 Parquet."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    try:
        if (path / "meta/tasks.parquet").is_file():
            with parquet.ParquetFile(path / "meta/tasks.parquet") as file:
                budget.spend(64 * file.metadata.num_rows)
            columns = parquet.read_table(path / "meta/tasks.parquet").columns
            words = [c.to_pylist() for c in columns if pa.types.is_string(c.type)][0]
        else:
            lines = (path / "meta/tasks.jsonl").read_text().splitlines()
            words = [json.loads(line)["task"] for line in lines]
    except (pa.ArrowException, OSError, LookupError, ValueError, TypeError, RecursionError):
        return {}
    return {"described_as": "; ".join(map(str, words))}
