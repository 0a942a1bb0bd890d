import dataclasses
import math

import pytest
import torch

from iqmpc import Episode, Learner, losses
from iqmpc.errors import ConfigError
from iqmpc.kernels import backends
from iqmpc.kernels.weights import map_layers, snapshot
from iqmpc.losses import Batch
from iqmpc.observation import ObservationSpec
from iqmpc.replay import SliceReplay, join
from iqmpc.update_backends import resolve_update


def batch(experts=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    rows = 2 * experts
    return Batch(
        torch.randn(4, rows, 2, generator=g),
        torch.rand(3, rows, 2, generator=g) * 2 - 1,
        torch.randn(3, rows, generator=g),
        torch.zeros(3, rows),
        experts,
    )


def drawn_episode(steps, **fields):
    return Episode(torch.randn(steps + 1, 2).numpy(), torch.rand(steps, 2).numpy(), **fields)


def with_(config, **learner):
    return dataclasses.replace(config, learner=dataclasses.replace(config.learner, **learner))


def parameters(learner):
    return torch.cat([p.detach().flatten() for p in learner.model.parameters()])


def calls_of(monkeypatch, name):
    """What `losses.model_loss` or `policy_loss` is called with, weights as they were then."""
    calls, loss = [], getattr(losses, name)

    def called(weights, *args):
        calls.append(
            (
                snapshot(weights),
                *(map_layers(torch.clone, a) if type(a) is tuple else a for a in args),
            )
        )
        return loss(weights, *args)

    monkeypatch.setattr(losses, name, called)
    return calls


class Adam:
    """As in its paper, of one list of tensors, each with its rate; gradients clipped by norm."""

    def __init__(self, rates, clip):
        self.rates, self.clip, self.steps = rates, clip, 0
        self.moments = [[0.0, 0.0] for _ in rates]

    def step(self, tensors, gradients):
        """(The tensors after the step, the norm before the clipping.)"""
        self.steps += 1
        norm = math.sqrt(sum(g.double().square().sum().item() for g in gradients))
        after = []
        for x, g, m, rate in zip(tensors, gradients, self.moments, self.rates, strict=True):
            g = g.double() * min(1.0, self.clip / norm)
            m[0] = 0.9 * m[0] + 0.1 * g
            m[1] = 0.999 * m[1] + 0.001 * g**2
            first, second = m[0] / (1 - 0.9**self.steps), m[1] / (1 - 0.999**self.steps)
            after.append(x.double() - rate * first / (second.sqrt() + 1e-8))
        return after, norm


def parts(weights):
    """Tensors that the model's step moves (with their number in the encoder), and the policy's."""
    encoder, rest, policy = (
        weights._replace(**{p: () for p in absent}).tensors()
        for absent in (
            ("dynamics", "critics", "termination", "policy"),
            ("encoder", "policy"),
            ("encoder", "dynamics", "critics", "termination"),
        )
    )
    return [*encoder, *rest], len(encoder), policy


def copies(weights):
    """Leaves of a graph of their own."""
    weights = snapshot(weights)
    for t in weights.tensors():
        t.requires_grad_()
    return weights


@pytest.mark.parametrize(
    ("settings", "clips"),
    [
        ({"grad_clip": 0.01}, True),
        ({"objective": "td", "entropy_scale": "one", "dropout": "always"}, False),
        (
            {
                "objective": "v_diff",
                "gradient_penalty": True,
                "dropout": "always",
                "c_gp": 3.0,
                "c_bc": 0.3,
            },
            False,
        ),
    ],
)
def test_an_update_by_hand(small_config, monkeypatch, settings, clips):
    """Two steps of Adam, each on its own parameters and clipped by their norm alone; the policy's
    with the new critics on the old latents; then targets and average. No setting at its default.
    """
    model_calls, policy_calls = (
        calls_of(monkeypatch, name) for name in ("model_loss", "policy_loss")
    )
    model_loss, policy_loss = losses.model_loss, losses.policy_loss
    config = with_(
        small_config,
        **{
            "lr": 2e-3,
            "encoder_lr_scale": 0.7,
            "tau": 0.3,
            "discount": 0.9,
            "beta": 0.03,
            "entropy": "presquash",
            "rho": 0.7,
            "c_iq": 0.4,
            **settings,
        },
    ).replace({"agent.average": "evaluation", "agent.average_rate": 0.2})
    learner = Learner(2, 2, config)
    average = [t.clone() for t in learner.averages.tensors()]
    assert all(torch.equal(a, b) for a, b in zip(average, learner.weights.tensors(), strict=True))
    targets = map_layers(torch.clone, learner.targets)
    tensors, encoder, policy = parts(learner.weights)
    clip = config.learner.grad_clip
    adam = Adam([0.7 * 2e-3] * encoder + [2e-3] * (len(tensors) - encoder), clip)
    policy_adam = Adam([2e-3] * len(policy), clip)
    beta = 0.03 if config.learner.entropy_scale == "one" else 0.06  # twice, for two actions
    for number in range(3):
        data = batch(seed=number)
        if config.learner.objective == "td":
            data = data._replace(experts=0)
        metrics = learner.update(data)

        before, of, drawn_for, noise, given, discount, *last = model_calls.pop(0)
        assert drawn_for is data and given == config.learner
        assert discount == 0.9 and last == [beta, bool(config.learner.gradient_penalty)]
        for x, y in zip(of, targets, strict=True):
            assert all(a is b is None or torch.equal(a, b) for a, b in zip(x, y, strict=True))
        before = copies(before)
        loss, latents, expected = model_loss(before, of, data, noise, given, discount, *last)
        model_calls.clear()
        for name, value in expected.items():
            assert metrics[name].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-6), name
        was, _, policy_was = parts(before)
        after, norm = adam.step([t.detach() for t in was], torch.autograd.grad(loss, was))
        assert metrics["model_grad_norm"].item() == pytest.approx(norm, rel=1e-4)
        assert (norm > clip) == clips

        between, old_latents, policy_noise, *last = policy_calls.pop(0)
        assert last[:3] == [0.7, beta, "presquash"]
        assert torch.allclose(old_latents, latents, atol=1e-5)
        if config.learner.c_bc:
            assert torch.equal(last[3], data.action[:, :8])
            assert last[4].item() == pytest.approx(0.3 * (1 + abs(expected["q_expert"].item())))
        else:
            assert not last[3:]
        between = copies(between)
        now, _, policy_now = parts(between)
        for a, b in zip(now, after, strict=True):  # the critics have moved, the policy has not
            torch.testing.assert_close(a.detach().double(), b, rtol=0, atol=2e-5)
        assert all(torch.equal(a, b) for a, b in zip(policy_now, policy_was, strict=True))
        loss, _ = policy_loss(between, latents, policy_noise, *last)
        policy_calls.clear()
        after, norm = policy_adam.step(
            [t.detach() for t in policy_now], torch.autograd.grad(loss, policy_now)
        )
        assert metrics["policy_grad_norm"].item() == pytest.approx(norm, rel=1e-4)
        assert (norm > clip) == clips
        moved, _, policy_moved = parts(learner.weights)
        for a, b in zip(policy_moved, after, strict=True):
            torch.testing.assert_close(a.detach().double(), b, rtol=0, atol=2e-5)
        assert all(torch.equal(a, b) for a, b in zip(moved, now, strict=True))

        targets = tuple(
            type(x)(
                *(
                    None if a is None else a + 0.3 * (b.detach() - a)
                    for a, b in zip(x, y, strict=True)
                )
            )
            for x, y in zip(targets, learner.weights.critics, strict=True)
        )
        for x, y in zip(targets, learner.targets, strict=True):
            torch.testing.assert_close(list(x), list(y))
        targets = map_layers(torch.clone, learner.targets)
        average = [
            a + 0.2 * (w.detach() - a)
            for a, w in zip(average, learner.weights.tensors(), strict=True)
        ]
        torch.testing.assert_close(average, learner.averages.tensors())
    assert learner.skipped_updates == metrics["skipped_updates"] == 0


