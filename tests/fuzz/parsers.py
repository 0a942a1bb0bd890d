"""Every reader of files and words that the program has, as it is reached from outside."""

from __future__ import annotations

import functools
import json
import random
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import safetensors.torch

import iqmpc
from iqmpc import agent_file, checkpoint, plot, runlog, table
from iqmpc.demonstrators import npg, sb3
from iqmpc.demos import Facts, formats
from iqmpc.errors import IqmpcError, TaskError
from iqmpc.export import export
from iqmpc.run_folder import RunFolder
from iqmpc.task_interface import TaskInterface
from tests.fuzz import samples
from tests.fuzz.damage import (
    Files,
    Reshape,
    bytes_changed,
    json_changed,
    npy_changed,
    text_changed,
    tree_changed,
    zip_changed,
)
from tests.fuzz.hdf5_damage import contents_changed


@dataclass(frozen=True)
class Parser:
    """A reader: sound files for it, how it is called, and how its files are damaged in kind.

    `load(path)` is given the first of the files (or `entry`), and must return or raise `errors`.
    `reshape` damages the contents of a file by its suffix, so that its container stays sound.
    `isolated(path)` reads it as users do, in a process of its own that may crash or hang: then a
    reader that does so in ours is caught there.
    """

    name: str
    samples: Callable[[Path], list[Files]]
    load: Callable[[Path], object]
    errors: tuple[type[Exception], ...] = (IqmpcError,)
    reshape: dict[str, Reshape] = field(default_factory=dict)
    isolated: Callable[[Path], object] | None = None
    entry: str | None = None  # in place of the first file
    damaged: tuple[str, ...] = ("",)  # suffixes of the files that are damaged

    def damage(self, found: list[Files], rng: random.Random) -> Files:
        """One of the samples, with damage in one of its files and now and then in more."""
        files = dict(rng.choice(found))
        names = [name for name in files if name.endswith(self.damaged)]
        first = rng.choice(names)
        for name in names:
            if name != first and rng.random() < 0.9:
                continue
            others = [other[name] for other in found if name in other and other is not files]
            reshape = next((r for suffix, r in self.reshape.items() if name.endswith(suffix)), None)
            if rng.random() < 0.01:
                del files[name]
            elif reshape is not None and rng.random() < 0.6:
                try:
                    files[name] = reshape(files[name], rng)
                except Exception:  # what a library refuses to write
                    files[name] = bytes_changed(files[name], rng, others)
            else:
                files[name] = bytes_changed(files[name], rng, others)
        return files


_FACTS: tuple[dict[str, Any], ...] = (
    {},
    {},
    {"episodes": 1},
    {"clip_actions": True},
    {"action_low": (-2.0,), "action_high": (2.0,)},
    {"task": None},
)


def _facts(path: Path, name: str) -> Facts:
    """Some of the options, the same each time for the same file."""
    extra: tuple[dict[str, Any], ...] = {
        "d4rl": ({"episode_length": 3},),
        "robomimic": ({"mask": "train"}, {"obs_keys": ("object",)}),
        "lerobot": ({"allow_gaps": True}, {"obs_keys": ("observation.state",)}),
        "minari": ({"obs_keys": ("a",)},),
        "maniskill": ({"obs_keys": ("agent/qpos",)},),
    }.get(name, ())
    paths = path.rglob("*") if path.is_dir() else [path]
    number = sum(zlib.crc32(p.read_bytes()) for p in paths if p.is_file())
    given = (*_FACTS, *extra)[number % (len(_FACTS) + len(extra))]
    return Facts(**{"task": samples.TASK, **given})


def _demonstrations(name: str, path: Path) -> iqmpc.Demonstrations:
    format = formats.LEGACY if name == "legacy" else None
    draft = formats.read(path, format, _facts(path, name))
    return iqmpc.Demonstrations.from_draft(draft)


def _isolated(name: str, path: Path) -> iqmpc.Demonstrations:
    format = formats.LEGACY if name == "legacy" else None
    return iqmpc.Demonstrations.load(path, format=format, facts=_facts(path, name))


def _set(
    name: str, found: Callable[[Path], list[Files]], entry: str | None = None, **reshape: Reshape
) -> Parser:
    return Parser(
        name,
        found,
        functools.partial(_demonstrations, name),
        reshape={f".{suffix}": how for suffix, how in reshape.items()},
        isolated=functools.partial(_isolated, name),
        entry=entry,
    )


