"""Hostile and damaged files cost their own reader, within limits, and nothing else."""

import os
import pickle
import signal
import subprocess
import sys
import time
import zipfile

import h5py
import numpy as np
import pytest

from iqmpc.demos import DemonstrationError, Demonstrations, Facts, formats
from iqmpc.demos.formats import budget, isolated

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def path(tmp_path, demos):
    demos.save(tmp_path / "set.h5")
    return tmp_path / "set.h5"


def test_it_reads_the_same(write_format, tmp_path, demos, assert_same):
    for name in formats.FORMATS:
        (tmp_path / name).mkdir()
        path = write_format(name, tmp_path / name, demos)
        here = formats.read(path, facts=Facts(task=demos.task))
        apart = isolated.read(path, facts=Facts(task=demos.task))
        assert_same(*(Demonstrations.from_draft(draft) for draft in (here, apart)))
        apart.episodes[0]["actions"][0] = 0  # no read-only views


def test_one_process_serves_and_is_replaced_when_it_was_killed(path):
    Demonstrations.load(path)
    first = isolated._held[1].pid
    Demonstrations.load(path)
    assert isolated._held[1].pid == first != os.getpid()
    os.kill(first, signal.SIGKILL)
    time.sleep(0.2)
    Demonstrations.load(path)
    assert isolated._held[1].pid != first


def test_relative_paths_and_refusals(path, monkeypatch):
    monkeypatch.chdir(path.parent)
    assert len(Demonstrations.load("set.h5")) == 3
    with pytest.raises(DemonstrationError, match="^none.h5: cannot be read: No such file"):
        Demonstrations.load("none.h5")


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        ("os.kill(os.getpid(), 11)", r"damage that ended its reader \(SIGSEGV\)"),
        ("os._exit(3)", r"damage that ended its reader \(exit code 3\)"),
        ("time.sleep(99)", "no end of reading after 1 s"),
        ("bytearray(10**12)", "more data than its bytes can hold"),
        ("1 + None", r"damage that its reader did not expect \(TypeError: unsupported operand"),
    ],
)
def test_a_reader_that_crashes_hangs_or_eats(path, monkeypatch, ends, said):
    """As the HDF5 library does with some damaged files; the next file is read again."""
    isolated._end()
    monkeypatch.setattr(isolated, "_START_S", 0 if "sleep" in ends else 60)
    monkeypatch.setattr(isolated, "_GRACE_S", 0 if "sleep" in ends else 60)
    monkeypatch.setattr(budget, "_FREE_S", 1.0 if "sleep" in ends else 60)
    code = f"import os, time\nfrom iqmpc.demos import formats\nformats._read = lambda *_: {ends}\n"
    popen = subprocess.Popen

    def faulty(words, **how):
        return popen([*words[:2], code + words[2]], **how)

    monkeypatch.setattr(subprocess, "Popen", faulty)
    with pytest.raises(DemonstrationError, match=f"set.h5: found {said}"):
        Demonstrations.load(path)
    monkeypatch.undo()
    isolated._end()
    assert len(Demonstrations.load(path)) == 3


def test_a_text_attribute_that_keeps_hdf5_in_a_loop(write_format, tmp_path, demos, monkeypatch):
    """Every byte of the heap in which texts of variable length lie, damaged in turn."""
    path = write_format("robomimic", tmp_path, demos)
    data = path.read_bytes()
    heap = data.index(b"GCOL")
    monkeypatch.setattr(budget, "_FREE_S", 2.0)
    monkeypatch.setattr(isolated, "_GRACE_S", 1.0)
    monkeypatch.setattr(isolated, "_START_S", 2.0)
    for place in range(heap + 8, heap + 32, 8):
        damaged = bytearray(data)
        damaged[place] ^= 0xFF
        path.write_bytes(damaged)
        try:
            Demonstrations.load(path)
        except DemonstrationError:
            pass


def test_a_script_needs_no_guard(tmp_path, path):
    """The process is none of multiprocessing, which would import the script again."""
    script = tmp_path / "script.py"
    script.write_text(f"import iqmpc\nprint(len(iqmpc.Demonstrations.load({str(path)!r})))\n")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert done.stdout == "3\n" and not done.stderr