@pytest.mark.parametrize("objective", ["iq", "v_diff", "td"])
@pytest.mark.parametrize("dropout", ["regression", "always"])
@pytest.mark.parametrize("penalty", [False, True])
def test_what_an_update_draws(small_config, monkeypatch, objective, dropout, penalty):
    """Shapes and distributions, and everything anew in the next update."""
    model_calls, policy_calls = (
        calls_of(monkeypatch, name) for name in ("model_loss", "policy_loss")
    )
    config = with_(small_config, objective=objective, dropout=dropout, gradient_penalty=penalty)
    learner = Learner(2, 2, config.replace({"model.dropout": 0.2}))
    experts, rows = (0 if objective == "td" else 40), 80
    data = batch(40)._replace(experts=experts)
    for _ in range(2):
        learner.update(data)
    (noise, later), (policy, policy_later) = (
        [call[i] for call in calls] for i, calls in ((3, model_calls), (2, policy_calls))
    )
    always, penalised = dropout == "always", penalty and objective != "td"
    value = {"iq": experts, "v_diff": 3 * (rows - experts), "td": None}[objective]
    shapes = {
        "target": [3, rows, 2],
        "initial": [3 if objective == "v_diff" else 1, rows, 2],
        "keep": [3, 3 * rows, 32],
        "mix": [3, experts, 1] if penalised else None,
        "pair": [2],
        "shift": None,
        "keep_target": [2, 3 * rows, 32] if always else None,
        "keep_value": [2, value, 32] if always and value else None,
        "keep_penalty": [3, 3 * experts, 32] if always and penalised else None,
    }
    assert shapes == {k: None if t is None else list(t.shape) for k, t in noise._asdict().items()}
    assert {"action": [4, rows, 2], "pair": [2], "keep": [2, 4 * rows, 32] if always else None} == {
        k: None if t is None else list(t.shape) for k, t in policy._asdict().items()
    }
    for draws, then in ((noise, later), (policy, policy_later)):
        for name, drawn in draws._asdict().items():
            if drawn is None or name == "pair":
                continue
            assert not torch.equal(drawn, getattr(then, name))
            rows_of = drawn.flatten(0, -2)
            assert len(rows_of.unique(dim=0)) > 0.99 * len(rows_of)  # but for chance all differ
            deviation, count = drawn.std().item(), drawn.numel()
            if name.startswith("keep"):
                assert drawn.unique().tolist() == [0, 1.25]
                mean, std = 1.0, 0.5  # sqrt(0.2 / 0.8)
            elif name == "mix":
                assert 0 <= drawn.min() < 0.1 and 0.9 < drawn.max() < 1
                mean, std = 0.5, math.sqrt(1 / 12)
            else:
                mean, std = 0.0, 1.0
            assert drawn.mean().item() == pytest.approx(mean, abs=5 * std / math.sqrt(count))
            assert deviation == pytest.approx(std, rel=5 / math.sqrt(count))


