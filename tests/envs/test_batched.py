"""Worlds that are stepped in one call and reset themselves, in either way."""

import gymnasium
import numpy as np
import pytest
import torch

from iqmpc import Trainer
from iqmpc.envs.batched import BatchedVectorEnv
from iqmpc.errors import ConfigError, TaskError
from tests.conftest import PointEnv

N = 3


class Counting:
    """World i counts its steps and ends after 3 + i of them, terminal if i is odd."""

    num_envs = N
    single_observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    single_action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, mode, tensors=False):
        self.metadata = {"autoreset_mode": mode}
        self.mode, self.tensors, self.seeds, self.given = mode, tensors, [], []
        self.obs = np.zeros((N, 2), np.float32)  # the episode, the step in it; written in place
        self.over = np.zeros(N, bool)

    def reset(self, *, seed=None):
        self.seeds.append(seed)
        self.obs[:] = 0
        self.over[:] = False
        return self.told(self.obs), {}

    def step(self, actions):
        self.given.append(actions.copy())
        begin = self.over if self.mode == "NextStep" else np.zeros(N, bool)
        self.obs[:, 1] += 1
        self.obs[begin] = np.stack([self.obs[begin, 0] + 1, np.zeros(begin.sum())], 1)
        self.over = self.obs[:, 1] >= 3 + np.arange(N)
        last, over = self.obs.copy(), self.over
        if self.mode == "SameStep":
            self.obs[over] = np.stack([self.obs[over, 0] + 1, np.zeros(over.sum())], 1)
        odd = np.arange(N) % 2 == 1
        flags = [self.told(over & odd), self.told(over & ~odd)]
        return self.told(self.obs), self.told(last[:, 1]), *flags, {"final_obs": self.told(last)}

    def told(self, array):
        return torch.tensor(array) if self.tensors else array


@pytest.mark.parametrize("tensors", [False, True])
@pytest.mark.parametrize("mode", ["SameStep", "NextStep"])
def test_episodes_are_whole_in_either_way(mode, tensors):
    envs = BatchedVectorEnv(Counting(mode, tensors), "counting", seed=3)
    ended, started = [], []
    for tick in range(16):
        started += [(tick, index) for index in envs.start()]
        assert envs.observations.shape == (N, 2)
        ended += [(tick, e) for e in envs.step(np.full((N, 1), tick / 16, np.float32))]
    assert started[:N] == [(0, 0), (0, 1), (0, 2)]
    assert len({e.observations[0, 0] for _, e in ended}) > 2
    between = 1 if mode == "NextStep" else 0
    for world in range(N):
        length = 3 + world
        own = [(tick, e) for tick, e in ended if len(e.actions) == length]
        assert [tick for tick, _ in own] == [*range(length - 1, 16, length + between)]
        for number, (tick, e) in enumerate(own):
            assert e.observations.tolist() == [[number, step] for step in range(length + 1)]
            assert e.rewards.tolist() == [*range(1, length + 1)]
            assert e.terminated == (world % 2 == 1)
            at = tick + 1 - length
            np.testing.assert_allclose(e.actions[:, 0], np.arange(at, tick + 1) / 16)
    begun = [t for t, i in started if i == 0]
    assert begun == [*range(0, 16, 3 + between)]


@pytest.mark.parametrize("mode", ["SameStep", "NextStep"])
def test_an_episode_that_is_cut_goes_on_as_another(mode):
    said = []
    envs = BatchedVectorEnv(Counting(mode), "counting", episode_length=2, on_message=said.append)
    ended = []
    for _ in range(4):
        envs.start()
        ended += envs.step(np.zeros((N, 1), np.float32))
    assert max(len(e.actions) for e in ended) == 2 and not any(e.terminated for e in ended[:N])
    assert len(said) == 1 and "was cut after task.episode_length=2" in said[0]
    if mode == "SameStep":  # it begins where the other ended
        assert [e.observations[0].tolist() for e in ended if e.observations[0, 1]][0] == [0, 2]


def test_all_are_reset_together_by_a_seed_that_follows_from_the_runs():
    worlds = Counting("SameStep")
    envs = BatchedVectorEnv(worlds, "counting", seed=3)
    envs.start()
    envs.step(np.zeros((2, 1), np.float32))  # the last tick of a run has too many worlds
    assert worlds.given[0].shape == (N, 1) and [len(e.actions) for e in envs.cut()] == [1, 1]
    assert envs.start() == [0, 1, 2] and len(set(worlds.seeds)) == 2
    again = Counting("SameStep")
    continued = BatchedVectorEnv(again, "counting", seed=3)
    continued.started = N
    continued.start()
    assert again.seeds == worlds.seeds[1:]


def broken(**changes):
    worlds = Counting("SameStep")
    for name, value in changes.items():
        setattr(worlds, name, value)
    return worlds