def _checkpoint_changed(data: bytes, rng: random.Random) -> bytes:
    """A checkpoint whose digest is right, with another description or other tensors."""
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])["__metadata__"]
    tensors = safetensors.torch.load(data)
    for _ in range(rng.choice((1, 1, 2))):
        kind = rng.randrange(8)
        name = rng.choice(list(tensors))
        if kind == 0:
            del tensors[name]
        elif kind == 1:
            tensors[name] = tensors[rng.choice(list(tensors))].clone()
        elif kind == 2:
            tensors[name] = tensors[name].reshape(-1)[: rng.randrange(4)].clone()
        elif kind == 3:
            tensors[name] = tensors[name].double() if rng.random() < 0.5 else tensors[name].int()
        elif kind == 4 and tensors[name].is_floating_point() and tensors[name].numel():
            tensors[name].view(-1)[0] = rng.choice((float("nan"), float("inf"), 1e30))
        elif kind == 5 and tensors[name].numel():
            tensors[name] = tensors[name].clone()
            tensors[name].view(-1)[0] = rng.choice((-1, 0, 1, 100, -128))
        else:
            header["meta"] = json_changed(header["meta"].encode(), rng).decode("utf-8", "replace")
    if rng.random() < 0.1:
        key = rng.choice(list(header))
        header[key] = str(tree_changed(header[key], rng)).encode("utf-8", "replace").decode()
    header["digest"] = checkpoint.digest(tensors, header.get("meta", ""))
    return safetensors.torch.save(tensors, header)