def test_without_dropout_nothing_is_dropped(small_config, monkeypatch):
    model_calls, policy_calls = (
        calls_of(monkeypatch, name) for name in ("model_loss", "policy_loss")
    )
    config = with_(small_config, dropout="always", gradient_penalty=True)
    Learner(2, 2, config.replace({"model.dropout": 0.0})).update(batch())
    for noise in (model_calls[0][3], policy_calls[0][2]):
        assert all(t is None for name, t in noise._asdict().items() if name.startswith("keep"))


def unlike(before, after):
    """Names of a state that differ; a NaN differs from everything."""
    assert before.keys() == after.keys()
    return {k for k in after if not torch.equal(before[k], after[k])}


def state_of(learner):
    return {k: v.clone() for k, v in learner.state_dict().items()}


def spoil(monkeypatch, name, how):
    """From now on a loss that is, or whose gradient is, not finite."""
    loss = getattr(losses, name)

    def spoilt(weights, *args):
        value, *rest = loss(weights, *args)
        stack = weights.policy if name == "policy_loss" else weights.dynamics
        zero = stack[0].bias.sum() - stack[0].bias.sum().detach()
        value = (
            value
            + {
                "nan": math.nan * zero,
                "inf": zero + math.inf,
                "gradient inf": zero.sqrt(),  # its slope at 0
                "gradient nan": (zero * 0).sqrt(),
            }[how]
        )
        return value, *rest

    monkeypatch.setattr(losses, name, spoilt)