@pytest.mark.parametrize(
    "worlds, said",
    [
        (Counting("Disabled"), "must reset themselves, autoreset_mode SameStep or NextStep, got"),
        (broken(reset=lambda seed: (np.zeros((2, 2)), {})), r"shape \(2, 2\), expected \[3, …\]"),
        (broken(step=lambda a: None), "counting, a step of 3 worlds: step.. gave a NoneType"),
        (
            broken(step=lambda a: (np.full((N, 2), np.nan), *np.zeros((3, N)), {})),
            "counting, episode 0, step 1: the observation is nan at index 0",
        ),
        (
            broken(
                step=lambda a: (np.zeros((N, 2)), np.zeros(N), np.ones(N, bool), np.ones(N), {})
            ),
            r"its last observation is in neither info\['final_obs'\] nor info\['final_observation",
        ),
    ],
)
def test_what_worlds_must_not_give_is_named(worlds, said):
    with pytest.raises(TaskError, match=said):
        envs = BatchedVectorEnv(worlds, "counting")
        envs.start()
        envs.step(np.zeros((N, 1), np.float32))


def test_a_run_learns_from_gymnasiums_own(tmp_path, three, point_demonstrations):
    """Whose way of resetting is another in each version."""
    worlds = gymnasium.vector.SyncVectorEnv([PointEnv] * 3)
    config = three.replace({"train.loggers": ["csv"], "train.steps": 200})
    given = config, worlds, point_demonstrations
    trainer = Trainer(*given, run=tmp_path / "run", eval_env=PointEnv())
    ended = []
    step = trainer.envs.step
    trainer.envs.step = lambda actions: ended.extend(found := step(actions)) or found
    assert trainer.train()["env_steps"] == 200
    assert len(ended) >= 6 and {len(e.actions) for e in ended[:6]} == {20}
    for e in ended:  # what was observed followed from what was done
        moved = np.clip(e.observations[:-1] + 0.2 * e.actions, -2, 2)
        np.testing.assert_allclose(e.observations[1:], moved, atol=1e-5)
    assert len({tuple(e.observations[0]) for e in ended}) == len(ended)
    more = config.replace({"train.steps": 260})
    resumed = Trainer(more, *given[1:], run=tmp_path / "run", eval_env=PointEnv(), resume=True)
    assert resumed.train()["env_steps"] == 260


@pytest.mark.parametrize(
    "changes, eval_env, said",
    [
        ({"train.num_envs": 2}, PointEnv(), "train.num_envs=2 needs 2 worlds, got 3"),
        ({"train.env_workers": True}, PointEnv(), "train.env_workers must be left alone with wor"),
        ({}, None, "worlds that are stepped together need an eval_env"),
    ],
)
def test_settings_that_do_not_fit(three, tmp_path, changes, eval_env, said):
    worlds = gymnasium.vector.SyncVectorEnv([PointEnv] * 3)
    with pytest.raises(ConfigError, match=said):
        Trainer(three.replace(changes), worlds, run=tmp_path / "run", eval_env=eval_env)


PENDULUM = """
<mujoco><option timestep="0.02"/><worldbody><body><joint name="j" type="hinge" axis="0 1 0"/>
<geom type="capsule" fromto="0 0 0 0 0 -0.5" size="0.02"/></body></worldbody>
<actuator><motor joint="j" gear="1"/></actuator></mujoco>
"""


class Pendulums:
    """Worlds of MuJoCo, all of them stepped by one call of `mujoco.rollout`."""

    single_observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    single_action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)
    metadata = {"autoreset_mode": "NextStep"}

    def __init__(self, count, length=10):
        import mujoco

        self.num_envs, self.length = count, length
        self.model = mujoco.MjModel.from_xml_string(PENDULUM)
        self.data = mujoco.MjData(self.model)

    def reset(self, *, seed=None):
        self.random, self.steps = np.random.default_rng(seed), np.zeros(self.num_envs, int)
        self.state = self.begin(self.num_envs)
        return self.state[:, 1:], {}

    def begin(self, count):  # time, angle, velocity
        return np.column_stack([np.zeros(count), self.random.uniform(-1, 1, (count, 2))])

    def step(self, actions):
        from mujoco import rollout

        over = self.steps == self.length
        control = np.asarray(actions, np.float64)[:, None, :]
        states, _ = rollout.rollout(self.model, self.data, self.state, control)
        self.state = states[:, -1].copy()
        self.state[over], self.steps = self.begin(over.sum()), np.where(over, 0, self.steps + 1)
        none = np.zeros(self.num_envs, bool)
        return self.state[:, 1:], self.state[:, 1], none, self.steps == self.length, {}


def test_mujocos_rollout_steps_all_worlds():
    mujoco = pytest.importorskip("mujoco")
    worlds = Pendulums(4)
    envs = BatchedVectorEnv(worlds, "pendulums", seed=1)
    actions = np.linspace(-1, 1, 4, dtype=np.float32)[:, None]
    ended = []
    for _ in range(25):
        envs.start()
        ended += envs.step(actions)
    assert [len(e.actions) for e in ended] == [10] * 8  # 11 ticks for each ten steps
    data = mujoco.MjData(worlds.model)
    for index, e in enumerate(ended):  # as the simulator alone has it
        mujoco.mj_resetData(worlds.model, data)
        data.qpos[0], data.qvel[0] = e.observations[0]
        data.ctrl[0] = actions[index % 4, 0]
        for row in e.observations[1:]:
            mujoco.mj_step(worlds.model, data)
            np.testing.assert_allclose(row, [data.qpos[0], data.qvel[0]], atol=1e-4)