def links(path):
    """17 KB: ten thousand episodes of the same data, which is claimed and not stored."""
    with h5py.File(path, "w") as file:
        file.attrs.update(format="iqmpc-demonstrations", version=1, task="t")
        group = file.create_group("episodes/000000")
        group.attrs["terminated"] = False
        group.create_dataset("observations", (60001, 50), "f4", chunks=(60001, 50))
        group.create_dataset("actions", (60000, 2), "f4", chunks=(60000, 2))
        for i in range(1, 200):
            file[f"episodes/{i:06d}"] = group


def flat(path):
    with h5py.File(path, "w") as file:
        for key, shape in (
            ("observations", (3000000, 1)),
            ("actions", (3000000, 1)),
            ("terminals", (3000000,)),
        ):
            file.create_dataset(
                key, data=np.ones(shape, "i1"), chunks=(100000, *shape[1:]), compression="gzip"
            )
        file["timeouts"] = file["terminals"]


def archive(path):
    steps = 90_000_000
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for key, array in (
            ("task", np.array("t")),
            ("episode_lengths", np.array([steps])),
            ("terminated", np.array([False])),
            ("actions", np.zeros((steps, 1), np.float32)),
        ):
            with file.open(f"{key}.npy", "w") as member:
                np.lib.format.write_array(member, array)


def table(path):
    pa = pytest.importorskip("pyarrow")
    import json

    import pyarrow.parquet as parquet

    (path / "meta").mkdir(parents=True)
    (path / "data/chunk-000").mkdir(parents=True)
    feature = {"dtype": "float32", "shape": [1]}
    (path / "meta/info.json").write_text(
        json.dumps(
            {
                "codebase_version": "v2.1",
                "total_episodes": 1,
                "features": {"observation.state": feature, "action": feature},
            }
        )
    )
    rows, width = 4_000_000, 8
    column = pa.FixedSizeListArray.from_arrays(np.zeros(rows * width, np.float32), width)
    parquet.write_table(
        pa.table(
            {
                "observation.state": column,
                "action": column,
                "episode_index": np.zeros(rows, np.int64),
            }
        ),
        path / "data/chunk-000/episode_000000.parquet",
    )


def old(path):
    """Not an array in it, but a list that is referred to again and again."""
    rows = [[0.0] * 1000] * 400
    path.write_bytes(pickle.dumps([{"states": rows, "actions": rows} for _ in range(30)]))


@pytest.mark.parametrize(
    ("make", "name", "format"),
    [
        (links, "a.h5", None),
        (flat, "a.h5", None),
        (archive, "a.npz", None),
        (table, "a", None),
        (old, "a.pkl", formats.LEGACY),
    ],
)
def test_small_files_that_ask_for_much_are_refused_soon(tmp_path, make, name, format):
    path = tmp_path / name
    make(path)
    started = time.monotonic()
    with pytest.raises(DemonstrationError) as caught:
        Demonstrations.load(path, task="t", format=format)
    assert time.monotonic() - started < 30
    assert "bytes of data in" in str(caught.value) or "many times over" in str(caught.value)
    peak = int(
        next(
            line
            for line in open(f"/proc/{isolated._held[1].pid}/status")
            if line.startswith("VmHWM")
        ).split()[1]
    )
    assert peak < 700_000  # kB


def test_only_the_first_episodes_are_read(write_format, tmp_path, demos):
    for name in formats.FORMATS:
        (tmp_path / name).mkdir()
        path = write_format(name, tmp_path / name, demos)
        draft = formats.read(path, facts=Facts(task="t", episodes=2))
        assert len(draft.episodes) == 2, name


def test_actions_that_a_simulator_clips(write_format, tmp_path, demos):
    from dataclasses import replace

    class Loose(Demonstrations):
        def __post_init__(self):
            pass

    episodes = [replace(e, actions=e.actions.copy()) for e in demos.episodes]
    episodes[0].actions[1] = 1.5, -4.0
    episodes[2].actions[3, 0] = -1.001
    for name in ("maniskill", "robomimic"):
        (tmp_path / name).mkdir()
        path = write_format(name, tmp_path / name, Loose(demos.task, episodes, {}))
        with pytest.raises(DemonstrationError, match="--clip-actions where the simulator clipped"):
            Demonstrations.load(path)
        found = Demonstrations.load(path, facts=Facts(clip_actions=True))
        assert found.episodes[0].actions[1].tolist() == [1, -1]
        np.testing.assert_array_equal(found.episodes[1].actions, demos.episodes[1].actions)
        assert found.provenance["actions_clipped"] == "3 values to [-1, 1], in 2 steps"