@pytest.mark.parametrize("how", ["nan", "inf", "gradient nan", "gradient inf"])
@pytest.mark.parametrize("first", [True, False])
def test_an_update_that_is_not_finite_changes_nothing(small_config, monkeypatch, how, first):
    config = small_config.replace({"agent.average": "always"})
    good = Learner(2, 2, config)
    if not first:
        good.update(batch(seed=1))
    with monkeypatch.context() as spoiling:
        spoil(spoiling, "model_loss", how)
        bad = Learner(2, 2, config)
    bad.load_state_dict(state_of(good))
    before = state_of(bad)
    metrics = bad.update(batch(seed=2))
    changed = {
        k
        for k in unlike(
            {k: before.get(k, torch.zeros_like(v)) for k, v in state_of(bad).items()}, state_of(bad)
        )
    }
    assert changed == {"generator", "updates", "skipped_updates"}  # moments may appear, as zeros
    assert bad.updates == good.updates + 1 and bad.skipped_updates == 1
    assert metrics["skipped_updates"] == 1 and metrics["skipped_updates"].is_floating_point()
    bad.update(batch(seed=3))
    assert bad.skipped_updates == 2
    # The next that is finite is as if there had been none before.
    good.generator.set_state(bad.generator.get_state())
    after = Learner(2, 2, config)
    after.load_state_dict(state_of(bad))
    assert after.skipped_updates == 2
    for learner in (good, after):
        learner.update(batch(seed=4))
    assert unlike(state_of(good), state_of(after)) == {"updates", "skipped_updates"}


@pytest.mark.parametrize("how", ["nan", "inf", "gradient nan", "gradient inf"])
def test_a_policy_step_that_is_not_finite_is_left_out_alone(small_config, monkeypatch, how):
    config = small_config.replace({"agent.average": "evaluation"})
    good = Learner(2, 2, config)
    for seed in range(2):
        good.update(batch(seed=seed))
    with monkeypatch.context() as spoiling:
        spoil(spoiling, "policy_loss", how)
        bad = Learner(2, 2, config)
    bad.load_state_dict(state_of(good))
    before = state_of(bad)
    for learner in (good, bad):
        metrics = learner.update(batch(seed=2))
    assert metrics["skipped_updates"] == bad.skipped_updates == 1 and good.skipped_updates == 0
    policy = {k for k in before if k.startswith(("model.policy", "policy_adam"))}
    averages = {k for k in before if k.startswith("average.policy")}
    assert len(policy) == 4 * len(averages)  # three values of Adam's for each
    assert not policy & unlike(before, state_of(bad))
    assert unlike(state_of(good), state_of(bad)) == policy | averages | {"skipped_updates"}


def test_data_that_are_not_finite_are_survived(small_config):
    learner = Learner(2, 2, small_config)
    learner.update(batch())
    before = parameters(learner)
    data = batch(seed=1)
    data.obs[0, 3] = math.nan
    learner.update(data)
    assert torch.equal(parameters(learner), before) and learner.skipped_updates == 1
    assert all(v.isfinite() for v in learner.update(batch(seed=2)).values())
    assert not torch.equal(parameters(learner), before) and learner.skipped_updates == 1


def test_who_acts(small_config):
    for average, acts, evaluates in (
        ("off", "live", "live"),
        ("evaluation", "live", "average"),
        ("always", "average", "average"),
    ):
        learner = Learner(2, 2, small_config.replace({"agent.average": average}))
        assert (learner.averages is None) == (average == "off")
        weights = {"live": learner.weights, "average": learner.averages}
        assert learner.acting_weights() is weights[acts]
        assert learner.evaluation_weights() is weights[evaluates]
        learner.update(batch())
        kept = {
            k.removeprefix("average."): v
            for k, v in learner.state_dict().items()
            if k.startswith("average.")
        }
        assert kept.keys() == (set() if average == "off" else learner.model.state_dict().keys())
        if kept:
            assert not any(t.requires_grad for t in learner.averages.tensors())
            by_name = dict(learner.average.named_parameters())
            assert all(torch.equal(v, by_name[k]) for k, v in kept.items())
            assert all(
                t.data_ptr() == p.data_ptr()
                for t, p in zip(learner.averages.tensors(), by_name.values(), strict=True)
            )


