"""The losses of SAC and of IQ-Learn with it, by hand in float64."""

import math

import numpy as np
import pytest
import torch

from iqmpc.baselines import sac
from iqmpc.baselines.iql_sac import IqLearnSac, iq_critic_loss
from iqmpc.baselines.learner import Transitions
from iqmpc.baselines.sqil import Sqil
from iqmpc.model import layer_views
from tests.baselines.hand import hand_policy, hand_q
from tests.runs import train

DISCOUNT, TEMPERATURE = 0.9, 0.3
N, EXPERTS = 6, 2


@pytest.fixture
def parts(small_config):
    """(model, target critics, batch, noise), all float64 and none of it at its beginning."""
    config = small_config.replace({"agent.name": "iql_sac", "agent.hidden_dim": 8})
    model = IqLearnSac(3, 2, config).model.double()
    targets = model.network(5, 1, members=2).double()
    for parameter in [*model.parameters(), *targets.parameters()]:
        torch.nn.init.normal_(parameter, std=0.5)
    batch = Transitions(
        torch.randn(N, 3).double(),
        2 * torch.rand(N, 2).double() - 1,
        torch.randn(N, 3).double(),
        torch.tensor([0.0, 0, 0, 1, 0, 0]).double(),
        EXPERTS,
    )
    noise = sac.CriticNoise(torch.randn(N, 2).double(), torch.randn(N, 2).double())
    return model, targets, batch, noise


def hand_value(model, critics, obs, noise):
    action, log_prob = hand_policy(model, obs, noise)
    return hand_q(critics, obs, action).min(0) - TEMPERATURE * log_prob


def hand_backup(model, targets, batch, noise):
    value = hand_value(model, targets, batch.next_obs, noise)
    return DISCOUNT * (1 - batch.terminated.numpy()) * value


@pytest.mark.parametrize("objective", ["iq", "v_diff"])
def test_the_critics_loss_of_iq_learn_is_its_formula(parts, objective):
    model, targets, batch, noise = parts
    alpha = 0.4
    loss, metrics = iq_critic_loss(
        model.weights(),
        layer_views(targets),
        batch,
        noise,
        objective=objective,
        alpha=alpha,
        discount=DISCOUNT,
        temperature=TEMPERATURE,
    )
    backed_up = hand_backup(model, targets, batch, noise.target)
    value = hand_value(model, model.critics, batch.obs, noise.value)
    if objective == "iq":
        term = (1 - DISCOUNT) * value[:EXPERTS].mean()
    else:
        term = (value - backed_up)[EXPERTS:].mean()
    by_hand = 0.0
    for q in hand_q(model.critics, batch.obs, batch.action):
        reward = q - backed_up
        by_hand += (term - reward[:EXPERTS].mean() + (reward**2).mean() / (4 * alpha)) / 2
    assert loss.item() == pytest.approx(by_hand, rel=1e-10)
    assert float(metrics["value_term"]) == pytest.approx(term, rel=1e-10)
    difference = np.mean(hand_q(model.critics, batch.obs, batch.action), 0)
    assert float(metrics["q_difference"]) == pytest.approx(
        difference[:EXPERTS].mean() - difference[EXPERTS:].mean(), rel=1e-10
    )


def test_the_losses_of_sac_are_their_formulas(parts):
    model, targets, batch, noise = parts
    w = model.weights()
    reward = torch.randn(N).double()
    backed_up = sac.backup(
        w, layer_views(targets), batch, noise.target, DISCOUNT, torch.tensor(TEMPERATURE)
    )
    np.testing.assert_allclose(
        backed_up, hand_backup(model, targets, batch, noise.target), rtol=1e-6
    )
    q = torch.tensor(hand_q(model.critics, batch.obs, batch.action))
    by_hand = np.mean((q.numpy() - reward.numpy() - backed_up.numpy()) ** 2)
    assert float(sac.td_critic_loss(q, reward, backed_up)) == pytest.approx(by_hand, rel=1e-12)

    loss, log_prob, q = sac.policy_loss(w, batch.obs, noise.value, TEMPERATURE)
    action, by_hand = hand_policy(model, batch.obs, noise.value)
    np.testing.assert_allclose(log_prob, by_hand, rtol=1e-9)
    q_by_hand = hand_q(model.critics, batch.obs, action).min(0)
    assert loss.item() == pytest.approx((TEMPERATURE * by_hand - q_by_hand).mean(), rel=1e-9)
    loss.backward()
    assert all(p.grad is None for p in model.critics.parameters())

    log_temperature = torch.tensor(0.7, dtype=torch.float64)
    loss = sac.temperature_loss(log_temperature, log_prob, -2.0)
    assert loss.item() == pytest.approx(-0.7 * (by_hand - 2.0).mean(), rel=1e-9)


