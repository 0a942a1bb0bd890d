"""D4RL's flat arrays; the files are written by hand from its documentation, as D4RL needs gym."""

import h5py
import numpy as np
import pytest

from iqmpc.demos import DemonstrationError, Demonstrations, Facts
from iqmpc.demos.checks import find_defects
from iqmpc.demos.formats import read


@pytest.fixture
def path(tmp_path, demos, write_format):
    return write_format("d4rl", tmp_path, demos)


def edit(path, **members):
    """Replace members; None leaves one out."""
    with h5py.File(path, "a") as file:
        for key, value in members.items():
            if key in file:
                del file[key]
            if value is not None:
                file[key] = value


def defects(path, **facts):
    found = find_defects(read(path, "d4rl", Facts(task="t", **facts)))
    return [str(defect).removeprefix(str(path)) for defect in found]


def test_without_next_observations_the_last_action_goes(path, demos):
    terminals = np.zeros(15, bool)
    terminals[3] = True
    timeouts = np.zeros(15, bool)
    timeouts[8] = True
    edit(path, next_observations=None, terminals=terminals, timeouts=timeouts)
    found = Demonstrations.load(path, task="t")
    for one, other in zip(demos.episodes, found.episodes, strict=True):
        np.testing.assert_array_equal(other.observations, one.observations[:-1])
        np.testing.assert_array_equal(other.actions, one.actions[:-1])
        np.testing.assert_array_equal(other.rewards, one.rewards[:-1])
        assert other.terminated is False
    assert found.provenance["dropped_steps"] == (
        "3, the last of each episode: no observation followed it"
    )
    assert found.provenance["dropped_terminations"] == "1, with their last steps"


def test_terminals_end_episodes_and_timeouts_do_too(path):
    terminals = np.zeros(15, np.uint8)
    terminals[3] = 1
    edit(path, terminals=terminals)
    found = Demonstrations.load(path, task="t")
    assert [len(e.actions) for e in found.episodes] == [4, 5, 6]
    assert [e.terminated for e in found.episodes] == [True, False, False]


def test_time_limits_that_are_not_marked_are_asked_for(path, demos):
    edit(path, timeouts=None)
    assert defects(path) == [
        ", timeouts: found nothing, expected true at time limits; give --episode-length instead"
    ]
    edit(path, next_observations=None)
    facts = Facts(episode_length=6)
    found = Demonstrations.load(path, task="t", facts=facts)
    assert [len(e.actions) for e in found.episodes] == [5, 5, 2]
    rows = np.concatenate([e.observations[:-1] for e in demos.episodes])
    np.testing.assert_array_equal(found.episodes[1].observations, rows[6:12])


def test_the_time_limit_counts_from_the_last_end(path):
    terminals = np.zeros(15, bool)
    terminals[2] = True
    edit(path, timeouts=None, next_observations=None, terminals=terminals)
    found = Demonstrations.load(path, task="t", facts=Facts(episode_length=5))
    # 3, then 5, 5 and the remaining 2 steps, each without its last action
    assert [len(e.actions) for e in found.episodes] == [2, 4, 4, 1]


def test_an_episode_of_one_step_goes_whole(path):
    timeouts = np.zeros(15, bool)
    timeouts[13] = True
    edit(path, next_observations=None, timeouts=timeouts)
    found = Demonstrations.load(path, task="t")
    assert [len(e.actions) for e in found.episodes] == [13]
    assert found.provenance["dropped_episodes"].startswith("1 of one step")


def test_episodes_glued_together_are_found(path):
    timeouts = np.zeros(15, bool)
    timeouts[8] = True  # the end at 3 is not marked
    edit(path, timeouts=timeouts)
    (defect,) = defects(path)
    assert defect.startswith(
        ", episode 0, next_observations: found another state than observations has one step "
        "later, at [3], expected episodes without gaps"
    )


@pytest.mark.parametrize(
    ("members", "defect"),
    [
        ({"terminals": None}, ", terminals: found nothing, expected true or false per step"),
        ({"actions": np.zeros((14, 2))}, ", actions: found shape [14, 2], expected 15 rows, as"),
        ({"terminals": np.full(15, 0.5)}, ", terminals: found other numbers, expected true or"),
        ({"rewards": np.array([b"a"] * 15)}, ", rewards: found dtype |S1 of shape [15]"),
        ({"rewards": np.float32(3)}, ", rewards: found shape [], expected 15 rows"),
    ],
)
def test_a_member_of_the_wrong_kind(path, members, defect):
    edit(path, **members)
    assert defects(path)[0].startswith(defect)


def test_all_that_is_wrong_with_a_file_is_listed(path):
    edit(path, timeouts=None, actions=np.zeros((14, 2)), rewards=np.zeros(3))
    found = [str(d).removeprefix(str(path)) for d in find_defects(read(path))]
    assert [defect.split(":")[0] for defect in found] == [
        ", task",
        ", actions",
        ", rewards",
        ", timeouts",
    ]


def test_a_file_without_episodes(path):
    empty = {key: np.zeros((0, 3), "f4") for key in ("observations", "next_observations")}
    edit(path, **empty, actions=np.zeros((0, 2), "f4"), rewards=np.zeros(0, "f4"))
    edit(path, terminals=np.zeros(0, bool), timeouts=np.zeros(0, bool))
    assert defects(path) == [", episodes: found none, expected at least one"]


def test_numbers_beyond_float32_are_found(path):
    edit(path, rewards=np.full(15, 1e300))
    with pytest.raises(DemonstrationError, match=r"rewards: found inf at \[0\] and 3 more"):
        Demonstrations.load(path, task="t")
