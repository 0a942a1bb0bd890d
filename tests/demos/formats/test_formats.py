"""What holds for every format: known by its content, sound or named defects, facts and ranges."""

import json
import re
import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iqmpc.demos import DemonstrationError, Demonstrations, Facts
from iqmpc.demos.checks import find_defects
from iqmpc.demos.formats import FORMATS, detect, in_range, read
from iqmpc.demos.types import Defect, Draft

FOREIGN = ["minari", "d4rl", "robomimic", "maniskill", "lerobot"]


@pytest.fixture
def write(tmp_path, demos, write_format):
    """Writes the set in a format; its path."""

    def writer(name, demos=demos):
        return write_format(name, tmp_path, demos)

    return writer


def data_file(path: Path) -> Path:
    """The file that holds the arrays."""
    return (
        path
        if path.is_file()
        else next(
            p for p in sorted(path.rglob("*")) if p.is_file() and p.suffix in (".hdf5", ".parquet")
        )
    )


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_known_by_its_content(write, tmp_path, name):
    path = write(name)
    assert detect(path) == name
    other = tmp_path / "renamed.bin"
    if path.is_file():
        shutil.copy(path, other)
        assert detect(other) == name


@pytest.mark.parametrize("name", ["minari", "d4rl"])
def test_what_is_read_is_what_was_written(write, demos, assert_same, name):
    found = Demonstrations.load(write(name), task=demos.task)
    expected = replace(demos, provenance=found.provenance)
    assert_same(expected, found)
    assert found.provenance["source_format"] == name


@pytest.mark.parametrize("name", FOREIGN)
def test_a_set_is_read_for_its_task_and_no_other(write, demos, name):
    path = write(name)
    assert Demonstrations.load(path, task=demos.task).task == demos.task
    told = name in ("minari", "robomimic", "maniskill")  # the file names its task
    if told:
        with pytest.raises(DemonstrationError, match="found 'walker-walk', expected 'x'"):
            Demonstrations.load(path, task="x")
        assert Demonstrations.load(path).task == demos.task
    else:
        with pytest.raises(DemonstrationError, match="task: found nothing, expected the task's"):
            Demonstrations.load(path)


@pytest.mark.parametrize("name", FORMATS)
def test_actions_outside_are_a_defect_that_names_the_options(tmp_path, write, demos, name):
    path = write(name, scaled(demos))
    facts = Facts(task=demos.task)
    defects = [str(d) for d in find_defects(read(path, None, facts))]
    if name != "minari":  # whose own action space is used
        assert len(defects) == 3
        for defect in defects:
            assert "expected values in [-1, 1]; --clip-actions where the simulator" in defect
            assert "--action-low and --action-high rescale from another range" in defect
    told = Facts(task=demos.task, action_low=(-4.0,), action_high=(4.0, 4.0))
    found = Demonstrations.load(path, facts=told)
    for one, other in zip(demos.episodes, found.episodes, strict=True):
        steps = len(other.actions)
        np.testing.assert_allclose(other.actions, one.actions[:steps], atol=1e-6)
    assert found.provenance["actions_rescaled_from"] == "[-4] to [4]"


class Loose(Demonstrations):
    """A set whose actions are not in [-1, 1], to be written."""

    def __post_init__(self):
        pass


def scaled(demos):
    episodes = tuple(replace(e, actions=4 * e.actions) for e in demos.episodes)
    return Loose(demos.task, episodes, {})


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_rescaling_keeps_bounds_and_order(data):
    """Whatever the range: its ends become -1 and 1, and everything between stays between."""
    low = data.draw(st.floats(-1e3, 1e3, allow_nan=False))
    high = low + data.draw(st.floats(0.01, 100))
    parts = sorted(data.draw(st.lists(st.floats(0, 1), min_size=1, max_size=6)))
    bounds = np.float32([low, high])
    between = (bounds[0] + np.float32(parts) * (bounds[1] - bounds[0])).clip(*bounds)
    actions = np.concatenate([bounds, between]).astype(np.float32)[:, None]
    draft = Draft("f", "t", [{"actions": actions}], {})
    found = in_range(draft, Facts(action_low=(low,), action_high=(high,)))
    (scaled,) = (episode["actions"][:, 0] for episode in found.episodes)
    assert scaled.dtype == np.float32 and scaled[0] == -1 and scaled[1] == 1
    assert (np.diff(scaled[2:]) >= 0).all() and np.abs(scaled).max() <= 1


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (Facts(action_low=(-1.0,)), "--action-low and --action-high must be given together"),
        (Facts(action_low=(1.0,), action_high=(1.0,)), r"action range \[1\] to \[1\] is empty"),
        (Facts(action_low=(0.0,), action_high=(float("inf"),)), "is no range of actions"),
        (Facts(action_low=(0.0,) * 2, action_high=(1.0,) * 3), "is no range of actions"),
        (Facts(action_low=(0.0,) * 3, action_high=(1.0,) * 3), r"expected \[T, 3\], as the range"),
        (Facts(mask="train"), "--mask means nothing in the format d4rl"),
        (Facts(obs_keys=("a",)), "--obs-keys means nothing in the format d4rl"),
    ],
)
def test_facts_that_do_not_fit(write, facts, message):
    with pytest.raises(DemonstrationError, match=message):
        Demonstrations.load(write("d4rl"), task="t", facts=facts)