def test_the_decoded_reward_is_its_formula(parts):
    model, _, batch, _ = parts
    with torch.no_grad():
        model.log_temperature.fill_(math.log(TEMPERATURE))
        noise = torch.randn(4, N, 2).double()
        reward = model.reward(batch.obs, batch.action, batch.next_obs, batch.terminated, noise)
    values = []
    for drawn in noise:
        action, log_prob = hand_policy(model, batch.next_obs, drawn)
        values.append(
            hand_q(model.critics, batch.next_obs, action).mean(0) - TEMPERATURE * log_prob
        )
    alive = 1 - batch.terminated.numpy()
    by_hand = hand_q(model.critics, batch.obs, batch.action).mean(
        0
    ) - model.discount * alive * np.mean(values, 0)
    np.testing.assert_allclose(reward, by_hand, rtol=1e-9)


def test_sqil_rewards_demonstrations(small_config, parts):
    learner = Sqil(3, 2, small_config.replace({"agent.name": "sqil", "agent.hidden_dim": 8}))
    assert learner.reward_of(parts[2]).tolist() == [1, 1, 0, 0, 0, 0]


def test_an_update_moves_targets_by_tau_and_the_temperature_to_the_entropy(small_config, parts):
    config = small_config.replace({"agent.name": "sqil", "agent.hidden_dim": 8})
    learner = Sqil(3, 2, config)
    _, _, batch, _ = parts
    batch = Transitions(*(x.float() for x in batch[:4]), batch.experts)
    before = [t.clone() for t in learner.others["targets"].parameters()]
    metrics = learner.update(batch)
    for old, target, live in zip(
        before,
        learner.others["targets"].parameters(),
        learner.model.critics.parameters(),
        strict=True,
    ):
        torch.testing.assert_close(target, old + config.learner.tau * (live - old))
    change = learner.model.log_temperature.item()
    assert change and (change < 0) == (float(metrics["entropy"]) > -2)
    fixed = Sqil(3, 2, config.replace({"agent.temperature": 0.2}))
    fixed.update(batch)
    assert fixed.model.log_temperature.exp().item() == pytest.approx(0.2)


def test_an_update_that_is_not_finite_changes_nothing_of_it(small_config, parts):
    config = small_config.replace({"agent.name": "iql_sac", "agent.hidden_dim": 8})
    learner = IqLearnSac(3, 2, config)
    batch = Transitions(*(x.float() for x in parts[2][:4]), EXPERTS)
    learner.update(batch)
    before = {k: v.clone() for k, v in learner.state_dict().items() if k != "generator"}
    learner.update(batch._replace(obs=batch.obs * torch.nan))
    after = learner.state_dict()
    assert learner.skipped_updates == 2  # the critics' and the policy's step
    assert all(torch.equal(after[k], v) for k, v in before.items() if k != "skipped_updates")


def test_iq_learn_improves_its_return(tmp_path, small_config, point_env, point_demonstrations):
    config = small_config.replace(
        {
            "agent.name": "iql_sac",
            "agent.hidden_dim": 64,
            "learner.horizon": 1,
            "learner.batch": 64,
            "learner.lr": 1e-3,
            "train.steps": 600,
            "train.random_steps": 100,
            "train.initial_updates": 100,
            "train.eval_every": 1000,
            "train.final_episodes": 10,
        }
    )
    summary = train(config, point_env, point_demonstrations, tmp_path / "run")
    assert summary["ratio"] > 0.7
