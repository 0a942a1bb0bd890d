import dataclasses

import pytest
import torch

from iqmpc import Learner
from iqmpc.kernels.weights import map_layers
from iqmpc.losses import Batch
from iqmpc.replay import SliceReplay, join


def batch(experts=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    rows = 2 * experts
    return Batch(torch.randn(4, rows, 2, generator=g),
                 torch.rand(3, rows, 2, generator=g) * 2 - 1,
                 torch.randn(3, rows, generator=g), torch.zeros(3, rows), experts)


def with_(config, **learner):
    return dataclasses.replace(config, learner=dataclasses.replace(config.learner, **learner))


def parameters(learner):
    return torch.cat([p.detach().flatten() for p in learner.model.parameters()])


@pytest.mark.parametrize("objective", ["iq", "v_diff", "td"])
@pytest.mark.parametrize("penalty", [False, True])
def test_updates_are_finite_and_change_every_part(small_config, objective, penalty):
    learner = Learner(2, 2, with_(small_config, objective=objective, gradient_penalty=penalty))
    before = {k: v.clone() for k, v in learner.model.state_dict().items()}
    data = batch() if objective != "td" else batch()._replace(experts=0)
    for _ in range(3):
        metrics = learner.update(data)
    assert all(v.isfinite() for v in metrics.values()) and learner.updates == 3
    assert ("gradient_penalty" in metrics) == (penalty and objective != "td")
    for part in ("encoder", "dynamics", "policy", "critics"):
        assert any(not torch.equal(v, before[k])
                   for k, v in learner.model.state_dict().items() if k.startswith(part))


def test_the_critics_learn_to_tell_experts_from_behaviour(small_config):
    learner = Learner(2, 2, with_(small_config, lr=3e-3))
    data = batch()
    gaps = [learner.update(data)["q_difference"].item() for _ in range(60)]
    assert gaps[0] == 0 and gaps[-1] > 0.2


def test_td_regresses_on_the_reward(small_config):
    """With γ = 0 the critic's target is the reward itself."""
    learner = Learner(2, 2, with_(small_config, objective="td", discount=0.0, lr=3e-3))
    data = batch()._replace(experts=0)
    losses = [learner.update(data)["critic_loss"].item() for _ in range(150)]
    assert losses[-1] < 0.3 * losses[0]


def test_targets_move_by_tau(small_config):
    learner = Learner(2, 2, with_(small_config, tau=0.25))
    old = map_layers(torch.clone, learner.targets)
    learner.update(batch())
    for before, after, critic in zip(old, learner.targets, learner.weights.critics, strict=True):
        torch.testing.assert_close(
            after.weight, before.weight + 0.25 * (critic.weight - before.weight))
        torch.testing.assert_close(after.bias, before.bias + 0.25 * (critic.bias - before.bias))
        if critic.gamma is not None:
            for name in ("gamma", "beta"):
                was, now, new = (getattr(x, name) for x in (before, after, critic))
                torch.testing.assert_close(now, was + 0.25 * (new - was))


def test_gradients_are_clipped(small_config):
    """Adam hides a scale: its first moment is looked at, (1 - 0.9) times the clipped gradient."""
    learner = Learner(2, 2, with_(small_config, grad_clip=1e-3, c_cons=1e4))
    norm = learner.update(batch())["model_grad_norm"]
    moments = [learner.model_optimiser.state[p]["exp_avg"] for p in learner.model_parameters]
    clipped = torch.cat([m.flatten() for m in moments]).norm() / 0.1
    assert norm > 1 and clipped.item() == pytest.approx(1e-3, rel=1e-2)


def test_the_encoder_learns_at_its_own_rate(small_config):
    """Adam's first step is the learning rate in every coordinate that has a gradient."""
    learner = Learner(2, 2, small_config)
    before = {k: v.clone() for k, v in learner.model.state_dict().items()}
    learner.update(batch())
    step = {k: (v - before[k]).abs().max().item() for k, v in learner.model.state_dict().items()}
    assert step["encoder.0.weight"] == pytest.approx(0.3 * 3e-4, rel=0.05)
    assert step["dynamics.0.weight"] == pytest.approx(3e-4, rel=0.05)
    assert step["policy.2.bias"] == pytest.approx(3e-4, rel=0.05)


def test_same_seed_same_updates(small_config):
    runs = []
    for seed in (0, 0, 1):
        learner = Learner(2, 2, dataclasses.replace(small_config, seed=seed))
        for i in range(3):
            learner.update(batch(seed=i))
        runs.append(parameters(learner))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_state_round_trip_continues_exactly(small_config):
    straight = Learner(2, 2, small_config)
    for i in range(3):
        straight.update(batch(seed=i))
    state = {k: v.clone() for k, v in straight.state_dict().items()}
    resumed = Learner(2, 2, dataclasses.replace(small_config, seed=5))
    resumed.load_state_dict(state)
    for learner in (straight, resumed):
        for i in range(3, 6):
            learner.update(batch(seed=i))
    after = resumed.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in straight.state_dict().items())