def test_learning_is_the_same_whoever_acts(small_config):
    """The average is beside it."""
    states = []
    for average in ("off", "always"):
        learner = Learner(2, 2, small_config.replace({"agent.average": average}))
        for seed in range(3):
            learner.update(batch(seed=seed))
        states.append({k: v for k, v in state_of(learner).items() if not k.startswith("average.")})
    assert not unlike(*states)


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
        assert any(
            not torch.equal(v, before[k])
            for k, v in learner.model.state_dict().items()
            if k.startswith(part)
        )


def test_the_critics_learn_to_tell_experts_from_behaviour(small_config):
    learner = Learner(2, 2, with_(small_config, lr=3e-3))
    data = batch()
    gaps = [learner.update(data)["q_difference"].item() for _ in range(60)]
    assert gaps[0] == 0 and gaps[-1] > 0.2


@pytest.mark.parametrize("discount", [0.0, 0.5])
def test_td_regresses_on_the_return(small_config, discount):
    """A reward of 1 for ever is worth 1 / (1 - γ): with γ = 0 the target is the reward itself."""
    learner = Learner(
        2, 2, with_(small_config, objective="td", discount=discount, beta=0.0, lr=3e-3, tau=1.0)
    )
    data = batch()._replace(experts=0, reward=torch.ones(3, 16))
    for _ in range(150):
        metrics = learner.update(data)
    assert metrics["q_behaviour"].item() == pytest.approx(1 / (1 - discount), rel=0.1)
    assert metrics["critic_loss"] < 0.02


def test_targets_move_by_tau(small_config):
    learner = Learner(2, 2, with_(small_config, tau=0.25))
    old = map_layers(torch.clone, learner.targets)
    learner.update(batch())
    for before, after, critic in zip(old, learner.targets, learner.weights.critics, strict=True):
        torch.testing.assert_close(
            after.weight, before.weight + 0.25 * (critic.weight - before.weight)
        )
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


@pytest.mark.parametrize("average", ["off", "always"])
def test_state_round_trip_continues_exactly(small_config, average):
    small_config = small_config.replace({"agent.average": average})
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
        replay.add(drawn_episode(30, rewards=torch.rand(30).numpy()))
    sampler = torch.Generator().manual_seed(7)
    learns = Learner(2, 2, small_config, sampler=sampler)
    updates = Learner(2, 2, small_config)
    for experts in (replays[0], None):
        for learner in (learns, updates):
            learner.settings = dataclasses.replace(
                small_config.learner, objective="iq" if experts else "td"
            )
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
    # the longest path: double backward, dropout everywhere
    config = with_(small_config, gradient_penalty=True, dropout="always", entropy="presquash")
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
    shift = learner.backend.model_noise(data).shift
    assert shift.shape == (4, 8, 2) and shift.dtype == torch.int64
    other = learner.backend.model_noise(data).shift
    assert not torch.equal(shift, other)
    assert set(torch.cat([shift, other]).flatten().tolist()) == set(range(-3, 4))
    assert not torch.equal(shift[0], shift[1])  # s_t and s_{t+1} are moved independently
    assert Learner(2, 2, small_config).backend.model_noise(batch(4)).shift is None


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
        Learner((9, 64, 64), 2, with_(small_config, mode=mode)) for mode in ("eager", "compile")
    )
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


