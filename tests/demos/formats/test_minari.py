"""Minari datasets, written by Minari's own storage."""

import json

import h5py
import numpy as np
import pytest

from iqmpc.demos import Demonstrations, Facts
from iqmpc.demos.checks import find_defects
from iqmpc.demos.formats import detect, read


@pytest.fixture
def path(tmp_path, demos, write_format):
    return write_format("minari", tmp_path, demos)


def messages(path):
    return [str(defect).removeprefix(str(path)) for defect in find_defects(read(path))]


def edit(path, **changes):
    file = path / "data/metadata.json"
    metadata = {**json.loads(file.read_text()), **changes}
    metadata = {key: value for key, value in metadata.items() if value is not None}
    file.write_text(json.dumps(metadata))


def test_the_folder_its_data_and_its_file_are_the_same_set(path, demos, assert_same):
    found = Demonstrations.load(path)
    assert found.task == "walker-walk" and found.provenance["dataset"] == "task/expert-v0"
    for other in (path / "data", path / "data/main_data.hdf5"):
        assert detect(other) == "minari"
        again = Demonstrations.load(other)
        for one, two in zip(found.episodes, again.episodes, strict=True):
            np.testing.assert_array_equal(one.observations, two.observations)


def test_actions_are_rescaled_from_the_action_space(path, demos):
    """float32 bounds stay bounds, each dimension by its own."""
    low, high = np.float32([-0.4, 0.1]), np.float32([0.4, 0.7])
    with h5py.File(path / "data/main_data.hdf5", "a") as file:
        for i, e in enumerate(demos.episodes):
            actions = low + (e.actions + 1) / 2 * (high - low)
            actions[0] = high
            file[f"episode_{i}/actions"][...] = actions
    space = {
        "type": "Box",
        "dtype": "float32",
        "shape": [2],
        "low": low.tolist(),
        "high": high.tolist(),
    }
    edit(path, action_space=json.dumps(space))
    found = Demonstrations.load(path)
    for one, other in zip(demos.episodes, found.episodes, strict=True):
        np.testing.assert_array_equal(other.actions[0], [1, 1])
        np.testing.assert_allclose(other.actions[1:], one.actions[1:], atol=1e-6)
    assert found.provenance["actions_rescaled_from"] == "[-0.4, 0.1] to [0.4, 0.7]"
    told = Facts(action_low=(-2.0,), action_high=(2.0,))
    np.testing.assert_allclose(
        Demonstrations.load(path, facts=told).episodes[0].actions[0], high / 2, atol=1e-6
    )


def test_terminations_and_success(path):
    with h5py.File(path / "data/main_data.hdf5", "a") as file:
        for i in range(3):
            rows = len(file[f"episode_{i}/rewards"])
            file[f"episode_{i}/terminations"][-1] = i == 0
            del file[f"episode_{i}/infos"]
            file[f"episode_{i}/infos/success"] = np.arange(rows + 1) == (rows if i < 2 else 0)
    episodes = Demonstrations.load(path).episodes
    assert [e.terminated for e in episodes] == [True, False, False]
    assert [e.success for e in episodes] == [True, True, False]


def test_infos_that_are_no_truth_are_no_success(path):
    with h5py.File(path / "data/main_data.hdf5", "a") as file:
        for i in range(3):
            file[f"episode_{i}"].require_group("infos")["success"] = np.full(5, 0.3)
    assert Demonstrations.load(path).success_rate is None


def test_a_dictionary_of_observations(path, demos):
    with h5py.File(path / "data/main_data.hdf5", "a") as file:
        for i, e in enumerate(demos.episodes):
            del file[f"episode_{i}/observations"]
            file[f"episode_{i}/observations/b"] = e.observations[:, :1]
            file[f"episode_{i}/observations/a"] = e.observations[:, 1:]
    found = Demonstrations.load(path)
    np.testing.assert_array_equal(
        found.episodes[0].observations, demos.episodes[0].observations[:, [1, 2, 0]]
    )


def serialised(shape):
    """A space of nested dictionaries and tuples, as Minari writes it."""
    if isinstance(shape, dict):
        return {"type": "Dict", "subspaces": {k: serialised(v) for k, v in shape.items()}}
    if isinstance(shape, list):
        return {"type": "Tuple", "subspaces": [serialised(v) for v in shape]}
    return {"type": "Box", "dtype": "float32", "shape": [shape], "low": [-9.0], "high": [9.0]}


