"""ManiSkill's trajectories; one file by its own recorder, the others by hand from its layout."""

import sys
import types

import gymnasium
import h5py
import numpy as np
import pytest

from iqmpc.demos import Demonstrations, Facts
from iqmpc.demos.checks import find_defects
from iqmpc.demos.formats import read


@pytest.fixture
def path(tmp_path, demos, write_format):
    return write_format("maniskill", tmp_path, demos)


class Arm(gymnasium.Env):
    """What ManiSkill2's recorder asks of an environment; five steps, solved at the last."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (4,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    control_mode = "pd_ee_delta_pos"

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.np_random.normal(size=4).astype(np.float32), {}

    def step(self, action):
        self.steps += 1
        done = self.steps >= 5
        obs = self.np_random.normal(size=4).astype(np.float32)
        return obs, 1.0, False, done, {"success": done}

    def get_state(self):
        return np.zeros(3, np.float32)


def test_what_maniskills_own_recorder_writes(tmp_path, monkeypatch):
    pytest.importorskip("mani_skill2")
    # Its environments need Vulkan; the recorder only asks whether this is one of its soft bodies.
    soft = types.ModuleType("mani_skill2.envs.mpm.base_env")
    soft.MPMBaseEnv = type("MPMBaseEnv", (), {})
    for name in ("mani_skill2.envs", "mani_skill2.envs.mpm"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, soft.__name__, soft)
    from mani_skill2.utils.wrappers.record import RecordEpisode

    spec = gymnasium.envs.registration.EnvSpec("ArmCube-v0", entry_point=Arm)
    env = RecordEpisode(
        gymnasium.make(spec, disable_env_checker=True),
        tmp_path,
        trajectory_name="trajectory",
        save_video=False,
    )
    seen, actions = [], []
    for seed in range(2):
        seen.append([env.reset(seed=seed)[0]])
        done = False
        while not done:
            actions.append(env.action_space.sample())
            obs, _, _, done, _ = env.step(actions[-1])
            seen[-1].append(obs)
    env.close()
    found = Demonstrations.load(tmp_path / "trajectory.h5")
    assert found.task == "ArmCube-v0" and len(found) == 2 and found.success_rate == 1.0
    for rows, episode in zip(seen, found.episodes, strict=True):
        np.testing.assert_array_equal(episode.observations, np.array(rows))
        assert episode.terminated is False
    np.testing.assert_array_equal(
        np.concatenate([e.actions for e in found.episodes]), np.array(actions)
    )


def test_nested_members_success_and_notes(path, demos):
    found = Demonstrations.load(path)
    for one, other in zip(demos.episodes, found.episodes, strict=True):
        np.testing.assert_array_equal(other.observations, one.observations)
        np.testing.assert_array_equal(other.actions, one.actions)
        np.testing.assert_array_equal(other.rewards, one.rewards)
        assert other.success is True and other.terminated is False
    assert found.provenance["control_mode"] == "pd_ee_delta_pos"
    chosen = Demonstrations.load(path, facts=Facts(obs_keys=("extra", "agent/qpos")))
    np.testing.assert_array_equal(
        chosen.episodes[0].observations, demos.episodes[0].observations[:, [2, 0, 1]]
    )


def test_success_and_termination_are_those_of_the_last_step(path):
    with h5py.File(path, "a") as file:
        steps = len(file["traj_0/actions"])
        del file["traj_0/success"]
        file["traj_0/success"] = np.arange(steps) == 1
        for name in file:
            file[name]["terminated"] = np.arange(len(file[name]["actions"])) == 3
    episodes = Demonstrations.load(path).episodes
    assert [e.success for e in episodes] == [False, True, True]
    assert [e.terminated for e in episodes] == [True, False, False]


def test_trajectories_without_observations_say_how_to_get_them(path):
    with h5py.File(path, "a") as file:
        for name in file:
            del file[name]["obs"]
    found = [str(d).removeprefix(str(path)) for d in find_defects(read(path))]
    assert len(found) == 3 and found[0].startswith(
        ", episode 0, obs: found nothing, expected observations: replay the trajectories with"
    )


def test_without_its_description_the_task_is_asked_for(path):
    path.with_suffix(".json").unlink()
    (defect,) = find_defects(read(path))
    assert str(defect) == f"{path}, task: found nothing, expected the task's name"
    assert Demonstrations.load(path, task="lift-cube").task == "lift-cube"


def test_a_listed_member_that_is_not_there_is_a_defect(path, monkeypatch):
    """As a damaged file's listing has one."""
    from iqmpc.demos.formats import safe_hdf5

    numbered = safe_hdf5.numbered
    monkeypatch.setattr(
        safe_hdf5, "numbered", lambda group, prefix: [*numbered(group, prefix), "traj_77"]
    )
    found = [str(d) for d in find_defects(read(path))]
    assert any("traj_77: found nothing" in defect for defect in found)
