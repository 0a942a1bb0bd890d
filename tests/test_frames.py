import numpy as np
import pytest

from iqmpc.errors import TaskError
from iqmpc.frames import observed, stacked, unstacked


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


@pytest.mark.parametrize(
    ("dtype", "shape", "kept"),
    [
        (np.float64, (4,), np.float32),
        (np.uint8, (4,), np.float32),
        (np.uint8, (3, 64, 64), np.uint8),
    ],
)
def test_observations_are_copied(dtype, shape, kept):
    obs = np.ones(shape, dtype)
    copy = observed(obs)
    obs[:] = 0
    assert copy.dtype == kept and np.all(copy == 1)