def test_learning_is_an_update_on_slices_of_both_replays(small_config):
    """Drawn by the generator that was given, behaviour first."""
    replays = [SliceReplay(2, 2, horizon=3, capacity=100) for _ in range(2)]
    for replay in replays:
        replay.add_episode(torch.randn(31, 2), torch.rand(30, 2), torch.rand(30))
    sampler = torch.Generator().manual_seed(7)
    learns = Learner(2, 2, small_config, sampler=sampler)
    updates = Learner(2, 2, small_config)
    for experts in (replays[0], None):
        for learner in (learns, updates):
            learner.settings = dataclasses.replace(
                small_config.learner, objective="iq" if experts else "td")
        generator = torch.Generator()
        generator.set_state(sampler.get_state())
        behaviour = replays[1].sample(8, generator)
        batch = join(experts.sample(8, generator), behaviour) if experts else behaviour
        one, two = learns.learn(experts, replays[1]), updates.update(batch)
        assert one == two and torch.equal(parameters(learns), parameters(updates))
        assert torch.equal(sampler.get_state(), generator.get_state())
    assert learns.updates == updates.updates == 2
    with pytest.raises(ValueError, match="no episode of at least 3 steps"):
        learns.learn(None, SliceReplay(2, 2, horizon=3, capacity=100))


@pytest.mark.slow
def test_compiled_is_eager(small_config):
    config = with_(small_config, gradient_penalty=True)  # the longest path, double backward
    eager, compiled = Learner(2, 2, config), Learner(2, 2, with_(config, mode="compile"))
    for i in range(5):
        one, two = eager.update(batch(seed=i)), compiled.update(batch(seed=i))
        for key in one:
            torch.testing.assert_close(two[key], one[key], rtol=1e-3, atol=1e-5, msg=key)
    torch.testing.assert_close(parameters(compiled), parameters(eager), rtol=1e-3, atol=2e-4)


def image_batch(experts=4):
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, 2 * experts, 9, 64, 64), dtype=torch.uint8, generator=g)
    return batch(experts)._replace(obs=images)


def test_images_are_shifted_anew_in_every_update(small_config):
    learner, data = Learner((9, 64, 64), 2, small_config), image_batch()
    shift = learner._model_noise(data).shift
    assert shift.shape == (4, 8, 2) and shift.dtype == torch.int64
    other = learner._model_noise(data).shift
    assert not torch.equal(shift, other)
    assert set(torch.cat([shift, other]).flatten().tolist()) == set(range(-3, 4))
    assert not torch.equal(shift[0], shift[1])  # s_t and s_{t+1} are moved independently
    assert Learner(2, 2, small_config)._model_noise(batch(4)).shift is None


def test_updates_on_images_repeat_and_change_the_encoder(small_config):
    one, two = (Learner((9, 64, 64), 2, small_config) for _ in range(2))
    before = parameters(one)
    for learner in (one, two):
        for _ in range(3):
            metrics = learner.update(image_batch())
        assert all(v.isfinite() for v in metrics.values())
    assert torch.equal(parameters(one), parameters(two))
    assert (parameters(one) - before).abs().max() > 1e-5
    resumed = Learner((9, 64, 64), 2, small_config)
    resumed.load_state_dict(one.state_dict())
    for learner in (one, resumed):
        learner.update(image_batch())
    assert torch.equal(parameters(one), parameters(resumed))


@pytest.mark.slow
def test_eager_and_compiled_agree_on_images(small_config):
    eager, compiled = (
        Learner((9, 64, 64), 2, with_(small_config, mode=mode)) for mode in ("eager", "compile"))
    for _ in range(2):
        a, b = (learner.update(image_batch()) for learner in (eager, compiled))
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=1e-5)


def test_a_termination_head_learns_and_is_continued(small_config):
    config = with_(small_config, lr=3e-3).replace({"model.termination": True})
    data = batch(experts=32)
    # the state moves by the action, and has fallen beyond 1
    obs = torch.stack([data.obs[0] + data.action[:t].sum(0) for t in range(4)])
    data = data._replace(obs=obs, terminated=(obs[1:, :, 0] > 1).float())
    learner = Learner(2, 2, config)
    first = learner.update(data)
    for _ in range(150):
        last = learner.update(data)
    assert 0.1 < data.terminated.mean() < 0.5
    assert last["termination_loss"] < 0.4 * first["termination_loss"]
    assert last["termination_recall"] > 0.9 and last["termination_precision"] > 0.7
    other = Learner(2, 2, config)
    other.load_state_dict(learner.state_dict())
    learner.update(data), other.update(data)
    assert torch.equal(parameters(learner), parameters(other))
    with pytest.raises(RuntimeError, match="termination"):
        Learner(2, 2, small_config).load_state_dict(learner.state_dict())