def fused_and_eager(config, monkeypatch):
    """Two learners, of which the eager one draws what the fused one does."""
    fused, eager = (Learner(2, 2, with_(config, mode=mode)) for mode in ("fused", "eager"))

    def drawn():
        experts = 0 if config.learner.objective == "td" else 8
        draws = fused.backend.fused.native.draws(eager.updates, 16, experts)
        return {k: torch.tensor(v) for k, v in draws.items()}

    def model_noise(data):
        d = drawn()
        always = config.learner.dropout == "always"
        return losses.ModelNoise(
            d["target"],
            d["initial"],
            d["keep"],
            d["mix"] if eager.penalise else None,
            d["pair"],
            keep_target=d["keep_target"] if always else None,
            keep_value=d["keep_value"] if always and data.experts else None,
            keep_penalty=d["keep_penalty"] if always and eager.penalise else None,
        )

    def policy_noise(latents):
        d = drawn()
        keep = d["keep_policy"] if config.learner.dropout == "always" else None
        return losses.PolicyNoise(d["policy"], d["policy_pair"], keep)

    monkeypatch.setattr(eager.backend, "model_noise", model_noise)
    monkeypatch.setattr(eager.backend, "policy_noise", policy_noise)
    return fused, eager


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"learner.objective": "td"},
        {"learner.objective": "v_diff", "model.termination": True},
        {"learner.gradient_penalty": True, "learner.c_gp": 0.0},
        {
            "learner.gradient_penalty": True,
            "learner.dropout": "always",
            "learner.entropy": "presquash",
            "agent.average": "evaluation",
            "agent.average_rate": 0.2,
            "learner.tau": 0.3,
        },
    ],
    ids=str,
)
def test_fused_is_eager(small_config, monkeypatch, settings):
    config = small_config.replace({"model.dropout": 0.125, **settings})
    fused, eager = fused_and_eager(config, monkeypatch)
    assert (fused.mode, eager.mode) == ("fused", "eager")
    data = batch()
    if config.learner.objective == "td":
        data = data._replace(experts=0)
    if config.termination:
        data = data._replace(terminated=(data.action[..., 0] > 0.5).float())
    for _ in range(5):
        one, two = fused.update(data), eager.update(data)
        assert one.keys() == two.keys()
        for key in two:
            assert one[key].dtype == torch.float32 and one[key].shape == ()
            torch.testing.assert_close(
                one[key], two[key], rtol=1e-3, atol=1e-5, msg=key, equal_nan=True
            )
    # A checkpoint of one is one of the other, moments and counts of steps included.
    a, b = fused.state_dict(), eager.state_dict()
    assert a.keys() == b.keys() and fused.updates == eager.updates == 5
    for key in a.keys() - {"generator"}:
        assert a[key].shape == b[key].shape and a[key].dtype == b[key].dtype
        torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=2e-4, msg=key)
    other = Learner(2, 2, with_(config, mode="fused"))
    other.load_state_dict({k: v.clone() for k, v in b.items()})
    monkeypatch.undo()
    for key, value in other.state_dict().items():
        assert torch.equal(value, b[key]), key
    assert other.update(data)["consistency"].isfinite()


def test_fused_counts_and_leaves_out_what_is_not_finite(small_config):
    learner = Learner(2, 2, with_(small_config, mode="fused"))
    learner.update(batch())
    before = {k: v.clone() for k, v in learner.state_dict().items()}
    bad = batch()
    bad.obs[0, 0, 0] = math.nan
    assert learner.update(bad)["skipped_updates"] == 1
    after = learner.state_dict()
    assert after.pop("updates") == 2 and after.pop("skipped_updates") == 1
    assert all(torch.equal(after[k], before[k]) for k in after)
    assert learner.update(batch())["skipped_updates"] == 1 and learner.skipped_updates == 1
    assert learner.state_dict()["model_adam.0.step"] == 2


def test_fused_counts_the_policys_steps_apart(small_config):
    """Its gradient alone is not finite: usual actions of weights out of proportion."""
    learner = Learner(2, 2, with_(small_config, mode="fused"))
    policy = learner.weights.policy
    policy[-2].gamma.data.mul_(1e30)
    policy[-1].weight.data.mul_(1e-30)
    assert learner.update(batch())["skipped_updates"] == 1
    state = learner.state_dict()
    assert (state["model_adam.0.step"], state["policy_adam.0.step"]) == (1, 0)