def test_a_datasets_own_observation_space_says_what_is_observed(path, demos):
    """Its members alone, sorted at each level; those of a tuple by their numbers."""
    with h5py.File(path / "data/main_data.hdf5", "a") as file:
        for i, e in enumerate(demos.episodes):
            rows = len(e.actions) + 1
            del file[f"episode_{i}/observations"]
            group = file.create_group(f"episode_{i}/observations")
            group["beside"] = np.full((rows, 1), 9.0)
            for key, value in (("v", 5), ("a/y", 4), ("a/x", 3)):
                group[key] = np.full((rows, 1), value)
            for index in range(11):
                group[f"t/_index_{index}"] = np.full((rows, 1), 10 + index)
    space = serialised({"v": 1, "t": [1] * 11, "a": {"y": 1, "x": 1}})
    edit(path, observation_space=json.dumps(space))
    found = Demonstrations.load(path).episodes[0].observations
    assert found[0].tolist() == [3, 4, *range(10, 21), 5]
    told = Facts(obs_keys=("beside", "v"))
    assert Demonstrations.load(path, facts=told).episodes[0].observations[0].tolist() == [9, 5]

    edit(path, observation_space=json.dumps(serialised({"v": 1, "w": 1})))
    assert messages(path)[0] == (
        ", episode 0, observations/w: found nothing, expected what observation_space names "
        "(observations has a, beside, t, v)"
    )


def test_metadata_of_before_in_the_files_attributes(path):
    metadata = json.loads((path / "data/metadata.json").read_text())
    (path / "data/metadata.json").unlink()
    with h5py.File(path / "data/main_data.hdf5", "a") as file:
        file.attrs["env_spec"] = metadata["env_spec"]
        file.attrs["action_space"] = metadata["action_space"]
        file.attrs["total_episodes"] = 3
    assert Demonstrations.load(path).task == "walker-walk"


@pytest.mark.parametrize(
    ("changes", "defect"),
    [
        ({"data_format": "arrow"}, ", data_format: found 'arrow', expected 'hdf5'"),
        ({"env_spec": None}, ", task: found nothing, expected the task's name"),
        ({"env_spec": "{"}, ", env_spec: found '{', expected a JSON object with the environment"),
        ({"total_episodes": 5}, ": found 3 episodes, expected 5, as total_episodes says"),
        ({"observation_space": "{"}, ", observation_space: found '{', expected a serialised space"),
        ({"observation_space": '{"type": "Dict"}'}, ", observation_space: found '{"),
        ({"observation_space": '{"type": "Dict", "subspaces": 3}'}, ", observation_space: found '"),
        ({"action_space": '{"type": "Discrete"}'}, ", action_space: found Discrete, expected a"),
        ({"action_space": "[" * 9999}, ", action_space: found '[[["),
        ({"action_space": '{"type": "Box", "low": ["a"], "high": 1}'}, ", action_space: found '{"),
    ],
)
def test_metadata_that_does_not_fit(path, changes, defect):
    edit(path, **changes)
    (found,) = messages(path)
    assert found.startswith(defect)


def test_all_that_is_wrong_with_metadata_is_listed(path):
    edit(
        path,
        action_space='{"type": "Box", "low": [0], "high": [0]}',
        total_episodes=5,
        env_spec=None,
    )
    found = messages(path)
    assert len(found) == 3 and found[0].startswith(", task: ")
    assert found[1].endswith("expected a Box with low < high")
    assert found[2].startswith(": found 3 episodes, expected 5")


def test_metadata_that_is_no_json(path):
    (path / "data/metadata.json").write_text("{")
    (found,) = messages(path)
    assert found.startswith(", metadata.json: found an unreadable file (")
    (path / "data/metadata.json").write_text("[1]")
    assert messages(path) == [", metadata.json: found [1], expected a JSON object"]


def test_a_dataset_without_its_file(path):
    (path / "data/main_data.hdf5").unlink()
    assert messages(path) == [", main_data.hdf5: found nothing, expected the dataset's episodes"]


def test_a_listed_member_that_is_not_there_is_a_defect(path, monkeypatch):
    """As a damaged file's listing has one."""
    from iqmpc.demos.formats import safe_hdf5

    numbered = safe_hdf5.numbered
    monkeypatch.setattr(
        safe_hdf5, "numbered", lambda group, prefix: [*numbered(group, prefix), "episode_77"]
    )
    found = [str(d) for d in find_defects(read(path))]
    assert any("episode_77: found nothing" in defect for defect in found)
