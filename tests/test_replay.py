from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iqmpc.episode import Episode
from iqmpc.observation import stacked, unstacked
from iqmpc.replay import SliceReplay, join


def episode(number, steps):
    """Rows that name their episode and step: obs = [number, t], action = [number + t / 1000]."""
    t = np.arange(steps + 1, dtype=np.float32)
    obs = np.stack([np.full_like(t, number), t], 1)
    return Episode(obs, (number + t[:steps, None] / 1000), t[:steps])


def check(batch, horizon):
    """Every slice lies in one episode, in order, with its own actions and rewards."""
    number, t = batch.obs[..., 0], batch.obs[..., 1]
    assert torch.all(number == number[0])
    assert torch.equal(t[1:], t[:-1] + 1)
    torch.testing.assert_close(batch.action[..., 0], number[:-1] + t[:-1] / 1000)
    assert torch.equal(batch.reward, t[:-1])
    assert batch.obs.shape[0] == horizon + 1


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=25),
    horizon=st.integers(1, 5),
    capacity=st.integers(31, 90),
)
def test_slices_never_cross_an_episode(lengths, horizon, capacity):
    replay = SliceReplay(2, 1, horizon=horizon, capacity=capacity)
    generator = torch.Generator().manual_seed(0)
    for number, steps in enumerate(lengths):
        replay.add(episode(number, steps))
        assert sum(s + 1 for _, s in replay._episodes) <= capacity
        if replay.slices:
            check(replay.sample(64, generator), horizon)
    kept = [n for n, s in enumerate(lengths) if s >= horizon]
    if kept:  # the newest episode is always there, and the kept ones are the newest
        held = sorted({int(x) for x in replay.sample(3000, generator).obs[0, :, 0]})
        assert held == kept[-len(held) :]


@pytest.mark.parametrize(("steps", "held"), [(4, [1, 2, 3]), (5, [1, 2, 3]), (6, [2, 3])])
def test_an_episode_of_which_a_row_is_overwritten_is_gone(steps, held):
    """Three episodes of six rows fill the ring; the fourth takes five, six or seven of them."""
    replay = SliceReplay(2, 1, horizon=3, capacity=18)
    for number in range(3):
        replay.add(episode(number, 5))
    assert replay.slices == 9
    replay.add(episode(3, steps))
    batch = replay.sample(500, torch.Generator().manual_seed(0))
    check(batch, 3)
    assert batch.obs[0, :, 0].unique().tolist() == held
    assert len(replay) == 5 * (len(held) - 1) + steps
    assert replay.slices == 3 * (len(held) - 1) + steps - 2


def test_an_old_tail_is_dropped_when_the_ring_begins_again():
    replay = SliceReplay(2, 1, horizon=3, capacity=18)
    for number, steps, held in (
        (0, 5, [0]),
        (1, 5, [0, 1]),
        (2, 5, [0, 1, 2]),
        (3, 4, [1, 2, 3]),  # over 0
        (4, 5, [2, 3, 4]),  # over 1, up to row 10
        (5, 7, [5]),
    ):  # begins again, over 3 and 4; 2 is the oldest
        replay.add(episode(number, steps))
        batch = replay.sample(500, torch.Generator().manual_seed(0))
        check(batch, 3)
        assert batch.obs[0, :, 0].unique().tolist() == held


def test_every_slice_is_drawn():
    replay = SliceReplay(2, 1, horizon=3, capacity=100)
    replay.add(episode(0, 5))
    replay.add(episode(1, 3))
    batch = replay.sample(2000, torch.Generator().manual_seed(0))
    starts = {(int(n), int(t)) for n, t in batch.obs[0]}
    assert starts == {(0, 0), (0, 1), (0, 2), (1, 0)} and replay.slices == 4


