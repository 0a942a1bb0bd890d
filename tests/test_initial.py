"""Starting from something: another run's agent, more demonstrations, a person who takes over."""

import re
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch

import iqmpc
from iqmpc import Agent, Demonstrations, Trainer, evaluate, stored_agent
from iqmpc.envs.gym import ControlEnv
from iqmpc.envs.training import training_envs
from iqmpc.episode import EpisodeBuffer
from iqmpc.errors import CheckpointError, ConfigError, TaskError
from iqmpc.export import export
from iqmpc.kernels import layers
from iqmpc.run_folder import RunFolder
from tests.conftest import PointEnv, straight_line
from tests.runs import planned_steps, tensors_of, train

PAGE = Path(__file__).parents[1] / "docs" / "continuing.md"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Makes, once, a run that others start from."""
    path = tmp_path_factory.mktemp("source") / "run"

    def made(config):
        if not path.exists():
            config = config.replace({"agent.average": "evaluation"})
            train(config, PointEnv(), straight_line(PointEnv(), range(5)), path)
        return path

    return made


def trainer_of(config, demonstrations, run, env=None, **options):
    return Trainer(config, env or PointEnv(), demonstrations, run=run, **options)


@pytest.mark.parametrize("exported", [False, True])
def test_a_run_starts_as_the_agent_that_it_is_given(
    tmp_path, small_config, source, point_demonstrations, exported
):
    """Evaluated before anything is learnt, it is that agent; a file gives what its run gives."""
    start = source(small_config)
    expected = evaluate(Agent.load(start), PointEnv(), episodes=3, seed=7).returns
    if exported:
        export(start, tmp_path / "agent.iqmpc")
        start = tmp_path / "agent.iqmpc"
    config = small_config.replace({"init.path": str(start), "agent.average": "always"})
    said = []
    trainer = trainer_of(config, point_demonstrations, tmp_path / "run", on_message=said.append)
    assert f"starting from {start}" in said[0] and "point, 100 steps" in said[0]
    assert evaluate(trainer.agent, PointEnv(), episodes=3, seed=7).returns.tolist() == (
        expected.tolist()
    )
    learner = trainer.learner
    for average, live in zip(learner.averages.tensors(), learner.weights.tensors(), strict=True):
        assert torch.equal(average, live)
    for target, critic in zip(learner.targets, learner.weights.critics, strict=True):
        assert torch.equal(target.weight, critic.weight)
        assert target.weight.data_ptr() != critic.weight.data_ptr()
    assert learner.updates == 0 and trainer.behaviour.slices == 0


def test_its_agent_acts_from_the_first_step(tmp_path, small_config, source, point_demonstrations):
    config = small_config.replace({"init.path": str(source(small_config))})
    trainer = trainer_of(config, point_demonstrations, tmp_path / "run")
    assert planned_steps(trainer) == list(range(100))
    assert trainer.learner.updates == 5 + 60  # begun after the random steps' number, as without
    assert tensors_of(tmp_path / "run")[1]["env_steps"] == 100


def test_the_replay_comes_too_and_a_run_can_go_on(
    tmp_path, small_config, source, point_demonstrations
):
    start = source(small_config)
    config = small_config.replace(
        {"init.path": str(start), "init.replay": True, "train.random_steps": 0, "train.steps": 40}
    )
    trainer = trainer_of(config, point_demonstrations, tmp_path / "run")
    _, held, _ = RunFolder(start).newest()
    assert torch.equal(trainer.behaviour.state_dict()["obs"], held["behaviour.obs"])
    assert len(trainer.behaviour) == 100
    trainer.train()
    assert trainer.learner.updates == 45 and len(trainer.behaviour) == 140
    # A continuation takes its own checkpoint, wherever the run that it started from has gone.
    longer = config.replace({"train.steps": 60, "init.path": "gone"})
    RunFolder(tmp_path / "run").save_config(longer, new=False)
    with pytest.raises(CheckpointError, match="init.path is 'gone', was"):
        trainer_of(longer, point_demonstrations, tmp_path / "run", resume=True)
    longer = config.replace({"train.steps": 60})
    RunFolder(tmp_path / "run").save_config(longer, new=False)
    again = trainer_of(longer, point_demonstrations, tmp_path / "run", resume=True)
    assert len(again.behaviour) == 140 and again.train()["env_steps"] == 60


@pytest.mark.parametrize("before", ["off", "demos"])
@pytest.mark.parametrize("after", ["off", "demos"])
def test_observations_may_be_scaled_before_and_after(
    tmp_path, small_config, point_demonstrations, before, after
):
    """What acts takes them as they are: it is the same, as is the replay but for the scaling."""
    config = small_config.replace({"model.normalise_obs": before, "train.steps": 60})
    train(config, PointEnv(), straight_line(PointEnv(), range(3)), tmp_path / "start")
    config = small_config.replace(
        {
            "model.normalise_obs": after,
            "init.path": str(tmp_path / "start"),
            "init.replay": True,
            "learner.batch": 16,
        }
    )
    trainer = trainer_of(config, point_demonstrations, tmp_path / "run")
    obs = torch.tensor(point_demonstrations.episodes[0].observations)
    one, two = (
        layers.encode(agent.weights, obs)
        for agent in (Agent.load(tmp_path / "start"), trainer.agent)
    )
    torch.testing.assert_close(one, two, rtol=0, atol=1e-5)
    state, first = trainer.behaviour.state_dict(), stored_agent.find(tmp_path / "start")
    scaling = trainer.learner.scaling
    raw = state["obs"] if scaling is None else scaling.inverse()(state["obs"]).float()
    torch.testing.assert_close(raw, first.behaviour()["obs"], rtol=0, atol=1e-5)
    assert raw.abs().max() <= 2.001  # as the point's places are
    trainer.train()


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"init.path": "nowhere"}, CheckpointError, "nowhere is no run folder"),
        ({"init.checkpoint": "7"}, CheckpointError, "has no checkpoint '7': it has 80, 100, best"),
        ({"model.hidden_dim": 16}, ConfigError, "model.hidden_dim is 16, was 32 there"),
        ({"task.terminates": True}, ConfigError, "model.termination is True, was False there"),
        (
            {"init.checkpoint": "best", "init.replay": True},
            CheckpointError,
            "best.safetensors holds weights alone, and no replay",
        ),
        (
            {"init.replay": True, "learner.horizon": 20, "train.capacity": 50},
            ConfigError,
            "does not fit train.capacity=50 and learner.horizon=20: 105 rows do not fit",
        ),
        ({"demos.add": "more.h5", "learner.objective": "td"}, ConfigError, "demos.add needs demo"),
        ({"init.path": None, "init.replay": True}, ConfigError, "need a run to start from"),
    ],
)
def test_what_cannot_be_started_from_is_said(
    tmp_path, small_config, source, point_demonstrations, changes, error, said
):
    with pytest.raises(error, match=said):
        config = small_config.replace({"init.path": str(source(small_config)), **changes})
        trainer_of(config, point_demonstrations, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_of_other_numbers_is_refused(tmp_path, small_config, source, image_point_env):
    """Whose observations are others."""
    config = small_config.replace(
        {"init.path": str(source(small_config)), "learner.objective": "td"}
    )
    with pytest.raises(ConfigError, match=r"observations \[2\] and 2 actions, the environment has"):
        trainer_of(config, None, tmp_path / "run", image_point_env)


def saved(path, seeds):
    straight_line(PointEnv(), seeds).save(path)
    return str(path)


def test_demonstrations_are_added_to_a_run_that_goes_on(
    tmp_path, small_config, point_demonstrations
):
    """Once each, and kept by its checkpoints: the files are not read again."""
    run = tmp_path / "run"
    train(small_config, PointEnv(), point_demonstrations, run)
    steps = point_demonstrations.transitions
    assert not [name for name in tensors_of(run)[0] if name.startswith("experts.")]
    config = small_config
    for length, seeds in ((120, range(20, 22)), (140, range(30, 33))):
        more = saved(tmp_path / f"{length}.h5", seeds)
        config = config.replace({"train.steps": length, "demos.add": more})
        trainer = trainer_of(config, point_demonstrations, run, resume=True)
        steps += 20 * len(seeds)
        assert len(trainer.experts) == steps
        trainer.train()
        assert len(tensors_of(run)[0]["experts.action"]) == steps + steps // 20
        (tmp_path / f"{length}.h5").unlink()
    config = config.replace({"train.steps": 160})
    assert len(trainer_of(config, point_demonstrations, run, resume=True).experts) == steps
    fewer = Demonstrations("point", point_demonstrations.episodes[:5])
    with pytest.raises(CheckpointError, match=r"other demonstrations .* \(demos.add=FILE adds"):
        trainer_of(config, fewer, run, resume=True)


def test_demonstrations_are_added_to_a_new_run_or_none_of_them(
    tmp_path, small_config, point_demonstrations
):
    files = [saved(tmp_path / f"{n}.h5", range(n, n + 2)) for n in (20, 30)]
    config = small_config.replace({"demos.add": ",".join(files)})
    trainer = trainer_of(config, point_demonstrations, tmp_path / "run")
    assert len(trainer.experts) == point_demonstrations.transitions + 80
    assert trainer.demonstrator_return == point_demonstrations.return_mean
    Demonstrations("other", point_demonstrations.episodes).save(files[1])
    with pytest.raises(ValueError, match="found 'other', expected 'point'"):
        trainer_of(config, point_demonstrations, tmp_path / "run")


class TakenOver(PointEnv):
    """A person walks it to the origin in some steps of each episode."""

    def __init__(self, steps=range(5, 12), person=None):
        super().__init__()
        self.taken, self.person = set(steps), person

    def step(self, action):
        if self.steps not in self.taken:
            return super().step(action)
        person = np.clip(-self.position / 0.2, -1, 1) if self.person is None else self.person
        obs, reward, terminated, truncated, info = super().step(np.zeros(2))
        if self.person is None:
            self.position = np.clip(self.position + 0.2 * person, -2, 2).astype(np.float32)
            obs = self.position.copy()
        return obs, reward, terminated, truncated, {**info, "intervene_action": person}


@pytest.mark.parametrize("count", [1, 2])
def test_what_a_person_does_is_demonstrated(tmp_path, small_config, point_demonstrations, count):
    """It stands in the replay of behaviour as it was acted, and among the demonstrations."""
    run, said = tmp_path / "run", []
    # A stretch of 7 steps, and one of 2, which is shorter than learner.horizon.
    envs = [TakenOver([*range(5, 12), 18, 19]) for _ in range(count)]
    config = small_config.replace({"train.num_envs": count, "train.steps": 80})

    def made(config, **options):
        return trainer_of(config, point_demonstrations, run, envs, eval_env=PointEnv(), **options)

    trainer = made(config, on_message=said.append)
    trainer.train()
    message = "a person acted in 9 steps, of which 7 are demonstrations now"
    assert said.count(message + " (stretches of 3 or more)") == 4
    state, behaviour = trainer.experts.state_dict(), trainer.behaviour.state_dict()
    stretches = state["episodes"].tolist()[len(point_demonstrations) :]
    assert [length for _, length in stretches] == [7] * 4
    for (first, _), (start, _) in zip(stretches, behaviour["episodes"].tolist(), strict=True):
        for name, length in (("obs", 8), ("action", 7)):
            demonstrated = state[name][first : first + length]
            assert torch.equal(demonstrated, behaviour[name][start + 5 : start + 5 + length])
        toward = torch.clamp(-state["obs"][first : first + 7] / 0.2, -1, 1)
        assert torch.allclose(state["action"][first : first + 7], toward, atol=1e-6)
    # And is there again in a run that goes on.
    again = made(config.replace({"train.steps": 120}), resume=True)
    assert len(again.experts) == point_demonstrations.transitions + 28


@pytest.mark.skipif(not PAGE.exists(), reason="the documentation is not beside the tests")
def test_the_wrapper_and_the_batch_of_the_page(tmp_path, small_config, point_demonstrations):
    wrapper, batch = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    names = {"gymnasium": gymnasium, "np": np, "iqmpc": iqmpc, "run": tmp_path / "run"}
    exec(compile(wrapper, PAGE.name, "exec"), names)
    point = PointEnv()
    env = names["TakeOver"](point, lambda obs: -obs if point.steps < 4 else None)
    trainer = trainer_of(small_config, point_demonstrations, tmp_path / "run", env)
    trainer.train()  # 5 episodes, evaluated in the same environment
    assert len(trainer.experts) == point_demonstrations.transitions + 5 * 4
    exec(compile(batch, PAGE.name, "exec"), names | {"envs": [PointEnv(), PointEnv()]})


def test_a_person_acts_beside_a_learner_that_is_not_waited_for(
    tmp_path, small_config, point_demonstrations
):
    config = small_config.replace({"train.control_hz": 1000.0, "planner.backend": "cpu"})
    trainer = trainer_of(config, point_demonstrations, tmp_path / "run", TakenOver())
    trainer.train()
    assert len(trainer.experts) == point_demonstrations.transitions + 5 * 7


def make_taken_over():
    return TakenOver()


def test_a_person_acts_in_a_worker_too(small_config):
    config = small_config.replace({"train.env_workers": True})
    envs, _ = training_envs(config, make_taken_over, None, print)
    try:
        envs.start()
        ended = []
        while not ended:
            ended = envs.step(np.zeros((1, 2), np.float32))
    finally:
        envs.close()
    assert np.flatnonzero(ended[0].corrected).tolist() == list(range(5, 12))
    assert np.abs(ended[0].actions).sum(1).nonzero()[0].tolist()[0] == 5


@pytest.mark.parametrize(
    "person", [np.array([0.5, np.nan]), np.array([0.5, 2.0]), np.zeros(3), "left"]
)
def test_what_is_no_action_of_a_person_is_named(
    tmp_path, small_config, point_demonstrations, person
):
    trainer = trainer_of(
        small_config, point_demonstrations, tmp_path / "run", TakenOver(person=person)
    )
    said = r"point, episode 0, step 6: info\['intervene_action'\] is .*, expected an action of Box"
    with pytest.raises(TaskError, match=said):
        trainer.train()


def test_a_person_acts_in_the_units_of_ones_own_environment(small_config):
    """Which `task=gym` takes to [-1, 1], as it does the agent's actions the other way."""

    class Wide(TakenOver):
        action_space = type(PointEnv.action_space)(np.float32([-3, 0]), np.float32([1, 4]))

    env = ControlEnv(Wide(range(1), person=np.array([-1.0, 4.0])), small_config.task)
    env.reset(seed=0)
    assert env.step(np.zeros(2))[4]["intervene_action"].tolist() == [0, 1]


def test_stretches_of_an_episode_are_cut_where_the_agent_acts():
    episode = EpisodeBuffer([np.zeros(1, np.float32)])
    for step in range(6):
        person = np.full(1, 0.5, np.float32) if step in (0, 1, 4, 5) else None
        episode.add(np.zeros(1, np.float32), step, np.full(1, step + 1, np.float32), person)
    first, last = episode.finish(terminated=True).corrections()
    assert first.observations[:, 0].tolist() == [0, 1, 2] and not first.terminated
    assert last.observations[:, 0].tolist() == [4, 5, 6] and last.terminated
    assert last.actions[:, 0].tolist() == [0.5, 0.5] and last.rewards.tolist() == [4, 5]


def test_images_of_a_person_are_refused(
    tmp_path, small_config, image_demonstrations, make_image_point
):
    env = make_image_point()
    step = env.env.step
    env.env.step = lambda action: (*step(action)[:4], {"intervene_action": np.zeros(2)})
    trainer = trainer_of(small_config, image_demonstrations, tmp_path / "run", env)
    with pytest.raises(TaskError, match="intervene_action.* is for flat observations, got images"):
        trainer.train()