def test_a_format_can_be_forced(write, tmp_path):
    with pytest.raises(DemonstrationError, match="unknown format 'csv'; readable: hdf5, npz, "):
        Demonstrations.load(write("npz"), format="csv")
    with pytest.raises(DemonstrationError, match="no HDF5 signature, expected an HDF5 file"):
        Demonstrations.load(tmp_path / "set.npz", format="robomimic")
    with pytest.raises(DemonstrationError, match="data: found nothing, expected a group of demon"):
        Demonstrations.load(write("maniskill"), format="robomimic")
    with pytest.raises(DemonstrationError, match="a folder, and format d4rl is a file"):
        Demonstrations.load(tmp_path, format="d4rl")
    with pytest.raises(DemonstrationError, match="a file, and format lerobot is a folder"):
        Demonstrations.load(tmp_path / "set.npz", format="lerobot")


@pytest.mark.parametrize("name", ["d4rl", "robomimic", "maniskill", "minari", "lerobot"])
def test_a_truncated_file_is_a_defect_by_name(write, name):
    path = write(name)
    file = data_file(path)
    content = file.read_bytes()
    for part in (0.0, 0.3, 0.9):
        file.write_bytes(content[: int(len(content) * part)])
        found = list(find_defects(read(path, name, Facts(task="walker-walk"))))
        assert found and all(isinstance(defect, Defect) for defect in found)


@pytest.mark.parametrize("name", FOREIGN)
def test_wrong_bytes_never_end_in_a_traceback(write, name):
    """They give a set or defects by name: these formats have no checksums to tell."""
    path = write(name)
    file = data_file(path)
    content = file.read_bytes()
    refused = 0
    for offset in np.random.default_rng(0).integers(len(content), size=60):
        spoilt = bytearray(content)
        spoilt[offset] ^= 0xFF
        file.write_bytes(spoilt)
        try:
            refused += bool(list(find_defects(read(path, name, Facts(task="walker-walk")))))
        except DemonstrationError:
            refused += 1
    assert refused > 5


@pytest.mark.parametrize("name", FOREIGN)
def test_every_defect_is_listed(write, demos, name):
    """NaN in one episode, an action beyond the range in another: both, by episode and place."""
    first, second, third = demos.episodes
    observations, actions = first.observations.copy(), third.actions.copy()
    observations[1, 2], actions[2, 1] = np.nan, 7
    spoilt = (replace(first, observations=observations), second, replace(third, actions=actions))
    path = write(name, Loose(demos.task, spoilt, {}))
    found = [str(d) for d in find_defects(read(path, name, Facts(task=demos.task)), task="x")]
    assert [
        f.removeprefix(str(path)).split(", expected")[0] for f in found if "next_o" not in f
    ] == [
        ", task: found 'walker-walk'",
        ", episode 0, observations: found nan at [1, 2]",
        ", episode 2, actions: found 7.0 at [2, 1]",
    ]


@pytest.mark.parametrize("name", ["d4rl", "robomimic", "maniskill", "minari"])
def test_a_claim_of_more_data_than_bytes(write, name):
    path = write(name)
    file = data_file(path)
    with h5py.File(file, "a") as content:
        place = {
            "d4rl": "/",
            "robomimic": "data/demo_0",
            "maniskill": "traj_0",
            "minari": "episode_0",
        }[name]
        group = content[place]
        rows = len(group["actions"])
        del group["actions"]
        group.create_dataset("actions", (rows, 2**40), "f4", chunks=(1, 2**20))
    found = [str(d) for d in find_defects(read(path, name, Facts(task="walker-walk")))]
    assert any("bytes of data claimed and 0 stored, expected an intact dataset" in f for f in found)


@pytest.mark.parametrize("name", ["d4rl", "robomimic", "maniskill", "minari"])
def test_links_are_refused_in_every_layout(write, name):
    file = data_file(path := write(name))
    with h5py.File(file.with_name("other.h5"), "w") as other:
        other["secret"] = np.zeros((4, 2), np.float32)
    with h5py.File(file, "a") as content:
        place = {
            "d4rl": "/",
            "robomimic": "data/demo_0",
            "maniskill": "traj_0",
            "minari": "episode_0",
        }[name]
        del content[place]["actions"]
        content[place]["actions"] = h5py.ExternalLink("other.h5", "secret")
    found = [str(d) for d in find_defects(read(path, name, Facts(task="walker-walk")))]
    assert any("actions: found a ExternalLink" in f for f in found)