def test_a_range_on_the_device_draws_every_slice_alike():
    """As on a GPU, where a captured draw must follow the replay in place."""
    replay = SliceReplay(2, 1, horizon=3, capacity=10_000)
    replay._range_on_device = True
    generator = torch.Generator().manual_seed(0)
    replay.add(episode(0, 5))
    memory = [t.data_ptr() for t in (*replay._rows.values(), replay._line, replay._count)]
    replay.add(episode(1, 9))
    drawn = replay.sample(100_000, generator)
    check(drawn, 3)
    slices, count = drawn.obs[0].unique(dim=0, return_counts=True)
    assert len(slices) == replay.slices == 3 + 7
    assert (count / 10_000 - 1).abs().max() < 0.05  # five standard deviations
    assert replay.allocations == 1 and memory == [
        t.data_ptr() for t in (*replay._rows.values(), replay._line, replay._count)
    ]
    for number in range(2, 12):
        replay.add(episode(number, 500))
    assert replay.allocations == 2 and memory[0] != replay._rows["obs"].data_ptr()
    drawn = replay.sample(10_000, generator)
    check(drawn, 3)
    assert set(range(12)) == {int(n) for n in drawn.obs[0, :, 0]}


def test_an_empty_state_empties_the_replay():
    replay = SliceReplay(2, 1, horizon=3, capacity=100)
    replay.add(episode(0, 5))
    replay.load_state_dict(SliceReplay(2, 1, horizon=3, capacity=100).state_dict())
    assert replay.slices == len(replay) == 0


def test_termination_is_the_last_step_alone():
    replay = SliceReplay(2, 1, horizon=2, capacity=100)
    replay.add(replace(episode(0, 4), terminated=True))
    replay.add(episode(1, 4))
    batch = replay.sample(500, torch.Generator().manual_seed(0))
    last = (batch.obs[:-1, :, 0] == 0) & (batch.obs[:-1, :, 1] == 3)
    assert torch.equal(batch.terminated, last.float()) and last.any()


def test_memory_grows_with_use():
    replay = SliceReplay(2, 1, horizon=2, capacity=10_000_000)
    assert len(replay._rows["obs"]) < 10_000
    for number in range(20):
        replay.add(episode(number, 500))
    assert len(replay) == 10_000
    check(replay.sample(500, torch.Generator().manual_seed(0)), 2)


def test_state_round_trip_draws_the_same():
    first = SliceReplay(2, 1, horizon=3, capacity=60)
    for number in range(8):
        first.add(episode(number, 11))
    second = SliceReplay(2, 1, horizon=3, capacity=60)
    second.load_state_dict(first.state_dict())
    for replay in (first, second):
        replay.add(episode(9, 17))
    a, b = (r.sample(50, torch.Generator().manual_seed(1)) for r in (first, second))
    assert all(torch.equal(x, y) for x, y in zip(a[:4], b[:4], strict=True))


def test_a_state_has_every_row_of_the_last_episode():
    """Its last row, an observation alone, too."""
    first = SliceReplay(2, 1, horizon=3, capacity=60)
    first.add(episode(4, 3))
    second = SliceReplay(2, 1, horizon=3, capacity=60)
    second.load_state_dict(first.state_dict())
    batch = second.sample(1, torch.Generator().manual_seed(0))
    assert batch.obs[:, 0].tolist() == [[4, 0], [4, 1], [4, 2], [4, 3]]


@pytest.mark.parametrize(
    "change",
    [
        {"episodes": [[0, 12]]},  # beyond its rows
        {"episodes": [[-1, 11]]},
        {"episodes": [[0, 11], [5, 3]]},  # one in the other
        {"episodes": [[0, 2]]},  # shorter than a slice
        {"next": 61},
        {"next": -1},
    ],
    ids=str,
)
def test_a_state_that_no_replay_has(change):
    replay = SliceReplay(2, 1, horizon=3, capacity=60)
    replay.add(episode(4, 11))
    state = replay.state_dict() | {k: torch.tensor(v) for k, v in change.items()}
    with pytest.raises(ValueError, match="episodes of a replay lie in its rows"):
        SliceReplay(2, 1, horizon=3, capacity=60).load_state_dict(state)


def test_join_puts_demonstrations_first():
    replay = SliceReplay(2, 1, horizon=3, capacity=60)
    replay.add(episode(4, 10))
    one, two = (replay.sample(n, torch.Generator().manual_seed(n)) for n in (3, 5))
    batch = join(one, two)
    assert batch.experts == 3 and batch.obs.shape == (4, 8, 2)
    assert torch.equal(batch.obs[:, :3], one.obs) and torch.equal(batch.action[:, 3:], two.action)


