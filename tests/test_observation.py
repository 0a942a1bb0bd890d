"""What an observation is: its shape, its type, and the frames that an episode keeps of images."""

import numpy as np
import pytest
import torch

from iqmpc.errors import TaskError
from iqmpc.observation import ObservationSpec, stacked, unstacked

FLAT, IMAGES = ObservationSpec((4,)), ObservationSpec((9, 64, 64))


def frames(steps, channels=3):
    return np.random.default_rng(0).integers(0, 256, (steps + 1, channels, 64, 64), np.uint8)


def test_an_episode_starts_with_its_first_frame_three_times():
    single = frames(4)
    stacks = stacked(single)
    assert stacks.shape == (5, 9, 64, 64) and stacks.dtype == np.uint8
    for t, rows in enumerate([(0, 0, 0), (0, 0, 1), (0, 1, 2), (1, 2, 3), (2, 3, 4)]):
        np.testing.assert_array_equal(stacks[t], np.concatenate([single[r] for r in rows]))
    np.testing.assert_array_equal(unstacked(stacks), single)


def test_what_is_no_stack_is_refused():
    stacks = stacked(frames(3, channels=1)).copy()
    stacks[2, 0, 5, 5] += 1
    with pytest.raises(TaskError, match="must be its last three frames each, the oldest first"):
        unstacked(stacks)


def test_flat_or_images():
    assert (FLAT.images, FLAT.dtype, FLAT.row_shape) == (False, np.float32, (4,))
    assert (IMAGES.images, IMAGES.dtype, IMAGES.row_shape) == (True, np.uint8, (3, 64, 64))
    assert ObservationSpec.of(4) == ObservationSpec.of([4]) == ObservationSpec.of(FLAT) == FLAT
    assert ObservationSpec.of([9, 64, 64]) == ObservationSpec.of_frames(3) == IMAGES
    assert ObservationSpec.of_rows(np.zeros((5, 4), np.float32)) == FLAT
    assert ObservationSpec.of_rows(frames(2)) == IMAGES


@pytest.mark.parametrize("shape", [(), (64, 64), (9, 84, 84), (8, 64, 64), (3, 3, 64, 64)])
def test_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"^obs_shape must be \(O,\) or \(3C, 64, 64\), got \("):
        ObservationSpec(shape)


def test_an_episode_keeps_every_frame_once():
    single = frames(4)
    np.testing.assert_array_equal(IMAGES.rows(list(stacked(single))), single)
    np.testing.assert_array_equal(IMAGES.observed(single), stacked(single))
    rows = FLAT.rows([np.arange(4), np.ones(4)])
    assert rows.dtype == np.float32 and rows.tolist() == [[0, 1, 2, 3], [1, 1, 1, 1]]
    assert FLAT.observed(rows) is rows


def test_flat_observations_become_float32_and_images_stay():
    assert FLAT.cast([[1, 2, 3, 4]]).dtype == np.float32
    assert FLAT.cast(np.ones(4, np.uint8)).dtype == np.float32
    assert (
        IMAGES.cast(np.ones((9, 64, 64), np.float64)).dtype == np.float64
    )  # for `check` to refuse


@pytest.mark.parametrize("of", [np.asarray, torch.as_tensor])
def test_what_does_not_fit_is_named(of):
    FLAT.check(of(np.zeros((2, 4))), 2)
    IMAGES.check(of(np.zeros((2, 5, 9, 64, 64), np.uint8)), 2, 5)
    IMAGES.check_rows(of(frames(4)), 5)
    with pytest.raises(ValueError, match=r"^obs must be \[2, 4\], got \[4\]$"):
        FLAT.check(of(np.zeros(4)), 2)
    with pytest.raises(ValueError, match=r"^next_obs must be uint8, got (torch\.)?int64$"):
        IMAGES.check(of(np.zeros((9, 64, 64), np.int64)), name="next_obs", images="next_obs")
    with pytest.raises(ValueError, match=r"^obs must be \[6, 3, 64, 64\], got \[5, 3, 64, 64\]$"):
        IMAGES.check_rows(of(frames(4)), 6)
    with pytest.raises(ValueError, match=r"^frames must be uint8, got (torch\.)?float32$"):
        IMAGES.check_rows(of(frames(4).astype(np.float32)), 5)
