"""Every defect is found, not only the first, and each says where, what and what was expected."""

from dataclasses import replace

import numpy as np
import pytest

from iqmpc.demos import DemonstrationError
from iqmpc.demos.checks import find_defects
from iqmpc.demos.types import Defect, Draft


@pytest.fixture
def draft(demos):
    """The sound set as a reader would give it: edit `draft.episodes[i][key]` to spoil it."""
    return Draft("f.h5", demos.task, [dict(vars(e)) for e in demos.episodes], demos.provenance)


RENAMED = "(iqmpc demos convert --task renames it, a run's own is task.name)"


def messages(draft, **expected):
    return [str(defect) for defect in find_defects(draft, **expected)]


def spoilt(array, *at):
    copy = array.copy()
    for index, value in at:
        copy[index] = value
    return copy


def test_a_sound_set_has_none(draft):
    assert messages(draft) == []
    assert messages(draft, task="walker-walk", obs_dim=3, action_dim=2) == []


def test_what_the_task_expects(draft):
    assert messages(draft, task="walker-run", obs_dim=24, action_dim=6) == [
        f"f.h5, task: found 'walker-walk', expected 'walker-run' {RENAMED}",
        "f.h5, observations: found 3 values a step, expected 24",
        "f.h5, actions: found 2 values a step, expected 6",
    ]


@pytest.mark.parametrize(("task", "found"), [(None, "nothing"), ("", "''"), (7, "7")])
def test_a_set_without_a_task(draft, task, found):
    assert messages(replace(draft, task=task)) == [
        f"f.h5, task: found {found}, expected the task's name"
    ]


@pytest.mark.parametrize("provenance", [[1], {"steps": 5}, "text"])
def test_provenance_is_text_by_name(draft, provenance):
    assert messages(replace(draft, provenance=provenance)) == [
        f"f.h5, provenance: found {provenance!r}, expected a mapping of text to text"
    ]


def test_a_set_without_episodes(draft):
    assert messages(replace(draft, episodes=[])) == [
        "f.h5, episodes: found none, expected at least one"
    ]


