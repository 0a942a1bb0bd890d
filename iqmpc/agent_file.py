"""The file of a trained agent: safetensors, with all that acting takes and tells as metadata.

    format, format_version  "iqmpc-agent", "1"
    digest                  SHA-256 of the whole file with zeros in its own place
    agent                   JSON: model, planner, discount, beta, observation, action,
                            action_repeat, control_period_s, task
    provenance              JSON: run, steps, evaluation, versions
    config                  JSON: the run's settings

It holds no replay and none of the optimiser's moments. The C++ library reads it too
(docs/deploy.md).
"""

from __future__ import annotations

import hashlib
import json
import operator
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.torch
from torch import Tensor

from iqmpc.config import Config, shortened
from iqmpc.errors import CheckpointError, one_line
from iqmpc.files import write_atomically
from iqmpc.observation import ObservationSpec
from iqmpc.task_interface import TaskInterface

FORMAT, VERSION = "iqmpc-agent", 1
PACKAGED = "packaged:"  # before the name of a task whose agent ships
_SHIPPED = Path(__file__).parent / "agents"
_ALIGNMENT = 64  # of the data, so that a reader may map it
_LARGEST = 2**31  # bytes, as the C++ library reads
# What training says of a checkpoint, and `Agent.facts` of the agent.
FACTS = ("env_steps", "updates", "wall_s", "demonstrator_return")


class AgentFile(NamedTuple):
    """What a file holds: settings, the model's tensors by name, and what it says of them."""

    config: Config
    tensors: dict[str, Tensor]
    about: dict[str, Any]
    provenance: dict[str, Any]

    @property
    def interface(self) -> TaskInterface:
        """What the task's numbers are."""
        about = self.about
        return TaskInterface.from_dict(
            {
                "observation_names": about["observation"]["names"],
                "action_names": about["action"]["names"],
                "action_low": about["action"]["low"],
                "action_high": about["action"]["high"],
                "action_repeat": about["action_repeat"],
                "control_period_s": about["control_period_s"],
            }
        )

    @property
    def observation(self) -> ObservationSpec:
        return ObservationSpec.of(tuple(map(operator.index, self.about["observation"]["shape"])))

    @property
    def action_dim(self) -> int:
        """A."""
        return len(self.about["action"]["names"])

    @property
    def termination(self) -> bool:
        """Whether the model has a termination head."""
        return bool(self.about["model"]["termination"])

    @property
    def facts(self) -> dict[str, Any]:
        """What training says of the agent, by `FACTS`."""
        return {key: self.provenance[key] for key in FACTS}


def save(path: str | Path, agent: AgentFile) -> None:
    """Write a file, whole or not at all; the same agent gives the same bytes.

    Raises `CheckpointError` for weights that are not finite.
    """
    bad = [name for name, tensor in agent.tensors.items() if not tensor.isfinite().all()]
    if bad:
        raise CheckpointError(f"{len(bad)} tensors are not finite, the first is {bad[0]}")
    metadata = {
        "format": FORMAT,
        "format_version": str(VERSION),
        "agent": _json(agent.about),
        "provenance": _json(agent.provenance),
        "config": _json(agent.config.to_dict()),
    }
    write_atomically(Path(path), packed(agent.tensors, metadata))


def load(path: str | Path) -> AgentFile:
    """What a file holds; `CheckpointError` for anything but a whole one of this version."""
    path = Path(path)
    try:
        if path.stat().st_size > _LARGEST:
            raise CheckpointError(f"{path} is larger than any agent")
        data = path.read_bytes()
        tensors = safetensors.torch.load(data)
        (length,) = struct.unpack("<Q", data[:8])
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    except (OSError, ValueError, RecursionError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {one_line(error)}") from error
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path} is no agent's file: its format is not {FORMAT}")
    if metadata.get("format_version") != str(VERSION):
        raise CheckpointError(
            f"{path} has format version {metadata.get('format_version')}, this program reads "
            f"{VERSION}: use the iqmpc that wrote it, or a newer one"
        )
    digest = metadata.get("digest", "")
    if len(digest) != 64 or _digest(data, digest) != digest:
        raise CheckpointError(f"{path} is damaged: its content does not match its digest")
    try:
        about, provenance, config = (
            json.loads(metadata[key]) for key in ("agent", "provenance", "config")
        )
        found = AgentFile(Config.restored(config), tensors, about, provenance)
        _ = found.interface, found.observation, found.termination, found.facts  # refused here
        return found
    except (KeyError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{path} does not describe its agent: {one_line(error)}") from error


def packaged_tasks() -> list[str]:
    """Names of the tasks for which a trained agent ships with the package."""
    return sorted(path.stem for path in _SHIPPED.glob("*.iqmpc"))


def is_packaged(run: str | Path) -> bool:
    """Whether this is `packaged:TASK`, and no path."""
    return str(run).startswith(PACKAGED)


def located(run: str | Path) -> Path | None:
    """The file that `run` names, by its path or as `packaged:TASK`; None where it names none.

    Raises `CheckpointError` for a task for which no agent ships.
    """
    if not is_packaged(run):
        return Path(run) if Path(run).is_file() else None
    task = str(run).removeprefix(PACKAGED)
    if task not in packaged_tasks():
        raise CheckpointError(
            f"no agent ships for {shortened(task)}; they do for {', '.join(packaged_tasks())}"
        )
    return _SHIPPED / f"{task}.iqmpc"


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, allow_nan=False)


def packed(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A file's bytes, with its digest among the metadata."""
    empty = "0" * 64
    header: dict[str, Any] = {"__metadata__": {"digest": empty, **metadata}}
    parts, at = [], 0
    for name in sorted(tensors):
        values = np.ascontiguousarray(tensors[name].numpy(), dtype="<f4").tobytes()
        header[name] = {
            "dtype": "F32",
            "shape": list(tensors[name].shape),
            "data_offsets": [at, at + len(values)],
        }
        parts.append(values)
        at += len(values)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    data = struct.pack("<Q", len(text)) + text + b"".join(parts)
    return data.replace(empty.encode(), _digest(data, empty).encode(), 1)


def _digest(data: bytes, digest: str) -> str:
    """SHA-256 of `data` with zeros where `digest` first stands."""
    return hashlib.sha256(data.replace(digest.encode(), b"0" * len(digest), 1)).hexdigest()
