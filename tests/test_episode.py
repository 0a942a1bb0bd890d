"""An episode while it is recorded, and the arrays that it ends as."""

import numpy as np
import pytest

from iqmpc import Episode
from iqmpc.episode import EpisodeBuffer
from iqmpc.errors import TaskError
from iqmpc.observation import ObservationSpec, stacked


def recorded(observations):
    buffer = EpisodeBuffer([observations[0]])
    for step, obs in enumerate(observations[1:]):
        buffer.add(np.full(2, step / 10), float(step), obs)
    return buffer


def test_steps_become_arrays():
    observations = [np.full(3, t, np.float32) for t in range(4)]
    episode = recorded(observations).finish(terminated=True, success=False)
    assert [x.dtype for x in (episode.observations, episode.actions, episode.rewards)] == (
        [np.float32] * 3
    )
    np.testing.assert_array_equal(episode.observations, observations)
    np.testing.assert_array_equal(episode.actions, np.float32([[0, 0], [0.1, 0.1], [0.2, 0.2]]))
    assert episode.rewards.tolist() == [0, 1, 2]
    assert episode.terminated is True and episode.success is False
    assert episode.observation_spec == ObservationSpec((3,))
    assert episode.observed() is episode.observations


def test_an_episode_that_is_cut_has_not_ended():
    episode = recorded([np.zeros(3, np.float32)] * 3).finish()
    assert episode.terminated is False and episode.success is None


def test_images_are_kept_once_and_seen_stacked():
    frames = np.random.default_rng(0).integers(0, 256, (4, 1, 64, 64), np.uint8)
    episode = recorded(list(stacked(frames))).finish()
    assert episode.observations.dtype == np.uint8
    np.testing.assert_array_equal(episode.observations, frames)
    assert episode.observation_spec == ObservationSpec((3, 64, 64))
    np.testing.assert_array_equal(episode.observed(), stacked(frames))
    with pytest.raises(TaskError, match="must be its last three frames each"):
        recorded(list(stacked(frames))[::-1]).finish()


def test_what_was_not_recorded_is_none():
    episode = Episode(np.zeros((3, 2), np.float32), np.zeros((2, 1), np.float32))
    assert (episode.rewards, episode.terminated, episode.success) == (None, False, None)
    assert np.isnan(episode.undiscounted_return)


def test_a_return_is_summed_in_float64():
    rewards = np.float32([2**24, 1, 1])
    episode = Episode(np.zeros((4, 2), np.float32), np.zeros((3, 1), np.float32), rewards)
    assert rewards[:2].sum() == 2**24 and episode.undiscounted_return == 2**24 + 2