# What episode 1 (T = 5, O = 3, A = 2) is given, and what is said of it.
CASES = {
    "nan": (
        lambda e: {"observations": spoilt(e["observations"], ((2, 1), np.nan), ((4, 0), np.nan))},
        "observations: found nan at [2, 1] and 1 more, expected finite values",
    ),
    "infinity": (
        lambda e: {"rewards": spoilt(e["rewards"], (3, -np.inf))},
        "rewards: found -inf at [3], expected finite values",
    ),
    "far beyond": (
        lambda e: {"observations": spoilt(e["observations"], ((1, 0), -1e30))},
        "observations: found -1.0000000150474662e+30 at [1, 0], expected values within ±1e+12",
    ),
    "infinite action": (
        lambda e: {"actions": spoilt(e["actions"], ((0, 0), np.inf))},
        "actions: found inf at [0, 0], expected finite values",
    ),
    "outside": (
        lambda e: {"actions": spoilt(e["actions"], ((4, 1), -1.5))},
        "actions: found -1.5 at [4, 1], expected values in [-1, 1]",
    ),
    "T rows": (
        lambda e: {"observations": e["observations"][:-1]},
        "observations: found shape [5, 3], expected shape [T+1, O] = [6, 3]",
    ),
    "T+1 rewards": (
        lambda e: {"rewards": np.zeros(6, np.float32)},
        "rewards: found shape [6], expected shape [T] = [5]",
    ),
    "column of rewards": (
        lambda e: {"rewards": np.zeros((5, 1), np.float32)},
        "rewards: found shape [5, 1], expected shape [T] = [5]",
    ),
    "other width": (
        lambda e: {"observations": np.zeros((6, 4), np.float32)},
        "observations: found shape [6, 4], expected shape [T+1, O] = [6, 3]",
    ),
    "flat actions": (
        lambda e: {"actions": np.zeros(5, np.float32)},
        "actions: found shape [5], expected shape [T, A] = [any, 2]",
    ),
    "dtype": (
        lambda e: {"observations": e["observations"].astype(np.float64)},
        "observations: found dtype float64, expected float32",
    ),
    "missing": (
        lambda e: {"observations": None},
        "observations: found nothing, expected a float32 array [T+1, O]",
    ),
    "no array": (
        lambda e: {"actions": 3.5},
        "actions: found 3.5, expected a float32 array [T, A]",
    ),
    "empty": (
        lambda e: {
            "observations": e["observations"][:1],
            "actions": e["actions"][:0],
            "rewards": e["rewards"][:0],
        },
        "actions: found no steps, expected at least one",
    ),
    "not told whether terminal": (
        lambda e: {"terminated": None},
        "terminated: found nothing, expected true or false",
    ),
    "terminated by number": (
        lambda e: {"terminated": 1.0},
        "terminated: found 1.0, expected true or false",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_an_episode_with_one_defect(draft, case):
    changes, message = CASES[case]
    draft.episodes[1].update(changes(draft.episodes[1]))
    assert messages(draft) == [f"f.h5, episode 1, {message}"]


def test_success_by_number(draft):
    for episode in draft.episodes:
        episode["success"] = True
    draft.episodes[2]["success"] = 0.5
    assert messages(draft) == ["f.h5, episode 2, success: found 0.5, expected true or false"]


@pytest.mark.parametrize(("key", "value"), [("rewards", None), ("success", True)])
def test_optional_values_are_in_all_episodes_or_in_none(draft, key, value):
    draft.episodes[0][key] = value
    present = 2 if value is None else 1
    assert messages(draft) == [
        f"f.h5, {key}: found {present} of 3 episodes with it, expected all of them or none"
    ]


def test_the_odd_episode_is_named_even_when_it_comes_first(draft):
    draft.episodes[0]["observations"] = np.zeros((5, 7), np.float32)
    assert messages(draft) == [
        "f.h5, episode 0, observations: found shape [5, 7], expected shape [T+1, O] = [5, 3]"
    ]


def test_the_expected_width_decides_which_episodes_are_odd(draft):
    draft.episodes[0]["observations"] = np.zeros((5, 7), np.float32)
    assert [m.split(":")[0] for m in messages(draft, obs_dim=7)] == [
        "f.h5, episode 1, observations",
        "f.h5, episode 2, observations",
    ]


def test_no_values_at_all(draft):
    for episode in draft.episodes:
        episode["observations"] = episode["observations"][:, :0]
    assert messages(draft) == ["f.h5, observations: found 0 values a step, expected at least 1"]


def test_all_defects_are_found(draft):
    first, second, third = draft.episodes
    first["actions"] = spoilt(first["actions"], ((0, 0), 2), ((1, 0), np.nan))
    second["observations"] = spoilt(second["observations"], ((0, 0), np.nan))[:-1]
    third["terminated"] = None
    assert messages(draft, task="x") == [
        f"f.h5, task: found 'walker-walk', expected 'x' {RENAMED}",
        "f.h5, episode 0, actions: found nan at [1, 0], expected finite values",
        "f.h5, episode 0, actions: found 2.0 at [0, 0], expected values in [-1, 1]",
        "f.h5, episode 1, observations: found shape [5, 3], expected shape [T+1, O] = [6, 3]",
        "f.h5, episode 1, observations: found nan at [0, 0], expected finite values",
        "f.h5, episode 2, terminated: found nothing, expected true or false",
    ]


def test_what_a_reader_could_not_read_is_reported_once(draft):
    unread = Defect("f.h5", "rewards", "damage", "none")
    for episode in draft.episodes:
        episode["rewards"] = unread
    gone = Defect("f.h5", "000003", "nothing", "a group", episode=3)
    draft.episodes.append(gone)
    assert list(find_defects(draft)) == [unread, gone]
    assert list(find_defects(unread)) == [unread]


def test_an_error_lists_the_first_defects_and_holds_all():
    defects = [Defect("f.h5", "actions", "1", "2", episode=i) for i in range(7)]
    error = DemonstrationError.of(defects)
    assert error.defects == tuple(defects)
    lines = str(error).splitlines()
    assert lines[:5] == [str(defect) for defect in defects[:5]]
    assert lines[5:] == ["... and 2 more defects"]
    assert len(str(DemonstrationError.of(defects[:5])).splitlines()) == 5


@pytest.fixture
def images(draft):
    """The same set from 64 x 64 frames."""
    for episode in draft.episodes:
        frames = np.zeros((len(episode["actions"]) + 1, 3, 64, 64), np.uint8)
        episode["observations"] = frames
    return draft


def test_a_sound_set_of_images_has_none(images):
    assert messages(images) == []
    assert messages(images, obs_dim=24) == [
        "f.h5, observations: found images, expected 24 values a step"
    ]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (
            np.zeros((5, 3, 64, 64), np.uint8),
            "found shape [5, 3, 64, 64], expected shape [T+1, C, 64, 64] = [6, 3, 64, 64]",
        ),
        (
            np.zeros((6, 1, 64, 64), np.uint8),
            "found shape [6, 1, 64, 64], expected shape [T+1, C, 64, 64] = [6, 3, 64, 64]",
        ),
        (np.zeros((6, 3, 64, 64), np.float32), "found dtype float32, expected uint8"),
        (None, "found nothing, expected a uint8 array [T+1, C, 64, 64]"),
    ],
)
def test_an_episode_of_images_with_one_defect(images, array, message):
    images.episodes[1]["observations"] = array
    assert messages(images) == [f"f.h5, episode 1, observations: {message}"]


def test_images_among_flat_observations_are_odd(draft):
    draft.episodes[1]["observations"] = np.zeros((6, 3, 64, 64), np.uint8)
    assert messages(draft) == [
        "f.h5, episode 1, observations: found dtype uint8, expected float32",
        "f.h5, episode 1, observations: found shape [6, 3, 64, 64], expected shape [T+1, O] = "
        "[6, 3]",
    ]


def test_images_without_channels_or_of_another_size(images):
    for episode in images.episodes:
        episode["observations"] = episode["observations"][:, :0]
    assert messages(images) == [
        "f.h5, observations: found images without channels, expected at least 1"
    ]
    for episode in images.episodes:
        episode["observations"] = np.zeros((len(episode["actions"]) + 1, 3, 84, 84), np.uint8)
    assert len(messages(images)) == 3