def test_a_group_linked_into_itself_ends(write):
    path = write("robomimic")
    with h5py.File(path, "a") as file:
        obs = file["data/demo_1/obs"]
        obs["again"] = obs
    found = [str(d) for d in find_defects(read(path))]
    assert len(found) == 1 and "episode 1" in found[0] and "found groups without end" in found[0]


def test_a_flat_file_is_read_in_blocks_of_whole_chunks(write, monkeypatch, demos):
    """No array is read whole, but for the marks of the episodes' ends; no chunk more than twice."""
    from iqmpc.demos.formats import safe_hdf5

    seen = []
    values = safe_hdf5.values

    def spy(dataset, at, rows=()):
        seen.append((dataset.name, rows))
        return values(dataset, at, rows)

    path = write("d4rl")
    with h5py.File(path, "a") as file:
        for key in ("observations", "actions"):
            whole = file[key][()]
            del file[key]
            file.create_dataset(key, data=whole, chunks=(2, whole.shape[1]), compression="gzip")
    monkeypatch.setattr(safe_hdf5, "values", spy)
    monkeypatch.setattr(safe_hdf5, "_BLOCK_BYTES", 4 * 5)  # a row or two
    read(path, facts=Facts(task="t"))
    assert {name for name, rows in seen if rows == ()} == {"/terminals", "/timeouts"}
    parts = [rows for name, rows in seen if name == "/observations"]
    assert parts == [slice(0, 4), slice(4, 10), slice(8, 16)]
    seen.clear()
    read(path, facts=Facts(task="t", episodes=2))
    assert [rows for name, rows in seen if name == "/observations"] == parts[:2]


@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_is_not_in_memory_twice(tmp_path, write_format, make_episode, name):
    """Reading takes the set's own float32 arrays and little more, though files keep float64."""
    episodes = tuple(make_episode(500, obs_dim=100, seed=i) for i in range(40))
    path = write_format(name, tmp_path, Demonstrations("t", episodes, {}))
    size = sum(e.observations.nbytes for e in episodes)
    assert size > 2**22
    del episodes
    facts = Facts(task="t")
    read(path, facts=facts)  # what is imported on the way
    tracemalloc.start()
    try:
        found = Demonstrations.from_draft(read(path, facts=facts))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(found) == 40 and peak < 1.5 * size


def test_a_gym_task_may_be_named_by_its_env_id(tmp_path, make_episode):
    path = tmp_path / "set.h5"
    Demonstrations("HalfCheetah-v4", (make_episode(),)).save(path)
    found = Demonstrations.load(path, task="gym-halfcheetah-v4")
    assert found.task == "HalfCheetah-v4"
    for other in ("gym-hopper-v4", "halfcheetah-v4", "walker-walk"):
        message = f"found 'HalfCheetah-v4', expected '{other}'"
        with pytest.raises(DemonstrationError, match=re.escape(message)):
            Demonstrations.load(path, task=other)


def test_a_zip_of_torch_is_a_pickle(tmp_path):
    import torch

    torch.save({"a": torch.zeros(2)}, tmp_path / "set.bin")
    with pytest.raises(DemonstrationError, match="pickled files are refused"):
        Demonstrations.load(tmp_path / "set.bin")


def test_descriptions_that_are_no_json(write):
    path = write("maniskill")
    description = path.with_suffix(".json")
    for text in ("{", "[]", '{"env_info": 3}', "[" * 100_000):
        description.write_text(text)
        (defect,) = find_defects(read(path))
        assert str(defect).startswith(f"{description}: found no readable description (")
    description.write_text(json.dumps({"env_info": {"env_id": 7}}))
    (defect,) = find_defects(read(path))
    assert str(defect).endswith("task: found 7, expected the task's name")


def test_actions_of_text_are_a_defect_where_they_would_be_rescaled(tmp_path, demos):
    """Own files may hold any dtype; a range that is given is no reason to compute with it."""
    path = tmp_path / "set.h5"
    demos.save(path)
    with h5py.File(path, "r+") as file:
        del file["episodes/000000/actions"]
        file["episodes/000000/actions"] = np.array([b"ab"] * 4)
    for facts in (Facts(action_low=(-2.0,), action_high=(2.0,)), Facts(clip_actions=True)):
        found = [str(defect) for defect in find_defects(read(path, None, facts))]
        assert any("actions: found dtype |S2, expected float32" in defect for defect in found)
