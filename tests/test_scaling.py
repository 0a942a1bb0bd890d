"""Observations scaled by the demonstrations' moments, and what acts without knowing of it."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from iqmpc import Agent, Learner, Trainer
from iqmpc.errors import CheckpointError, ConfigError
from iqmpc.expert_data import expert_replay
from iqmpc.export import export
from iqmpc.kernels import layers
from iqmpc.observation import ObservationSpec
from iqmpc.run_folder import RunFolder
from iqmpc.scaling import LEAST_STD, ObservationScaling
from tests.runs import tensors_of, train


@pytest.fixture
def scaled(small_config):
    return small_config.replace({"model.normalise_obs": "demos"})


@pytest.fixture
def far(point_demonstrations):
    """The point's demonstrations, seen from afar and through a lens."""
    return replace(
        point_demonstrations,
        episodes=tuple(
            replace(e, observations=(100 + 0.05 * e.observations).astype(np.float32))
            for e in point_demonstrations.episodes
        ),
    )


def test_moments_are_those_of_all_rows():
    one = np.array([[1.0, 7.0], [3.0, 7.0]], np.float32)
    two = np.array([[5.0, 7.0]], np.float32)
    scaling = ObservationScaling.of([one, two])
    assert scaling.mean.tolist() == [3.0, 7.0]
    torch.testing.assert_close(scaling.std, torch.tensor([(8 / 3) ** 0.5, LEAST_STD]))
    torch.testing.assert_close(
        scaling(torch.tensor([[5.0, 7.02]])), torch.tensor([[2 / (8 / 3) ** 0.5, 2.0]])
    )


def test_the_folded_model_does_with_an_observation_what_the_model_does_with_the_scaled(
    small_config,
):
    learner = Learner(5, 2, small_config)
    weights = learner.weights.map(lambda t: t.detach().double())
    scaling = ObservationScaling(
        torch.tensor([0.0, -3.0, 1000.0, 0.1, 7.0], dtype=torch.float64),
        torch.tensor([1.0, 0.01, 250.0, 3.0, 0.2], dtype=torch.float64),
    )
    obs = scaling.mean + scaling.std * torch.randn(4, 5, dtype=torch.float64)
    expected = layers.encode(weights, scaling(obs))
    torch.testing.assert_close(
        layers.encode(scaling.folded(weights), obs), expected, rtol=0, atol=1e-12
    )
    assert expected.std() > 1e-6  # not the same latent for all
    state = {f"encoder.0.{name}": getattr(weights.encoder[0], name) for name in ("weight", "bias")}
    folded = scaling.folded_state({**state, "other": obs})
    first = scaling.folded(weights).encoder[0]
    assert torch.equal(folded["encoder.0.weight"], first.weight)
    assert torch.equal(folded["encoder.0.bias"], first.bias) and folded["other"] is obs


def test_both_sides_are_drawn_by_the_demonstrations_scaling(scaled, point_env, far, tmp_path):
    trainer = Trainer(scaled, point_env, far, run=tmp_path / "run")
    seen = np.concatenate([e.observations for e in far.episodes])
    rows = trainer.experts.state_dict()["obs"]
    torch.testing.assert_close(rows.mean(0), torch.zeros(2), rtol=0, atol=1e-3)
    torch.testing.assert_close(
        rows.std(0),
        torch.from_numpy(seen.std(0) / np.maximum(seen.std(0), LEAST_STD)),
        rtol=0.02,
        atol=0,
    )
    episode = far.episodes[0]
    trainer.behaviour.add(episode)
    mean, std = seen.astype(np.float64).mean(0), seen.astype(np.float64).std(0)
    torch.testing.assert_close(
        trainer.behaviour.state_dict()["obs"],
        torch.from_numpy((episode.observations - mean) / np.maximum(std, LEAST_STD)).float(),
        rtol=0,
        atol=1e-3,
    )


