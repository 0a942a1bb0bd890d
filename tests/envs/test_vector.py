"""Several environments side by side: whole episodes, seeds of their own, spaces that agree."""

import gymnasium
import numpy as np
import pytest

from iqmpc.envs.vector import VectorEnv
from iqmpc.errors import TaskError
from iqmpc.seeding import stream_seed


class Counter(gymnasium.Env):
    """Observes (its seed, the step) in an array that it writes again; ends after `length`."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self, length, *, terminates=False):
        self.length, self.terminates, self.seeds = length, terminates, []
        self.obs = np.zeros(2, np.float32)

    def reset(self, *, seed=None, options=None):
        self.seeds.append(seed)
        self.obs[:] = seed % 1000, 0
        return self.obs, {}

    def step(self, action):
        self.obs[1] += 1
        ended = bool(self.obs[1] == self.length)
        return (
            self.obs,
            float(action[0]),
            ended and self.terminates,
            ended and not self.terminates,
            {},
        )


def with_space(**spaces):
    env = Counter(3)
    for name, space in spaces.items():
        setattr(env, name, space)
    return env


def test_each_environment_is_in_an_episode_of_its_own():
    members = [Counter(2), Counter(3, terminates=True), Counter(6)]
    envs = VectorEnv(members, "count", seed=7)
    assert (len(envs), envs.observation_spec.shape, envs.action_dim) == (3, (2,), 1)
    started, ended = [], []
    for tick in range(6):
        started.append(envs.start())
        assert envs.observations.shape == (3, 2) and envs.observations.dtype == np.float32
        actions = np.float32([[tick], [10 + tick], [20 + tick]])
        ended += envs.step(actions)
    assert started == [[0, 1, 2], [], [0], [1], [0], []]
    seeds = [stream_seed(7, "train", k) for k in range(6)]
    assert [env.seeds for env in members] == [
        [seeds[0], seeds[3], seeds[5]],
        [seeds[1], seeds[4]],
        [seeds[2]],
    ]
    assert envs.started == 6 and envs.cut() == []
    assert [np.ravel(e.actions).tolist() for e in ended] == [
        [0, 1],
        [10, 11, 12],
        [2, 3],
        [4, 5],
        [13, 14, 15],
        [20, 21, 22, 23, 24, 25],
    ]
    assert [e.terminated for e in ended] == [False, True, False, False, True, False]
    for episode, k in zip(ended, (0, 1, 3, 5, 4, 2), strict=True):
        steps = len(episode.actions)
        assert np.array(episode.observations).tolist() == [
            [seeds[k] % 1000, t] for t in range(steps + 1)
        ]
        assert episode.rewards.tolist() == np.ravel(episode.actions).tolist()


def test_episodes_can_be_cut_and_a_step_can_leave_environments_out():
    envs = VectorEnv([Counter(2), Counter(3), Counter(9)], "count")
    envs.start()
    envs.step(np.zeros((3, 1), np.float32))
    assert len(envs.step(np.zeros((1, 1), np.float32))) == 1
    assert envs.start() == [0]  # has made no step when it is cut
    assert [(len(e.observations), len(e.actions), e.terminated) for e in envs.cut()] == [
        (2, 1, False),
        (2, 1, False),
    ]
    assert envs.start() == [0, 1, 2] and envs.started == 7


def test_nothing_is_stepped_outside_an_episode():
    envs = VectorEnv([Counter(1), Counter(2)], "count")
    with pytest.raises(RuntimeError, match=r"environment 0 is in no episode: call start\(\)"):
        envs.step(np.zeros((2, 1), np.float32))
    envs.start()
    envs.step(np.zeros((2, 1), np.float32))
    with pytest.raises(RuntimeError, match="environment 0 is in no episode"):
        _ = envs.observations


@pytest.mark.parametrize(
    ("spaces", "message"),
    [
        (
            {"observation_space": gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float32)},
            r"count: environment 1 and environment 0 differ in observation_space.shape: "
            r"Box\(-inf, inf, \(3,\), float32\) and Box\(-inf, inf, \(2,\), float32\)",
        ),
        (
            {"observation_space": gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float64)},
            "differ in observation_space.dtype",
        ),
        (
            {"observation_space": gymnasium.spaces.Box(0, np.inf, (2,), np.float32)},
            "differ in observation_space.low",
        ),
        (
            {"action_space": gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)},
            "differ in action_space.shape",
        ),
        (
            {"action_space": gymnasium.spaces.Box(-2.0, 2.0, (1,), np.float32)},
            r"count: environment 1: actions must lie in \[-1, 1\]",
        ),
        (
            {"action_space": gymnasium.spaces.Discrete(2)},
            "environment 1: the action space must be a",
        ),
    ],
)
def test_spaces_must_agree(spaces, message):
    with pytest.raises(TaskError, match=message):
        VectorEnv([Counter(3), with_space(**spaces)], "count")


def test_an_environment_cannot_be_two():
    env = Counter(3)
    with pytest.raises(TaskError, match="each of the 3 environments must be another object"):
        VectorEnv([env, Counter(3), env], "count")
    with pytest.raises(ValueError, match="no environment was given"):
        VectorEnv([], "count")
