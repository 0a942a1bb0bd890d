"""LeRobot datasets, written by hand from its documentation: LeRobot wants a newer NumPy."""

import json
import sys

import numpy as np
import pytest

from iqmpc.demos import DemonstrationError, Demonstrations, Facts
from iqmpc.demos.checks import find_defects
from iqmpc.demos.formats import read

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


@pytest.fixture(params=["v2.0", "v2.1", "v3.0"])
def path(request, tmp_path, demos, write_format):
    return write_format("lerobot", tmp_path, demos, request.param)


def messages(path, **facts):
    found = find_defects(read(path, None, Facts(task="t", **facts)))
    return [str(defect).removeprefix(str(path)) for defect in found]


def edit(path, change):
    """Rewrite every Parquet file of data/ through a function of its table."""
    for file in sorted(path.glob("data/*/*.parquet")):
        parquet.write_table(change(parquet.read_table(file)), file)


def column(table, name, values):
    return table.set_column(table.column_names.index(name), name, values)


def test_the_last_action_of_each_episode_goes(path, demos):
    found = Demonstrations.load(path, task="push")
    for one, other in zip(demos.episodes, found.episodes, strict=True):
        np.testing.assert_array_equal(other.observations, one.observations[:-1])
        np.testing.assert_array_equal(other.actions, one.actions[:-1])
        np.testing.assert_array_equal(other.rewards, one.rewards[:-1])
        assert other.terminated is False and other.success is None
    assert found.task == "push"
    assert found.provenance["described_as"] == "push the block"
    assert found.provenance["dropped_steps"].startswith("3, the last of each episode")


def test_the_task_is_asked_for(path):
    with pytest.raises(DemonstrationError, match="task: found nothing, expected the task's name"):
        Demonstrations.load(path)


def test_episodes_over_several_files_and_batches(tmp_path, make_episode, write_format):
    episodes = tuple(make_episode(3000, seed=i) for i in range(3))
    demos = Demonstrations("t", episodes)
    path = write_format("lerobot", tmp_path, demos, "v3.0")
    file = path / "data/chunk-000/file-000.parquet"
    table = parquet.read_table(file)
    parquet.write_table(table[:4500], file, row_group_size=700)
    parquet.write_table(table[4500:], file.with_name("file-001.parquet"))
    found = Demonstrations.load(path, task="t")
    for one, other in zip(episodes, found.episodes, strict=True):
        np.testing.assert_array_equal(other.observations, one.observations[:-1])
        np.testing.assert_array_equal(other.actions, one.actions[:-1])


def test_columns_are_taken_in_sorted_order_or_as_chosen(path, demos):
    info = json.loads((path / "meta/info.json").read_text())
    info["features"]["observation.environment_state"] = {"dtype": "float32", "shape": [1]}
    info["features"]["next.success"] = {"dtype": "bool", "shape": [1]}
    (path / "meta/info.json").write_text(json.dumps(info))
    edit(
        path,
        lambda table: table.append_column(
            "observation.environment_state", pa.array(np.arange(len(table), dtype="f4"))
        ).append_column("next.success", table["next.done"]),
    )
    one = demos.episodes[0].observations[:-1]
    found = Demonstrations.load(path, task="t")
    np.testing.assert_array_equal(found.episodes[0].observations[:, 1:], one)
    np.testing.assert_array_equal(found.episodes[0].observations[:, 0], np.arange(4))
    assert found.success_rate == 1.0
    found = Demonstrations.load(path, task="t", facts=Facts(obs_keys=("observation.state",)))
    np.testing.assert_array_equal(found.episodes[0].observations, one)
    assert messages(path, obs_keys=("observation.images.top",)) == [
        ", features: found no observation.images.top of numbers, expected one of: "
        "observation.environment_state, observation.state"
    ]


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda t: t.drop_columns(["action"]), "without action"),
        (
            lambda t: column(t, "action", pa.array([None] * len(t), pa.list_(pa.float32()))),
            "empty values in",
        ),
        (
            lambda t: column(t, "action", pa.array([[0.0]] * (len(t) - 1) + [[0.0, 1.0]])),
            "rows of different lengths in",
        ),
        (lambda t: column(t, "action", pa.array(["a"] * len(t))), "string in"),
        (lambda t: column(t, "action", pa.array([[["a"]]] * len(t))), "in"),
    ],
)
def test_columns_that_cannot_be_used(path, change, found):
    edit(path, change)
    (defect,) = messages(path)
    assert defect.startswith(", data: found ") and found in defect


def test_frames_out_of_order(path):
    edit(path, lambda t: column(t, "frame_index", pa.array(np.arange(len(t)) + 1)))
    found = messages(path)
    assert len(found) == 3
    assert found[0].startswith(", episode 0, frame_index: found a gap or another order, expected 0")


def test_missing_and_repeated_episodes(path):
    info = json.loads((path / "meta/info.json").read_text())
    (path / "meta/info.json").write_text(json.dumps({**info, "total_episodes": 4}))
    assert messages(path) == [", data: found 3 episodes, expected 4, as total_episodes says"]
    edit(path, lambda t: column(t, "episode_index", pa.array(np.full(len(t), 2))))
    (defect,) = messages(path)
    assert defect.startswith(", episode_index: found 2, expected 0, without gaps")


@pytest.mark.parametrize(
    ("info", "defect"),
    [
        ("{", ", meta/info.json: found an unreadable file ("),
        ("[]", ", meta/info.json: found an unreadable file ("),
        ('{"codebase_version": "v1.6", "features": {}}', ", codebase_version: found 'v1.6'"),
        ('{"codebase_version": "v2.1", "features": {}}', ", features: found no numeric obs"),
    ],
)
def test_a_description_that_does_not_fit(path, info, defect):
    (path / "meta/info.json").write_text(info)
    (found,) = messages(path)
    assert found.startswith(defect)


def test_data_that_is_not_there(path):
    for file in path.glob("data/*/*"):
        file.write_text("version https://git-lfs.github.com/spec/v1\n")  # never fetched
    (found,) = messages(path)
    assert found.startswith(", data: found damage (")
    for file in path.glob("data/*/*"):
        file.unlink()
    assert messages(path)[0].startswith(", data: found no data/chunk-*/*.parquet, expected whole")


def test_without_pyarrow_the_extra_is_named(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DemonstrationError, match=r"need the extra 'lerobot': pip install 'iqmpc\["):
        read(path)


def test_missing_episodes_and_an_action_of_another_name(path, demos):
    file = path / "data/chunk-000/episode_000001.parquet"
    if not file.exists():
        pytest.skip("all episodes in one file")
    file.unlink()
    (found,) = messages(path)
    assert "--allow-gaps takes those there are" in found
    gaps = Demonstrations.load(path, task="t", facts=Facts(task="t", allow_gaps=True))
    assert len(gaps) == 2 and gaps.provenance["episodes_missing"] == "1 of 3"
    for file in path.glob("data/*/*"):
        table = parquet.read_table(file)
        names = ["action.joints" if name == "action" else name for name in table.column_names]
        parquet.write_table(table.rename_columns(names), file)
    info = path / "meta/info.json"
    info.write_text(info.read_text().replace('"action"', '"action.joints"'))
    (found,) = messages(path)
    assert "--action-key names another column (of numbers there are: action.joints)" in found
    facts = Facts(task="t", allow_gaps=True, action_key="action.joints")
    found = Demonstrations.load(path, facts=facts)
    assert len(found) == 2 and found.provenance["action_key"] == "action.joints"
    np.testing.assert_array_equal(found.episodes[1].actions, gaps.episodes[1].actions)