def test_what_learns_where(small_config, monkeypatch):
    def mode(obs_shape=(2,), device="cpu", **settings):
        spec = ObservationSpec(obs_shape)
        return resolve_update(with_(small_config, **settings), torch.device(device), spec)

    images = (9, 64, 64)
    assert mode(mode="auto") == mode(mode="auto", precision="bf16") == "fused"
    assert mode(mode="auto", obs_shape=images) == "compile"
    assert mode(mode="auto", device="cuda") == mode(mode="graph", device="cuda") == "graph"
    assert mode(mode="eager") == "eager"
    with pytest.raises(ConfigError, match=r"mode=fused takes flat observations, got images \[9, "):
        mode(mode="fused", obs_shape=images)
    with pytest.raises(ConfigError, match="mode=fused needs device=cpu, got cuda"):
        mode(mode="fused", device="cuda")
    with pytest.raises(ConfigError, match="mode=graph needs a CUDA device, got cpu"):
        mode(mode="graph")
    with pytest.raises(
        ConfigError, match="mode=eager multiplies as learner.matmul says, got learner.precision=b"
    ):
        mode(mode="eager", precision="bf16")
    assert mode(mode="auto", matmul="bf16") == mode(mode="auto", matmul="float32") == "compile"
    assert mode(mode="graph", device="cuda", matmul="tf32") == "graph"
    with pytest.raises(
        ConfigError, match="mode=fused multiplies as learner.precision says, got learner.matmul=b"
    ):
        mode(mode="fused", matmul="bf16")
    with pytest.raises(
        ConfigError, match="eager has tf32 on a CUDA device alone, got learner.matmul=tf32 on cpu"
    ):
        mode(mode="eager", matmul="tf32")
    with pytest.raises(
        ConfigError, match="no learner.mode can serve: fused takes flat observations"
    ):
        mode(mode="auto", precision="bf16", obs_shape=images)
    monkeypatch.setattr(backends, "_availability", lambda: {"cpu": "iqmpc._C is not built"})
    assert mode(mode="auto") == "compile"
    with pytest.raises(ConfigError, match="mode=fused cannot run: iqmpc._C is not built"):
        mode(mode="fused")


def test_bf16_products_learn_nearly_the_same(small_config):
    """The sums, and what is learnt, stay float32."""
    one, other = (
        Learner(2, 2, with_(small_config, mode="eager", matmul=matmul))
        for matmul in ("float32", "bf16")
    )
    assert one.matmul == Learner(2, 2, with_(small_config, mode="eager")).matmul == "float32"
    exact, near = one.update(batch()), other.update(batch())
    assert exact["critic_loss"] != near["critic_loss"]
    for key in ("critic_loss", "model_grad_norm", "policy_loss"):
        assert near[key].dtype == torch.float32
        torch.testing.assert_close(near[key], exact[key], rtol=5e-2, atol=5e-3)
    assert all(t.dtype == torch.float32 for t in other.weights.tensors())


def test_fused_learns_from_replays_as_they_grow(small_config):
    learners = [Learner(2, 2, with_(small_config, mode="fused")) for _ in range(2)]
    experts, behaviour = (SliceReplay(2, 2, horizon=3, capacity=10_000) for _ in range(2))
    experts.add(drawn_episode(30))
    with pytest.raises(ValueError, match="no episode of at least 3 steps"):
        learners[0].learn(experts, behaviour)
    for length in (5, 5000, 20):  # the second one makes the replay's tensors move
        behaviour.add(drawn_episode(length))
        one, two = (learner.learn(experts, behaviour) for learner in learners)
        assert one == two
    assert behaviour.allocations > 1
    assert torch.equal(parameters(learners[0]), parameters(learners[1]))


def test_layers_wider_than_the_fused_update_takes_are_named_with_the_way_out(small_config):
    config = small_config.replace({"model.hidden_dim": 8200, "learner.mode": "fused"})
    with pytest.raises(ConfigError, match=r"at most 8192 outputs, got 8200 \(learner.mode=compile"):
        Learner(2, 2, config)
