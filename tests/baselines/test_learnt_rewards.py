"""Rewards learnt against the policy: GAIL's, HyPE's, HyPER's models, CFIL's flows, by hand."""

import numpy as np
import pytest
import torch

from iqmpc.baselines import hyper
from iqmpc.baselines.adversarial import PENALTY
from iqmpc.baselines.gail import Gail, classifier_loss
from iqmpc.baselines.hype import Hype, moment_loss
from iqmpc.baselines.learner import Transitions
from iqmpc.errors import ConfigError
from tests.baselines.hand import hand_mlp

N, EXPERTS = 12, 4


@pytest.fixture
def batch():
    return Transitions(
        torch.randn(N, 3), 2 * torch.rand(N, 2) - 1, torch.randn(N, 3), torch.zeros(N), EXPERTS
    )


@pytest.fixture
def make(small_config):
    def made(name, learner):
        return learner(3, 2, small_config.replace({"agent.name": name, "agent.hidden_dim": 8}))

    return made


def shaken(module):
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


def test_the_losses_of_gail_and_hype_are_their_formulas():
    experts, behaviour = torch.randn(4).double(), torch.randn(6).double()
    d = [1 / (1 + np.exp(-x.numpy())) for x in (experts, behaviour)]
    by_hand = -np.log(d[0]).mean() - np.log(1 - d[1]).mean()
    assert classifier_loss(experts, behaviour).item() == pytest.approx(by_hand, rel=1e-12)
    by_hand = behaviour.numpy().mean() - experts.numpy().mean()
    assert moment_loss(experts, behaviour).item() == pytest.approx(by_hand, rel=1e-12)


def test_the_rewards_of_gail_and_hype(make, batch):
    x = np.concatenate([batch.obs, batch.action], -1)
    for name, kind, of in (("gail", Gail, lambda f: np.log1p(np.exp(f))), ("hype", Hype, float)):
        learner = make(name, kind)
        shaken(learner.model.score)
        f = hand_mlp(learner.model.score, x, 0)[:, 0]
        expected = [of(value) for value in f]
        np.testing.assert_allclose(learner.reward_of(batch), expected, rtol=1e-4, atol=1e-5)


def test_f_is_pushed_apart_with_a_slope_near_one(make, batch):
    """The gradient of f's step is that of the loss and the penalty, of rows mixed in pairs."""
    learner = make("hype", Hype)
    shaken(learner.model.score)
    batch = Transitions(*(column[: 2 * EXPERTS] for column in batch[:4]), EXPERTS)
    state = learner.generator.get_state()
    mix = torch.rand(1, EXPERTS, 1, generator=learner.generator)[0]
    learner.generator.set_state(state)
    seen = []
    step = learner.step
    learner.step = lambda loss, optimiser: seen.append(loss.detach()) or step(loss, optimiser)
    before = learner.model.f(batch.obs, batch.action).detach()
    x = torch.cat([batch.obs, batch.action], -1)
    mixed = (mix * x[:EXPERTS] + (1 - mix) * x[EXPERTS:]).requires_grad_()
    slopes = torch.autograd.grad(learner.model.f(mixed[:, :3], mixed[:, 3:]).sum(), mixed)[0]
    by_hand = moment_loss(before[:EXPERTS], before[EXPERTS:]) + PENALTY * (
        (slopes.norm(dim=-1) - 1).square().mean()
    )
    learner.update(batch)
    torch.testing.assert_close(seen[0], by_hand)
    assert len(seen) == 4  # f, critics, policy, temperature
    learner.updates = 1
    learner.update(batch)
    assert len(seen) == 7  # f makes every tenth step


def test_gail_learns_from_behaviour_alone_and_hype_from_both(make, batch):
    assert len(make("gail", Gail).rl_rows(batch).obs) == N - EXPERTS
    assert make("hype", Hype).rl_rows(batch) is batch


def test_the_dynamics_loss_is_its_formula(make, batch):
    learner = make("hyper", hyper.Hyper)
    shaken(learner.others["dynamics"])
    x = np.concatenate([batch.obs, batch.action], -1)
    error = [
        batch.obs.numpy() + hand_mlp(learner.others["dynamics"], x, member) - batch.next_obs.numpy()
        for member in range(hyper.MEMBERS)
    ]
    loss = hyper.dynamics_loss(learner.dynamics, batch)
    assert loss.item() == pytest.approx(np.mean(np.square(error)), rel=1e-5)


def test_imagined_steps_begin_at_both_sides_and_follow_a_member(make, batch):
    learner = make("hyper", hyper.Hyper)
    shaken(learner.others["dynamics"])
    rows = learner.rl_rows(batch)
    starts = -(-N // hyper.HORIZON)
    assert rows.experts == EXPERTS and len(rows.obs) == EXPERTS + hyper.HORIZON * starts
    for column, given in zip(rows[:4], batch[:4], strict=True):
        torch.testing.assert_close(column[:EXPERTS], given[:EXPERTS])
    imagined = [column[EXPERTS:].unflatten(0, (hyper.HORIZON, starts)) for column in rows[:4]]
    obs, action, after, terminated = imagined
    torch.testing.assert_close(obs[0], batch.obs[:: hyper.HORIZON])
    torch.testing.assert_close(obs[1:], after[:-1])
    assert not terminated.any()
    with torch.no_grad():
        every = hyper.predicted(learner.dynamics, obs.flatten(0, 1), action.flatten(0, 1))
    distance = (every - after.flatten(0, 1)).abs().amax(-1)
    assert (distance.min(0).values < 1e-4).all()


def test_the_coupled_flows_loss_is_its_formula():
    cfil = pytest.importorskip("iqmpc.baselines.cfil_sac")
    experts, behaviour = torch.randn(5).double(), torch.randn(7).double()
    by_hand = np.log(np.mean(np.exp(experts.numpy()))) - behaviour.numpy().mean()
    assert cfil.coupled_loss(experts, behaviour).item() == pytest.approx(by_hand, rel=1e-12)
    assert cfil.squashed(torch.tensor(30.0).double()).item() == pytest.approx(6 * np.tanh(2))


def test_the_reward_of_flows_is_the_ratio_of_their_densities(make, batch):
    pytest.importorskip("zuko")
    from iqmpc.baselines.cfil_sac import CfilSac

    learner = make("cfil_sac", CfilSac)
    for flow in learner.model.flows:
        shaken(flow)
    x = torch.cat([batch.obs, batch.action], -1)
    with torch.no_grad():
        behaviour, experts = (flow().log_prob(x) for flow in learner.model.flows)
    by_hand = -6 * np.tanh((behaviour - experts).numpy() / 15)
    np.testing.assert_allclose(learner.reward_of(batch), by_hand, rtol=1e-5)


def test_flows_need_their_extra(make, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    from iqmpc.baselines.cfil_sac import CfilSac

    with pytest.raises(ConfigError, match=r"pip install 'iqmpc\[flows\]'"):
        make("cfil_sac", CfilSac)