def _header_changed(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file with another header: offsets, shapes, dtypes."""
    size = struct.unpack("<Q", data[:8])[0]
    text = json_changed(data[8 : 8 + size], rng)
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


def _checkpoint_damaged(data: bytes, rng: random.Random) -> bytes:
    return (_checkpoint_changed if rng.random() < 0.7 else _header_changed)(data, rng)


def _agent(path: Path) -> object:
    run = path.parent.parent
    checkpoint.load(path)
    return iqmpc.Agent.load(run)


def _exported(folder: Path) -> list[Files]:
    """The agent of a run as one file."""
    for files in samples.run(folder):
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
    out = folder / "agent.iqmpc"
    names = tuple("abc"[: samples.OBS]), tuple("uv"[: samples.ACTIONS])
    ends = (-1.0,) * samples.ACTIONS, (1.0,) * samples.ACTIONS
    export(folder / "run", out, interface=TaskInterface(*names, *ends, 1, None))
    return [{"agent.iqmpc": out.read_bytes()}]


def _agent_file_changed(data: bytes, rng: random.Random) -> bytes:
    """An agent's file whose digest is right, with other things said of it or other tensors."""
    size = struct.unpack("<Q", data[:8])[0]
    metadata = json.loads(data[8 : 8 + size])["__metadata__"]
    tensors = safetensors.torch.load(data)
    del metadata["digest"]
    for _ in range(rng.choice((1, 1, 2))):
        name, kind = rng.choice(list(tensors)), rng.randrange(6)
        if kind == 0:
            del tensors[name]
        elif kind == 1:
            tensors[name] = tensors[name].reshape(-1)[: rng.randrange(4)].clone()
        elif kind == 2 and tensors[name].numel():
            tensors[name].view(-1)[0] = rng.choice((float("nan"), float("inf"), 1e30))
        else:
            key = rng.choice(("agent", "agent", "agent", "provenance", "config"))
            metadata[key] = json_changed(metadata[key].encode(), rng).decode("utf-8", "replace")
    return agent_file.packed(tensors, metadata)


def _from_file(path: Path) -> object:
    agent = iqmpc.Agent.load(path)
    return agent.act(np.zeros(samples.OBS, np.float32))


def _resumed(path: Path) -> object:
    config = RunFolder(path.parent.parent).load_config()
    return iqmpc.Trainer(
        config, samples.Point(), samples.demonstrations(), run=path.parent.parent, resume=True
    )


def _settings(path: Path) -> object:
    return RunFolder(path.parent).load_config()


def _metrics(path: Path) -> object:
    """As `resume`, `plot` and the summary read it."""
    folder = RunFolder(path.parent)
    runlog.last_evaluations(folder, before=48)
    plot.read_curve(path.parent)
    log = runlog.RunLog(folder, since=24, evaluated=24)
    log.close()
    return runlog.read_rows(path)


def _summary(path: Path) -> object:
    """As `table` and `plot` read it."""
    plot.read_curve(path.parent)
    with mock.patch.object(table, "_in_own_process", side_effect=TaskError("is not made here")):
        records = [table.record(path.parent, episodes=1)]
    return table.to_markdown(records), table.made_on(records)


def _records(folder: Path) -> list[Files]:
    record = {
        "task": "point", "agent": "planner", "seed": 0, "ablation": "", "preset": "cpu",
        "steps": 60, "minutes": 0.1, "episodes": 1, "return_mean": -3.0, "return_std": 0.5,
        "demonstrator_return": None, "ratio": None, "success_rate": 1.0, "last5_of": "success",
        "last5_mean": 1.0, "last5_min": 1.0, "correlation": 0.5, "machine": "m", "threads": 2,
        "commit": "c",
    }  # fmt: skip
    return [{"table.json": json.dumps([record, {**record, "seed": 1}]).encode()}]


def _table(path: Path) -> object:
    new = json.loads(_records(path)[0]["table.json"])
    table.merge_records(path, new)
    return table.read_records(path), table.to_markdown(new), table.made_on(new)


_WORDS = (
    "task=cheetah-run", "preset=cpu", "train.steps=40000", "learner.batch=128", "seed=3",
    "threads=2", "learner.lr=3e-4", "planner.samples=64", "task=gym", "env_id=HalfCheetah-v4",
    "demos.path=set.h5", "model=tiny", "learner=td", "train.overlap=sync", "task.terminates=false",
    "learner.discount=null", "train.updates_per_step=0.25", "task.obs_keys=qpos,agent/qvel",
    "run_dir=runs/x",
)  # fmt: skip


def _words(folder: Path) -> list[Files]:
    return [{"words": "\n".join(_WORDS[i : i + 3]).encode()} for i in range(0, len(_WORDS), 2)]


def _composed(path: Path) -> object:
    text = path.read_bytes().decode("utf-8", "surrogateescape")  # as Python takes its arguments
    return iqmpc.compose([word for word in text.split("\n") if "\x00" not in word])


def _sb3_member(data: bytes, rng: random.Random) -> bytes:
    if data.startswith(b"{"):
        return json_changed(data, rng)
    if data.startswith(b"PK"):
        return zip_changed(data, rng, _sb3_member)
    return bytes_changed(data, rng)


def _parquet_changed(data: bytes, rng: random.Random) -> bytes:
    """A sound Parquet file with other columns."""
    import io

    import pyarrow as pa
    import pyarrow.parquet as parquet

    found = parquet.read_table(io.BytesIO(data))
    columns = {name: found.column(name).to_pylist() for name in found.column_names}
    for _ in range(rng.choice((1, 1, 2, 3))):
        name = rng.choice(list(columns))
        rows = columns[name]
        kind = rng.randrange(6)
        if kind == 0 and len(columns) > 1:
            del columns[name]
        elif kind == 1 and rows:
            rows[rng.randrange(len(rows))] = None
        elif kind == 2 and rows:
            columns[name] = [str(row) for row in rows]
        elif kind == 3 and rows:
            columns[name] = [[1.0, 2.0]] * len(rows)
        elif kind == 4 and rows and isinstance(rows[0], (int, float)):
            rows[rng.randrange(len(rows))] = rng.choice((-1, 0, 3, 2**40, 10**6))
        elif rows and isinstance(rows[0], list):
            rows[rng.randrange(len(rows))] = rng.choice(([], [1.0] * 9, [float("nan")] * 3))
    length = rng.choice((None, None, 0, 1, 3))
    columns = {name: rows[:length] for name, rows in columns.items()}
    buffer = io.BytesIO()
    try:
        parquet.write_table(
            pa.table(columns), buffer, compression=rng.choice(("snappy", "gzip", "none"))
        )
    except (pa.ArrowException, ValueError, TypeError, OverflowError):
        return bytes_changed(data, rng)
    return buffer.getvalue()


_OPCODES = (
    b"cos\nsystem\n", b"cposix\nsystem\n(S'touch ../outside/ran'\ntR.", b"cbuiltins\neval\n",
    b"\x93", b"R", b"b", b"o", b"\x81", b"\x92", b"i__main__\nX\n", b"P1\n", b"Q", b"\x82\x01",
    b"2", b"0", b"1", b"(", b"t", b"l", b"d", b"s", b"u", b"e", b"a", b"h\x00", b"q\xff",
    b"r\xff\xff\xff\x7f", b"j\xff\xff\xff\x7f", b"B\xff\xff\xff\x7f", b"\x8e" + b"\xff" * 8,
    b"\x95" + b"\xff" * 8,
    b"L" + b"9" * 6000 + b"L\n", b"\x8b\xff\xff\xff\x7f", b"cnumpy\ndtype\n", b"cnumpy\nndarray\n",
    b"cnumpy.core.multiarray\n_reconstruct\n", b"cnumpy.core.multiarray\nscalar\n",
    b"ccollections\nOrderedDict\n", b"c_codecs\nencode\n", b"ccollections\ndefaultdict\n", b".",
    b"\x94", b"}", b"]", b")", b"\x85", b"\x86", b"\x87", b"N", b"\x88", b"K\x05",
    b"J\xff\xff\xff\xff", b"G" + b"\x7f\xf0" + b"\0" * 6, b"U\x03abc", b"C\x03abc",
    b"X\x03\0\0\0abc",
)  # fmt: skip


def _pickle_changed(data: bytes, rng: random.Random) -> bytes:
    """Instructions of the pickle machine put between those that are there."""
    import pickletools

    try:
        places = [at for _, _, at in pickletools.genops(data)]
    except Exception:
        places = list(range(len(data)))
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.choice(places)
        keep = at if rng.random() < 0.6 else min(len(data), at + rng.randrange(1, 9))
        data = data[:at] + rng.choice(_OPCODES) + data[keep:]
    return data


PARSERS = {
    parser.name: parser
    for parser in (
        _set("hdf5", samples.own, h5=contents_changed),
        _set("npz", samples.npz, npz=lambda data, rng: zip_changed(data, rng, npy_changed)),
        _set("d4rl", samples.d4rl, hdf5=contents_changed),
        _set("robomimic", samples.robomimic, hdf5=contents_changed),
        _set("maniskill", samples.maniskill, h5=contents_changed, json=json_changed),
        _set("minari", samples.minari, "set", hdf5=contents_changed, json=json_changed),
        _set(
            "lerobot",
            samples.lerobot,
            "set",
            parquet=_parquet_changed,
            json=json_changed,
            jsonl=text_changed,
        ),
        _set("legacy", samples.legacy, pkl=_pickle_changed),
        Parser(
            "sb3",
            samples.sb3,
            lambda path: sb3.Sb3Policy(path, samples.OBS, samples.ACTIONS),
            reshape={".zip": lambda data, rng: zip_changed(data, rng, _sb3_member)},
        ),
        Parser("npg", samples.npg, npg.load, reshape={".pickle": _pickle_changed}),
        Parser(
            "checkpoint",
            samples.run,
            checkpoint.load,
            reshape={".safetensors": _header_changed},
            damaged=(".safetensors",),
        ),
        Parser(
            "agent",
            samples.run,
            _agent,
            reshape={".safetensors": _checkpoint_damaged, ".yaml": text_changed},
            damaged=(".safetensors", ".yaml"),
        ),
        Parser("agent file", _exported, _from_file, reshape={".iqmpc": _agent_file_changed}),
        Parser(
            "resume",
            samples.run,
            _resumed,
            reshape={
                ".safetensors": _checkpoint_changed,
                ".yaml": text_changed,
                ".csv": text_changed,
            },
            damaged=(".safetensors", ".yaml", ".csv"),
        ),
        Parser(
            "config",
            samples.run,
            _settings,
            reshape={".yaml": text_changed},
            entry="run/config.yaml",
            damaged=(".yaml",),
        ),
        Parser(
            "metrics",
            samples.run,
            _metrics,
            reshape={".csv": text_changed},
            entry="run/metrics.csv",
            damaged=(".csv",),
        ),
        Parser(
            "summary",
            samples.run,
            _summary,
            reshape={".json": json_changed},
            entry="run/summary.json",
            damaged=(".json",),
        ),
        Parser("table", _records, _table, reshape={".json": json_changed}),
        Parser("overrides", _words, _composed, reshape={"words": text_changed}),
    )
}