def test_what_does_not_fit_is_named():
    replay = SliceReplay(2, 1, horizon=3, capacity=20)
    whole = episode(0, 5)
    with pytest.raises(ValueError, match=r"obs must be \[6, 2\], got \[5, 2\]"):
        replay.add(replace(whole, observations=whole.observations[:-1]))
    with pytest.raises(ValueError, match=r"action must be \[5, 1\], got \[5, 2\]"):
        replay.add(replace(whole, actions=whole.actions.repeat(2, axis=1)))
    with pytest.raises(ValueError, match="an episode of 20 steps does not fit a replay of 20"):
        replay.add(episode(0, 20))
    with pytest.raises(ValueError, match="no episode of at least 3 steps"):
        replay.sample(1, torch.Generator())


def image_replay(**options):
    return SliceReplay((3, 64, 64), 1, **{"horizon": 2, "capacity": 40} | options)


def image_episode(number, steps):
    """Frames that name their episode and step in two pixels."""
    frames = np.zeros((steps + 1, 1, 64, 64), np.uint8)
    frames[:, 0, 0, 0], frames[:, 0, 0, 1] = number, np.arange(steps + 1)
    return Episode(frames, np.float32(number + np.arange(steps)[:, None] / 1000))


def test_images_are_kept_once_and_drawn_as_they_were_observed(image_point_env):
    replay, episodes = image_replay(), []
    for seed in range(3):
        rows = [image_point_env.reset(seed=seed)[0]]
        actions = np.random.default_rng(seed).uniform(-1, 1, (12, 2)).astype(np.float32)
        rows += [image_point_env.step(action)[0] for action in actions]
        replay.add(Episode(unstacked(np.array(rows)), actions[:, :1]))
        episodes.append((torch.tensor(np.array(rows)), torch.tensor(actions[:, :1])))
    assert replay._rows["obs"].dtype == torch.uint8
    assert replay._rows["obs"].shape[1:] == (1, 64, 64)
    batch = replay.sample(300, torch.Generator().manual_seed(0))
    assert batch.obs.shape == (3, 300, 3, 64, 64) and batch.obs.dtype == torch.uint8
    slices = [
        (rows[t : t + 3], actions[t : t + 2])
        for rows, actions in episodes
        for t in range(len(actions) - 1)
    ]
    found = set()
    for b in range(300):
        at = [
            i
            for i, (rows, actions) in enumerate(slices)
            if torch.equal(rows, batch.obs[:, b]) and torch.equal(actions, batch.action[:, b])
        ]
        assert len(at) == 1
        found.add(at[0])
    assert len(found) == len(slices)  # first slices, whose frames repeat, among them


@settings(deadline=None, max_examples=15)
@given(lengths=st.lists(st.integers(2, 15), min_size=1, max_size=12))
def test_a_stack_never_reaches_into_another_episode(lengths):
    replay, generator = image_replay(capacity=31), torch.Generator().manual_seed(0)
    for number, steps in enumerate(lengths):
        replay.add(image_episode(number, steps))
        obs = replay.sample(40, generator).obs
        names, t = obs[:, :, :, 0, 0], obs[:, :, :, 0, 1].int()
        assert torch.all(names == names[:1, :, :1])
        back = torch.tensor([2, 1, 0])
        assert torch.equal(t, (t[..., 2:] - back).clamp(min=0))
        assert torch.equal(t[1:, :, 2], t[:-1, :, 2] + 1)


def test_images_continue_from_a_state_dict():
    one, two = image_replay(), image_replay()
    for number in range(5):
        one.add(image_episode(number, 9))
    two.load_state_dict(one.state_dict())
    for replay in (one, two):
        replay.add(image_episode(9, 5))
    a, b = (r.sample(50, torch.Generator().manual_seed(1)) for r in (one, two))
    assert all(torch.equal(x, y) for x, y in zip(a[:4], b[:4], strict=True))


def test_frames_that_do_not_fit_are_named():
    whole = image_episode(0, 5)
    frames = whole.observations
    with pytest.raises(ValueError, match=r"obs must be \[6, 1, 64, 64\], got \[6, 3, 64, 64\]"):
        image_replay().add(replace(whole, observations=stacked(frames)))
    with pytest.raises(ValueError, match="frames must be uint8, got torch.float32"):
        image_replay().add(replace(whole, observations=frames.astype(np.float32)))