@pytest.mark.parametrize("average", ["off", "always"])
def test_a_run_a_loaded_agent_and_a_file_act_alike(
    tmp_path, scaled, point_env, point_demonstrations, average
):
    config = scaled.replace({"agent.average": average})
    trainer = Trainer(config, point_env, point_demonstrations, run=tmp_path / "run")
    summary = trainer.train()
    obs = np.array([0.3, -0.8], np.float32)
    # By hand: the learner's own model on the scaled observation.
    model = trainer.learner.model if average == "off" else trainer.learner.average
    scaling = trainer.learner.scaling
    z = model.encode(scaling(torch.from_numpy(obs)))
    expected = torch.tanh(model.pi(z)[0]).detach().numpy()
    export(tmp_path / "run", tmp_path / "agent.iqmpc")
    for where in ("run", "agent.iqmpc"):
        prior = Agent.load(tmp_path / where, changes={"planner.enabled": False})
        np.testing.assert_allclose(prior.act(obs), expected, rtol=0, atol=1e-5)
        assert prior.config.model.normalise_obs == "off"
    best = Agent.load(tmp_path / "run", checkpoint="best", changes={"planner.enabled": False})
    assert np.isfinite(best.act(obs)).all()
    assert summary["nonfinite_plans"] == 0
    # What acted in training is the same again.
    trainer.agent.publish(trainer.learner.acting_weights())
    z = layers.encode(trainer.agent.weights, torch.from_numpy(obs))
    np.testing.assert_allclose(
        torch.tanh(layers.policy(trainer.agent.weights, z)[0]).detach(), expected, atol=1e-5
    )


def test_a_run_continues_exactly(tmp_path, scaled, point_env, point_demonstrations):
    train(scaled, point_env, point_demonstrations, tmp_path / "straight")
    part = scaled.replace({"train.steps": 40})
    train(part, point_env, point_demonstrations, tmp_path / "parts")
    train(scaled, point_env, point_demonstrations, tmp_path / "parts", resume=True)
    one, two = (tensors_of(tmp_path / n)[0] for n in ("straight", "parts"))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    assert {"learner.scaling.mean", "learner.scaling.std"} < one.keys()


def test_what_cannot_be_scaled_is_refused(scaled, tmp_path, image_point_env, image_demonstrations):
    with pytest.raises(ConfigError, match="model.normalise_obs=demos needs demonstrations"):
        scaled.replace({"learner.objective": "td"})
    spec = ObservationSpec.of(image_point_env.observation_space.shape)
    config = scaled.replace({"task.name": "point"})
    with pytest.raises(ConfigError, match="scales numbers, the task observes images"):
        expert_replay(image_demonstrations, config, spec, 2, "cpu")
    config = config.replace({"model.normalise_obs": "auto"})
    assert expert_replay(image_demonstrations, config, spec, 2, "cpu").scaling is None


def test_auto_scales_where_something_is_demonstrated(
    tmp_path, small_config, point_env, point_demonstrations
):
    config = small_config.replace({"model.normalise_obs": "auto", "train.steps": 40})
    train(config, point_env, point_demonstrations, tmp_path / "iq")
    scaling = tensors_of(tmp_path / "iq")[0]["learner.scaling.mean"]
    Agent.load(tmp_path / "iq")
    assert torch.equal(
        scaling, ObservationScaling.of(e.observations for e in point_demonstrations.episodes).mean
    )
    td = config.replace({"learner.objective": "td"})
    train(td, point_env, None, tmp_path / "td")
    assert "learner.scaling.mean" not in tensors_of(tmp_path / "td")[0]
    Agent.load(tmp_path / "td")


def test_a_checkpoint_without_its_scaling_is_refused(
    tmp_path, small_config, point_env, point_demonstrations
):
    train(small_config, point_env, point_demonstrations, tmp_path / "run")
    settings = tmp_path / "run" / "config.yaml"
    text = settings.read_text()
    assert "normalise_obs: 'off'" in text
    settings.write_text(text.replace("normalise_obs: 'off'", "normalise_obs: demos"))
    path, tensors, meta = RunFolder(tmp_path / "run").newest()
    meta["settings"]["model"]["normalise_obs"] = "demos"
    RunFolder(tmp_path / "run").save(meta["env_steps"], tensors, meta, keep=1)
    with pytest.raises(CheckpointError, match="no scaling of its observations"):
        Agent.load(tmp_path / "run")
