"""The reward correlation and the episodes that it is taken over."""

import gymnasium
import numpy as np
import pytest

from iqmpc import Config, Episode, evaluate, evaluation
from iqmpc.errors import TaskError
from iqmpc.evaluation import NOISES, Noisy, Random, mixed_episodes, reward_correlation
from iqmpc.seeding import stream_seed


class Homing:
    """Walks to the origin of the point task. `decode` says which reward its critics would imply."""

    config = Config()

    def __init__(self, decode=None):
        self.decode, self.resets, self.terminated = decode, 0, []

    def reset(self):
        self.resets += 1

    def act(self, obs):
        return np.clip(-obs / 0.2, -1, 1).astype(np.float32)

    def decode_reward(self, obs, action, next_obs, *, terminated):
        self.terminated.append(terminated)
        return self.decode(next_obs).astype(np.float32)


def closeness(next_obs):
    """The point task's own reward."""
    return np.maximum(0, 1 - np.linalg.norm(next_obs, axis=1))


@pytest.fixture
def mixed(point_env):
    return mixed_episodes(Homing(), point_env)


def test_the_mix_is_in_three_equal_parts(mixed, point_env):
    assert len(mixed) == 18
    good, noisy, random = mixed[:6], mixed[6:12], mixed[12:]
    means = [np.mean([e.rewards.sum() for e in part]) for part in (good, noisy, random)]
    assert means[0] > means[1] > means[2]
    spread = [
        np.std(
            [
                np.std(noisy[i].actions - Homing().act(noisy[i].observations[:-1])),
                np.std(noisy[i + 3].actions - Homing().act(noisy[i + 3].observations[:-1])),
            ]
        )
        for i in range(3)
    ]
    sizes = [np.std(e.actions - Homing().act(e.observations[:-1])) for e in noisy]
    assert sizes[0] < sizes[1] < sizes[2] and max(spread) < 0.1  # each noise twice, in turn
    starts = {tuple(e.observations[0]) for e in mixed}
    assert len(starts) == 18
    again = mixed_episodes(Homing(), point_env)
    assert all(np.array_equal(a.actions, b.actions) for a, b in zip(mixed, again, strict=True))
    other = mixed_episodes(Homing(), point_env, seed=1)
    assert not any(
        np.array_equal(a.observations[0], b.observations[0])
        for a, b in zip(mixed, other, strict=True)
    )


def test_the_agent_is_told_of_every_episode_it_acts_in(point_env):
    agent, seen = Homing(), []
    mixed_episodes(
        agent,
        point_env,
        each=2,
        noises=(0.1,),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert agent.resets == 4 and [done for done, _ in seen] == [1, 2, 3, 4, 5, 6]


def test_episodes_that_do_not_end_are_cut_and_what_is_no_number_is_named(point_env, small_config):
    agent = Homing()
    agent.config = small_config
    endless = type(point_env)(10**9)
    assert {len(e.actions) for e in mixed_episodes(agent, endless, each=1)} == {20}
    endless.step = lambda action: (np.full(2, np.nan, np.float32), 0.0, False, False, {})
    with pytest.raises(TaskError, match="point, correlation episode 0: step 1: .*nan"):
        mixed_episodes(agent, endless)


@pytest.mark.parametrize(
    ("decode", "expected"),
    [(closeness, 1.0), (lambda x: 3 + 0.1 * closeness(x), 1.0), (lambda x: -closeness(x), -1.0)],
)
def test_a_decoded_reward_that_is_known(mixed, decode, expected):
    assert reward_correlation(Homing(decode), mixed) == pytest.approx(expected, abs=1e-5)


def test_a_decoded_reward_that_is_noise(mixed):
    random = np.random.default_rng(0)
    found = reward_correlation(Homing(lambda x: random.standard_normal(len(x))), mixed)
    assert abs(found) < 0.2


@pytest.mark.parametrize("value", [1, np.nan, np.inf])
def test_no_figure_where_there_is_none(mixed, value):
    assert reward_correlation(Homing(lambda x: np.full(len(x), value)), mixed) is None


def test_only_the_last_step_of_a_terminated_episode_ends_the_task():
    rows = np.arange(8, dtype=np.float32).reshape(4, 2)
    agent = Homing(closeness)
    for ended in (False, True):
        reward_correlation(
            agent,
            [
                Episode(
                    rows, np.zeros((3, 2), np.float32), np.arange(3, dtype=np.float32), ended, None
                )
            ],
        )
    assert [x.tolist() for x in agent.terminated] == [[False] * 3, [False, False, True]]


def test_noise_stays_in_range_and_random_actions_fill_it():
    obs = np.array([0.2, -0.05], np.float32)
    noisy = Noisy(Homing(), max(NOISES), seed=0)
    actions = np.array([noisy.act(obs) for _ in range(500)])
    assert actions.dtype == np.float32 and np.abs(actions).max() == 1
    assert actions[:, 1].std() > 0.5 and np.array_equal(
        Noisy(Homing(), 0, 0).act(obs), Homing().act(obs)
    )
    random = Random(3, seed=0)
    actions = np.array([random.act(obs) for _ in range(500)])
    assert actions.shape == (500, 3) and 0.95 < np.abs(actions).max() <= 1
    assert actions.dtype == np.float32 and actions.std() == pytest.approx(3**-0.5, abs=0.05)


class Telling(gymnasium.Env):
    """Three steps; solved at those of `steps`, of one episode after the other. Keeps its seeds."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)

    def __init__(self, *steps):
        self.steps, self.seeds = steps, []

    def reset(self, *, seed=None, options=None):
        self.seeds.append(seed)
        self.step_number = 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.step_number += 1
        solved = self.step_number in self.steps[len(self.seeds) - 1]
        over = self.step_number == 3
        return np.zeros(2, np.float32), 1.0, False, over, {"success": solved}


def test_success_at_the_last_step_and_at_any():
    """The first is solved on the way alone, the second never, the third at its end."""
    result = evaluate(Homing(), Telling([2], [], [1, 3]), episodes=3)
    assert [e.success for e in result.episodes] == [False, False, True]
    assert result.solved == (True, False, True)
    assert result.success_rate == pytest.approx(1 / 3)
    assert result.success_any_rate == pytest.approx(2 / 3)


def test_every_episode_has_a_seed_of_its_own():
    env = Telling([], [], [])
    evaluate(Homing(), env, episodes=3, seed=7)
    assert env.seeds == [stream_seed(7, "eval", index) for index in range(3)]


def test_each_noise_comes_in_turn(point_env, monkeypatch):
    given = []

    class Recording(Noisy):
        def __init__(self, actor, noise, seed):
            given.append(noise)
            super().__init__(actor, noise, seed)

    monkeypatch.setattr(evaluation, "Noisy", Recording)
    mixed_episodes(Homing(), point_env, each=5, noises=(0.1, 0.2, 0.4))
    assert given == [0.4, 0.1, 0.2, 0.4, 0.1]  # of episodes 5 to 9
