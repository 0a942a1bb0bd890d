"""robomimic's layout; the files are written by hand from its documentation (it has no wheel)."""

import h5py
import numpy as np
import pytest

from iqmpc.demos import DemonstrationError, Demonstrations, Facts
from iqmpc.demos.checks import find_defects
from iqmpc.demos.formats import read


@pytest.fixture
def path(tmp_path, demos, write_format):
    return write_format("robomimic", tmp_path, demos)


def messages(path, **facts):
    found = find_defects(read(path, "robomimic", Facts(**facts)))
    return [str(defect).removeprefix(str(path)) for defect in found]


def test_members_are_flattened_in_sorted_order(path, demos):
    found = Demonstrations.load(path)
    for one, other in zip(demos.episodes, found.episodes, strict=True):
        np.testing.assert_array_equal(other.observations, one.observations)
        np.testing.assert_array_equal(other.actions, one.actions)
        assert other.terminated is False and other.success is None
    assert found.task == "walker-walk" and "dropped_steps" not in found.provenance


def test_members_can_be_chosen(path, demos):
    found = Demonstrations.load(path, facts=Facts(obs_keys=("object",)))
    one, other = demos.episodes[0], found.episodes[0]
    np.testing.assert_array_equal(other.observations, one.observations[:, 1:])
    found = Demonstrations.load(path, facts=Facts(obs_keys=("object", "eef")))
    np.testing.assert_array_equal(found.episodes[0].observations, one.observations[:, [1, 2, 0]])
    (first, *_) = messages(path, obs_keys=("joints",))
    assert first == (
        ", episode 0, obs/joints: found nothing, expected what --obs-keys names (obs has eef, "
        "object)"
    )


def test_a_mask_chooses_in_the_order_of_the_numbers(path, demos):
    found = Demonstrations.load(path, facts=Facts(mask="train"))
    assert [len(e.actions) for e in found.episodes] == [4, 6]
    assert found.provenance["mask"] == "train"
    with pytest.raises(DemonstrationError, match="mask: found train, expected 'valid', as --mask"):
        Demonstrations.load(path, facts=Facts(mask="valid"))


def test_a_mask_of_what_is_not_there(path):
    with h5py.File(path, "a") as file:
        file["mask/odd"] = np.array([b"demo_0", b"demo_7"])
        file["mask/numbers"] = np.arange(3)
    (defect,) = messages(path, mask="odd")
    assert defect == ", episode 1, data/demo_7: found nothing, expected what odd lists"
    (defect,) = messages(path, mask="numbers")
    assert defect.startswith(", mask/numbers: found int64 array of shape [3], expected names such")


def test_demonstrations_are_ordered_by_number(tmp_path, make_episode, write_format):
    episodes = tuple(make_episode(3 + i, seed=i) for i in range(12))
    path = write_format("robomimic", tmp_path, Demonstrations("t", episodes))
    found = Demonstrations.load(path)
    assert [len(e.actions) for e in found.episodes] == list(range(3, 15))


def test_without_next_obs_the_last_action_goes(path, demos):
    with h5py.File(path, "a") as file:
        for name in file["data"]:
            del file[f"data/{name}/next_obs"]
    found = Demonstrations.load(path)
    one, other = demos.episodes[2], found.episodes[2]
    np.testing.assert_array_equal(other.observations, one.observations[:-1])
    np.testing.assert_array_equal(other.actions, one.actions[:-1])
    assert found.provenance["dropped_steps"].startswith("3, the last of each episode")


def test_raw_states_are_no_observations(path):
    with h5py.File(path, "a") as file:
        for name in file["data"]:
            del file[f"data/{name}/obs"], file[f"data/{name}/next_obs"]
    found = messages(path)
    assert len(found) == 3
    assert found[0].startswith(", episode 0, obs: found nothing but simulator states, expected obs")


def test_images_are_refused_by_name_unless_left_out(path, demos):
    with h5py.File(path, "a") as file:
        for i, e in enumerate(demos.episodes):
            for key in ("obs", "next_obs"):
                file[f"data/demo_{i}/{key}/camera"] = np.zeros((len(e.actions), 8, 8, 3), "u1")
    assert (
        ", episode 0, obs/camera: found images of shape [4, 8, 8, 3], expected state values; "
        "choose with --obs-keys" in messages(path)
    )
    found = Demonstrations.load(path, facts=Facts(obs_keys=("eef", "object")))
    np.testing.assert_array_equal(found.episodes[1].observations, demos.episodes[1].observations)


def test_the_task_is_asked_for_where_it_is_not_told(path):
    with h5py.File(path, "a") as file:
        del file["data"].attrs["env_args"]
    assert messages(path) == [", task: found nothing, expected the task's name"]
    assert Demonstrations.load(path, facts=Facts(task="lift")).task == "lift"
    with h5py.File(path, "a") as file:
        file["data"].attrs["env_args"] = "{"
    assert messages(path) == [", data/env_args: found '{', expected a JSON object with env_name"]


def test_members_of_different_length(path):
    with h5py.File(path, "a") as file:
        del file["data/demo_0/obs/object"]
        file["data/demo_0/obs/object"] = np.zeros((9, 2))
    assert messages(path)[0] == ", episode 0, obs/object: found 9 rows, expected 4 rows, as obs/eef"
