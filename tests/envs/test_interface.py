"""What an environment must not give is an error by name, on every path to an environment."""

import functools
import sys

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from iqmpc import Agent, Config, WorldModel, evaluate
from iqmpc.demonstrators import Demonstrator, record
from iqmpc.envs import interface
from iqmpc.envs.gym import ControlEnv
from iqmpc.envs.vector import VectorEnv
from iqmpc.envs.workers import WorkerVectorEnv
from iqmpc.errors import TaskError, WorkerError

pytestmark = pytest.mark.timeout(120)


class Odd(gymnasium.Env):
    """Three numbers, of episodes of `length` steps; `change(observation or step's tuple)` is what
    it gives from step `when` on (0: at the reset)."""

    observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, change=None, when=2, length=4):
        self.change, self.when, self.length = change, when, length

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        result = np.zeros(3, np.float32), {}
        return self.change(result) if self.change and not self.when else result

    def step(self, action):
        self.steps += 1
        result = (np.full(3, self.steps, np.float32), 1.0, False, self.steps >= self.length, {})
        return self.change(result) if self.change and self.steps == self.when else result


def observing(value, result):
    obs = result[0].copy()
    obs[1] = value
    return (obs, *result[1:])


def first(value, result):
    return (value, *result[1:])


def rewarding(value, result):
    return (result[0], value, *result[2:])


def part(items, result):
    return result[items]


def only(index, result):
    return result[index]


FAULTS = {
    "nan": (
        functools.partial(observing, np.nan),
        r"the observation is nan at index 1, expected a finite value within ±1e\+12",
    ),
    "inf": (functools.partial(observing, -np.inf), "the observation is -inf at index 1"),
    "huge": (functools.partial(observing, 1e30), r"the observation is 1e\+30 at index 1"),
    "float64 beyond float32": (
        functools.partial(first, np.array([0, 1e300, 0])),
        "the observation is inf at index 1",
    ),
    "shape": (
        functools.partial(first, np.zeros(4, np.float32)),
        r"the observation has shape \(4,\), its space \(3,\)",
    ),
    "text": (functools.partial(first, "abc"), "the observation is a str of no numbers"),
    "nothing": (functools.partial(first, None), "the observation is a NoneType of no numbers"),
    "dictionary": (functools.partial(first, {"a": 1}), "the observation is a dictionary of a"),
    "reward": (functools.partial(rewarding, np.nan), "the reward is nan"),
    "rewards": (
        functools.partial(rewarding, np.ones(2)),
        r"the reward is a ndarray of shape \(2,\), expected a number",
    ),
    "no reward": (functools.partial(rewarding, None), "the reward is a NoneType"),
    "old step": (
        functools.partial(part, slice(1, None)),
        r"step\(\) gave a tuple of 4, gymnasium's interface wants "
        r"\(observation, reward, terminated, truncated, info\)",
    ),
    "no tuple": (functools.partial(only, 0), r"step\(\) gave a ndarray, gymnasium's"),
    "no info": (lambda result: (*result[:4], None), r"step\(\) gave a NoneType for info"),
    "a tensor with a gradient": (
        functools.partial(first, torch.zeros(3, requires_grad=True)),
        "the observation is a Tensor of no numbers",
    ),
    "a reward with a gradient": (
        functools.partial(rewarding, torch.zeros((), requires_grad=True)),
        "the reward is a Tensor, expected a number",
    ),
    "an end of the program": (lambda result: sys.exit(0), r"step\(\) asked the program to end"),
    "flag": (lambda result: (*result[:2], "no", *result[3:]), "terminated is a str, expected true"),
}
RESETS = {
    "old reset": (
        functools.partial(only, 0),
        r"reset\(\) gave a ndarray, gymnasium's interface "
        r"wants \(observation, info\)",
    ),
    "nan": (functools.partial(observing, np.nan), "the observation is nan at index 1"),
}


