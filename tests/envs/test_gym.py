import sys
import textwrap

import gymnasium
import numpy as np
import pytest

from iqmpc import compose, make_env
from iqmpc.config import TaskConfig
from iqmpc.envs import check_spaces
from iqmpc.envs.gym import ControlEnv
from iqmpc.errors import ConfigError, TaskError
from iqmpc.observation import ObservationSpec


def task(env_id, **settings):
    known = {"name": "gym", "suite": "gym", "episode_length": 1000, "action_repeat": 1}
    return TaskConfig(env_id=env_id, **(known | settings))


@pytest.fixture
def module(tmp_path, monkeypatch):
    """`module:function` paths of a package that somebody else wrote."""
    (tmp_path / "somebodys_envs.py").write_text(
        textwrap.dedent("""
        import gymnasium
        import numpy as np
        from gymnasium.spaces import Box, Dict

        class Reach(gymnasium.Env):
            observation_space = Dict({"b": Box(-1, 1, (2,), np.float64),
                                      "a": Box(-1, 1, (1,), np.float64)})
            action_space = Box(np.array([0.0, -4.0]), np.array([1.0, 4.0]), dtype=np.float64)

            def __init__(self, render_mode=None):
                self.render_mode = render_mode

            def reset(self, *, seed=None, options=None):
                super().reset(seed=seed)
                self.steps = 0
                return self.observe(), {}

            def observe(self):
                return {"b": np.full(2, 0.25), "a": np.full(1, self.steps / 10)}

            def step(self, action):
                self.steps, self.action = self.steps + 1, action
                return self.observe(), 1.0, self.steps >= 5, False, {"is_success": True}

        class Unbounded(Reach):
            action_space = Box(-np.inf, np.inf, (2,))

        class Pixels(Reach):
            observation_space = Box(0, 255, (90, 60, 1), np.uint8)

            def observe(self):
                image = np.full((90, 60, 1), 100, np.uint8)
                image[:45] += np.uint8(10 * self.steps)
                return image

        class Depths(Reach):
            observation_space = Box(0, 255, (8, 8, 2), np.uint8)

        reach, unbounded, pixels, depths = Reach, Unbounded, Pixels, Depths
        number = lambda: 3
    """)
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield "somebodys_envs"
    sys.modules.pop("somebodys_envs", None)


def test_a_registered_environment():
    env = make_env(task("Pendulum-v1"), seed=3)
    assert check_spaces(env, "pendulum") == (ObservationSpec((3,)), 1)
    runs = []
    for seed in (5, 6, 5):
        rows, steps, ended = [env.reset(seed=seed)[0]], 0, False
        while not ended:
            obs, reward, terminated, truncated, _ = env.step(np.ones(1, np.float32))
            assert env.observation_space.contains(obs) and isinstance(reward, float)
            assert env.unwrapped.last_u == 2  # the whole range
            rows.append(obs)
            steps, ended = steps + 1, terminated or truncated
        assert steps == 200 and truncated and not terminated  # its own limit
        runs.append(np.array(rows))
    np.testing.assert_array_equal(runs[0], runs[2])
    assert not np.array_equal(runs[0], runs[1])


def test_the_first_reset_uses_the_seed():
    first, again, other = (make_env(task("Pendulum-v1"), seed=s).reset()[0] for s in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_our_limit_on_control_steps_holds_too():
    env = make_env(task("Pendulum-v1", episode_length=7, action_repeat=2))
    env.reset(seed=0)
    flags = [env.step(np.zeros(1))[2:4] for _ in range(7)]
    assert flags == [(False, False)] * 6 + [(False, True)]


@pytest.mark.parametrize("env_id", ["HalfCheetah-v4", "HalfCheetah-v5"])
def test_mujoco(env_id):
    if env_id not in gymnasium.registry:
        pytest.skip(f"gymnasium {gymnasium.__version__} has no {env_id}")
    env = make_env(task(env_id))
    assert check_spaces(env, env_id) == (ObservationSpec((17,)), 6)
    env.reset(seed=0)
    assert np.isfinite(env.step(np.ones(6))[0]).all()


def test_an_entry_point_with_a_dictionary_of_observations(module):
    env = make_env(task(f"{module}:reach", action_repeat=2))
    assert check_spaces(env, "reach") == (ObservationSpec((3,)), 2)
    obs, _ = env.reset(seed=0)
    np.testing.assert_array_equal(obs, np.float32([0, 0.25, 0.25]))  # in the order of the keys
    obs, reward, terminated, truncated, info = env.step(np.array([0.5, -1.0]))
    np.testing.assert_allclose(env.unwrapped.action, [0.75, -4.0])
    assert (reward, terminated, truncated) == (2.0, False, False)
    assert info["success"] is True
    env.step(np.zeros(2))
    _, reward, terminated, truncated, _ = env.step(np.zeros(2))
    assert (reward, terminated, truncated) == (1.0, True, False)  # ended before its repeat
    assert make_env(task(f"{module}:reach"), render_mode="rgb_array").render_mode == "rgb_array"


def test_images_are_resized_and_stacked(module):
    env = make_env(task(f"{module}:pixels", action_repeat=2))
    assert check_spaces(env, "pixels") == (ObservationSpec((3, 64, 64)), 2)
    first, _ = env.reset(seed=0)
    assert env.observation_space.contains(first) and np.all(first == 100)
    second = env.step(np.zeros(2))[0]
    third = env.step(np.zeros(2))[0]
    np.testing.assert_array_equal(second[:2], first[:2])
    np.testing.assert_array_equal(third[:2], second[1:])
    assert np.all(third[2, :30] == 140) and np.all(third[2, 34:] == 100)
    with pytest.raises(TaskError, match="obs=pixels needs an environment that observes images"):
        make_env(task(f"{module}:reach", obs="pixels"))


@pytest.mark.parametrize(
    ("env_id", "message"),
    [
        ("Pendulm-v1", "gymnasium makes no 'Pendulm-v1'.*did you mean 'Pendulum-v1'"),
        ("nowhere:reach", "nowhere:reach cannot be imported: No module named 'nowhere'"),
        ("nowhere:Reach-v0", "nowhere:Reach-v0 cannot be imported: No module named 'nowhere'"),
        ("somebodys_envs:walk", "somebodys_envs:walk: the module has no 'walk'"),
        ("somebodys_envs:number", "must return a gymnasium.Env, got int"),
        ("somebodys_envs:unbounded", "the action space must be bounded, got Box"),
        (
            "somebodys_envs:depths",
            r"observation space must be a flat Box .*, got Box\(0, 255, \(8, 8",
        ),
        (
            "CartPole-v1",
            r"gym-cartpole-v1: the action space must be a flat Box .*, got Discrete\(2\)",
        ),
        (None, "suite 'gym' needs task.env_id"),
    ],
)
def test_what_cannot_be_made_is_named(module, env_id, message):
    with pytest.raises(TaskError, match=message):
        make_env(task(env_id))


def test_a_wrong_action_is_named():
    env = make_env(task("Pendulum-v1"))
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"action must have shape \(1,\), got \(2,\)"):
        env.step(np.zeros(2))


def test_the_command_line_names_the_task_after_the_environment():
    config = compose(["task=gym", "env_id=HalfCheetah-v4"])
    assert config.task.env_id == "HalfCheetah-v4" and config.task.name == "gym-halfcheetah-v4"
    assert compose(["task=gym", "env_id=Pendulum-v1", "task.name=mine"]).task.name == "mine"


@pytest.mark.parametrize("p", [0.3, 1.0])
def test_transition_noise_replaces_actions(p):
    env = make_env("walker-walk", transition_noise=p, episode_length=400)
    given = np.full(6, 0.123, np.float32)
    runs = []
    for seed in (1, 1, 2):
        rows = [env.reset(seed=seed)[0]]
        replaced = []
        for _ in range(400):
            obs, _, _, _, info = env.step(given)
            rows.append(obs)
            replaced.append(info["replaced"])
        runs.append((np.array(rows), replaced))
    assert abs(np.mean(runs[0][1]) - p) < 0.1
    np.testing.assert_array_equal(runs[0][0], runs[1][0])
    assert not np.array_equal(runs[0][0], runs[2][0])
    plain = make_env("walker-walk", episode_length=400)
    rows = [plain.reset(seed=1)[0], *(plain.step(given)[0] for _ in range(400))]
    first = runs[0][1].index(True)  # alike up to the first replaced action, and not after it
    np.testing.assert_array_equal(np.array(rows)[: first + 1], runs[0][0][: first + 1])
    assert not np.array_equal(rows[first + 1], runs[0][0][first + 1])


def test_transition_noise_is_a_probability():
    with pytest.raises(ConfigError, match=r"task.transition_noise must lie in \[0, 1\], got 1.5"):
        compose(["task.transition_noise=1.5"])


class Nested(gymnasium.Env):
    """Declared in another order than the sorted one, at both levels, with a camera."""

    observation_space = gymnasium.spaces.Dict(
        [
            ("velocity", gymnasium.spaces.Box(-9, 9, (2,), np.float64)),
            (
                "agent",
                gymnasium.spaces.Dict(
                    [
                        ("tip", gymnasium.spaces.Box(-9, 9, (1,), np.float64)),
                        ("joint", gymnasium.spaces.Box(-9, 9, (1,), np.float64)),
                    ]
                ),
            ),
        ]
    )
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.observe(), {}

    def observe(self):
        return {
            "velocity": np.full(2, 3.0 + self.steps),
            "agent": {"tip": np.full(1, 2.0), "joint": np.full(1, 1.0)},
        }

    def step(self, action):
        self.steps += 1
        return self.observe(), 1.0, False, self.steps >= 4, {}


class Camera(Nested):
    observation_space = gymnasium.spaces.Dict(
        {
            "state": gymnasium.spaces.Box(-9, 9, (3,), np.float32),
            "camera": gymnasium.spaces.Box(0, 255, (64, 64, 3), np.uint8),
        }
    )

    def observe(self):
        return {"state": np.zeros(3, np.float32), "camera": np.full((64, 64, 3), 7, np.uint8)}


def test_a_dictionary_has_the_order_of_its_demonstrations(tmp_path):
    """Recorded by Minari from the environment as it was declared."""
    minari = pytest.importorskip("minari")
    from minari.data_collector import EpisodeBuffer
    from minari.dataset.minari_storage import MinariStorage

    from iqmpc import Demonstrations
    from iqmpc.demos import Facts

    assert minari.__version__
    env = Nested()
    rows = [env.reset()[0]] + [env.step(np.zeros(1))[0] for _ in range(4)]
    (tmp_path / "data").mkdir()
    storage = MinariStorage.new(
        tmp_path / "data",
        observation_space=env.observation_space,
        action_space=env.action_space,
        env_spec=gymnasium.envs.registration.EnvSpec("Nested-v0", entry_point="module:Env"),
    )
    storage.update_episodes(
        [
            EpisodeBuffer(
                id=None,
                seed=0,
                observations={
                    "velocity": np.array([r["velocity"] for r in rows]),
                    "agent": {k: np.array([r["agent"][k] for r in rows]) for k in ("tip", "joint")},
                },
                actions=np.zeros((4, 1), np.float32),
                rewards=[1.0] * 4,
                terminations=[False] * 4,
                truncations=[False] * 3 + [True],
                infos={},
            )
        ]
    )
    controlled = ControlEnv(Nested(), task("Nested-v0"))
    observed = [controlled.reset()[0]] + [controlled.step(np.zeros(1))[0] for _ in range(4)]
    assert observed[0].tolist() == [1, 2, 3, 3]
    demos = Demonstrations.load(tmp_path, task="gym-nested-v0")
    np.testing.assert_array_equal(demos.episodes[0].observations, observed)

    keys = "velocity,agent/tip"
    controlled = ControlEnv(Nested(), task("Nested-v0", obs_keys=keys))
    assert controlled.reset()[0].tolist() == [3, 3, 2]
    demos = Demonstrations.load(tmp_path, facts=Facts(obs_keys=tuple(keys.split(","))))
    assert demos.episodes[0].observations[0].tolist() == [3, 3, 2]


def test_an_image_among_others_is_named_and_can_be_left_out():
    with pytest.raises(
        TaskError,
        match=r"gym-x: the observation's 'camera' is an image, .*choose "
        r"the members to observe, task.obs_keys=state$",
    ):
        ControlEnv(Camera(), task("x"))
    env = ControlEnv(Camera(), task("x", obs_keys="state"))
    assert env.reset()[0].shape == env.observation_space.shape == (3,)
    env = ControlEnv(Camera(), task("x", obs_keys="camera"))
    assert env.reset()[0].dtype == np.uint8 and env.observation_space.shape == (64, 64, 3)
    with pytest.raises(TaskError, match=r"has no 'hand' \(it has: camera, state\)"):
        ControlEnv(Camera(), task("x", obs_keys="state,hand"))
    with pytest.raises(TaskError, match="chooses from a dictionary of observations"):
        ControlEnv(gymnasium.make("Pendulum-v1"), task("x", obs_keys="state"))
    with pytest.raises(TaskError, match=r"wrap it: iqmpc.envs.gym.FlatObservation\(env\)"):
        check_spaces(Nested(), "nested")


def test_functions_that_cannot_be_called_are_named(module, monkeypatch):
    import somebodys_envs

    somebodys_envs.fixed = lambda: gymnasium.make("Pendulum-v1")
    somebodys_envs.needs = lambda size: None
    somebodys_envs.number = 3
    for name, options, said in (
        (
            "fixed",
            {"render_mode": "rgb_array"},
            "that can be called with render_mode='rgb_array': got an unexpected",
        ),
        ("needs", {}, "that can be called without arguments: missing a required"),
        ("number", {}, "must be a function that makes an environment, got a int"),
    ):
        with pytest.raises(TaskError, match=f"somebodys_envs:{name} .*{said}"):
            make_env(task(f"somebodys_envs:{name}"), **options)


class Ending(gymnasium.Env):
    """A terminal state at step 2; two answers to whether it is solved."""

    observation_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        self.steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.steps += 1
        info = {"success": False, "is_success": True}
        return np.zeros(1, np.float32), 1.0, self.steps == 2, False, info


@pytest.mark.parametrize(("terminates", "ends"), [(True, [2]), (False, [5])])
def test_terminal_states_end_an_episode_where_the_task_has_them(terminates, ends):
    env = ControlEnv(Ending(), task("ending", episode_length=5), terminates=terminates)
    env.reset()
    flags = [env.step(np.zeros(1))[2:4] for _ in range(ends[0])]
    assert flags[:-1] == [(False, False)] * (ends[0] - 1)
    assert flags[-1] == (terminates, not terminates)


def test_what_says_success_by_that_name_counts_first():
    env = ControlEnv(Ending(), task("ending"))
    env.reset()
    assert env.step(np.zeros(1))[4]["success"] is False