def agent(length=4):
    config = Config.from_dict(
        {
            "task": {"name": "odd", "episode_length": length},
            "model": {"encoder_dim": 16, "hidden_dim": 16, "latent_dim": 16},
            "planner": {"enabled": False},
        }
    )
    return Agent(WorldModel(3, 2, config.model), config)


def in_vector(env):
    envs = VectorEnv([env], "odd")
    for _ in range(3):
        envs.start()
        envs.step(np.zeros((1, 2), np.float32))


def in_evaluation(env):
    evaluate(agent(), env, episodes=1)


class Zero:
    def reset(self, env):
        pass

    def __call__(self, obs):
        obs -= 1  # its own copy
        return np.zeros(2)


def in_recording(env):
    record(Demonstrator(Zero()), env, task="odd", episodes=1, max_tries=1)


def in_control(env):
    in_vector(ControlEnv(env, agent().config.replace({"task.action_repeat": 1}).task))


PATHS = {
    "VectorEnv": (in_vector, "odd, episode 0, "),
    "evaluate": (in_evaluation, "odd, evaluation episode 0: "),
    "record": (in_recording, "odd, recorded episode 0: "),
    "task=gym": (in_control, "odd, episode 0, "),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_step_that_cannot_be_used(fault, path):
    change, said = FAULTS[fault]
    go, place = PATHS[path]
    with pytest.raises(TaskError, match=f"^{place}step 2: {said}"):
        go(Odd(change))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("fault", RESETS)
def test_a_reset_that_cannot_be_used(fault, path):
    change, said = RESETS[fault]
    go, place = PATHS[path]
    with pytest.raises(TaskError, match=f"^{place}its reset: {said}"):
        go(Odd(change, when=0))


def test_the_last_row_of_an_episode_is_looked_at_too():
    envs = VectorEnv([Odd(FAULTS["nan"][0], when=4)], "odd")
    envs.start()
    for _ in range(3):
        assert not envs.step(np.zeros((1, 2), np.float32))
    with pytest.raises(TaskError, match="odd, episode 0, step 4: the observation is nan"):
        envs.step(np.zeros((1, 2), np.float32))


def test_a_worker_whose_environment_gives_nan_is_replaced():
    messages = []
    make = functools.partial(Odd, FAULTS["nan"][0])
    envs = WorkerVectorEnv([make], "odd", like=Odd(), on_message=messages.append, max_restarts=1)
    try:
        envs.start()
        for _ in range(2):
            envs.step(np.zeros((1, 2), np.float32))
        assert envs.restarts == 1 and "Traceback" not in messages[0]
        assert "failed: the observation is nan at index 1" in messages[0]
        assert "(odd, episode 0, step 2)" in messages[0]
        assert "unfinished episode of 1 steps dropped" in messages[0]
        envs.start()
        with pytest.raises(WorkerError, match=r"\(odd, episode 1, step 2\)"):
            for _ in range(2):
                envs.step(np.zeros((1, 2), np.float32))
    finally:
        envs.close()


def test_wrappers_of_gymnasium_that_meet_the_old_interface():
    env = gymnasium.wrappers.TimeLimit(Odd(functools.partial(part, slice(1, None))), 10)
    with pytest.raises(TaskError, match=r"step\(\) does not give what gymnasium's interface wants"):
        in_vector(env)

    def own(result):
        raise ValueError("a fault of the simulator's own")

    with pytest.raises(ValueError, match="own"):  # with its traceback
        in_vector(Odd(own))


class InPlace(Odd):
    """Changes the action that it is given; its reward is an array of one."""

    def step(self, action):
        action *= 100
        obs, _, *rest, info = super().step(action)
        return obs, np.ones(1), *rest, {**info, "is_success": np.array([self.steps == 3])}


def test_an_action_that_is_changed_in_place_is_recorded_as_it_was_sent():
    for envs in (VectorEnv([InPlace()], "odd"), WorkerVectorEnv([InPlace], "odd", like=Odd())):
        envs.start()
        actions = np.full((1, 2), 0.5, np.float32)
        episodes = [e for _ in range(4) for e in envs.step(actions)]
        envs.close()
        assert np.array(episodes[0].actions).tolist() == [[0.5, 0.5]] * 4
        assert episodes[0].rewards.tolist() == [1.0] * 4
    result = evaluate(agent(), InPlace(), episodes=1)
    assert np.abs(result.episodes[0].actions).max() <= 1
    assert result.episodes[0].rewards.shape == (4,)
    assert result.success_rate == 0 and result.success_any_rate == 1
    repeated = ControlEnv(InPlace(), agent().config.replace({"task.action_repeat": 2}).task)
    repeated.reset(seed=0)
    action = np.full(2, 0.5, np.float32)
    repeated.step(action)
    assert action.tolist() == [0.5, 0.5]


class NoSeed(Odd):
    """As an environment of the older gym is."""

    def reset(self):
        return super().reset()


@pytest.mark.parametrize("path", PATHS)
def test_a_reset_that_takes_no_seed(path):
    go, place = PATHS[path]
    said = r"reset\(\) cannot be called as gymnasium's interface has it, reset\(\*, seed=None, "
    with pytest.raises(TaskError, match=f"^{place}its reset: {said}"):
        go(NoSeed())


def telling(value, result):
    return (*result[:4], {"success": value})


@pytest.mark.parametrize(
    ("value", "rate"),
    [
        (True, 1.0),
        (np.array([True, False]), 0.0),
        (torch.tensor(True), 1.0),
        (1.0, 1.0),
        (None, None),
    ],
)
def test_what_an_environment_says_of_success(value, rate):
    env = Odd(functools.partial(telling, value), when=4)
    assert evaluate(agent(), env, episodes=1).success_rate == rate


@pytest.mark.parametrize("value", [np.nan, "False", [], {"a": 1}])
def test_success_that_is_neither_true_nor_false(value):
    """NaN counted as a success, as did an empty list."""
    env = Odd(functools.partial(telling, value), when=2)
    said = r"odd, evaluation episode 0: step 2: info\['success'\] is .*, expected true or false"
    with pytest.raises(TaskError, match=said):
        evaluate(agent(), env, episodes=1)


def test_an_episode_that_never_ends_is_cut_and_said_once():
    messages = []
    envs = VectorEnv([Odd(length=10**9)] * 1, "odd", episode_length=5, on_message=messages.append)
    lengths = []
    for _ in range(11):
        envs.start()
        lengths += [len(e.actions) for e in envs.step(np.zeros((1, 2), np.float32))]
    assert lengths == [5, 5]
    assert len(messages) == 1 and "cut after task.episode_length=5 steps" in messages[0]
    result = evaluate(agent(6), Odd(length=10**9), episodes=2)
    assert [len(e.actions) for e in result.episodes] == [6, 6]
    kept = record(
        Demonstrator(Zero()),
        Odd(length=10**9),
        task="odd",
        episodes=1,
        max_tries=1,
        episode_length=7,
    )
    assert len(kept.episodes[0].actions) == 7


def test_images_keep_their_type():
    space = spaces.Box(0, 255, (9, 64, 64), np.uint8)
    image = np.full(space.shape, 3, np.uint8)
    copy = interface.observation(image, space)
    image[:] = 4
    assert copy.dtype == np.uint8 and (copy == 3).all()
    with pytest.raises(TaskError, match="the image is float64, its space uint8"):
        interface.observation(image / 255, space)


@pytest.mark.parametrize(
    ("dtype", "shape", "kept"),
    [
        (np.float64, (4,), np.float32),
        (np.uint8, (4,), np.float32),
        (np.uint8, (3, 64, 64), np.uint8),
        (np.uint8, (32, 48, 3), np.uint8),  # not stacked yet
    ],
)
def test_observations_are_copied(dtype, shape, kept):
    obs = np.ones(shape, dtype)
    copy = interface.observation(obs, gymnasium.spaces.Box(0, 255, shape, dtype))
    obs[:] = 0
    assert copy.dtype == kept and np.all(copy == 1)
