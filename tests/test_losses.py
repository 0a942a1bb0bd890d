"""Every loss against an independent float64 computation, written out row by row in NumPy."""

import math

import numpy as np
import pytest
import torch

from iqmpc import losses
from iqmpc.config import LearnerConfig, ModelConfig
from iqmpc.kernels import layers
from iqmpc.kernels.weights import map_layers
from iqmpc.losses import Batch, ModelNoise, PolicyNoise
from iqmpc.model import WorldModel

H, N, OBS, A, K, Z = 3, 2, 4, 2, 3, 8  # N experts and N behaviour rows
GAMMA, BETA, RHO, ALPHA = 0.97, 0.05, 0.5, 0.7


class Plain:
    """The model in NumPy, one vector at a time."""

    def __init__(self, weights):
        def numpy(stack):
            return [[None if t is None else t.detach().numpy() for t in layer] for layer in stack]

        self.encoder, self.dyn, self.pi, self.critic, self.head = (
            numpy(s) for s in (weights.encoder, weights.dynamics, weights.policy, weights.critics,
                               weights.termination))

    @staticmethod
    def layer(layer, x, keep=None):
        weight, bias, gamma, beta = layer
        y = weight @ x + bias
        if keep is not None:
            y = y * keep
        if gamma is None:
            return y
        y = (y - y.mean()) / math.sqrt(((y - y.mean()) ** 2).mean() + 1e-5)
        return y * gamma + beta

    def mlp(self, stack, x, keep=None):
        for i, layer in enumerate(stack):
            x = self.layer(layer, x, keep if i == 0 else None)
            if i < len(stack) - 1:
                x = x * np.tanh(np.log1p(np.exp(x)))
        return x

    @staticmethod
    def simnorm(x):
        e = np.exp(x.reshape(-1, 8))
        return (e / e.sum(1, keepdims=True)).ravel()

    def h(self, s):
        return self.simnorm(self.mlp(self.encoder, s))

    def d(self, z, a):
        return self.simnorm(self.mlp(self.dyn, np.concatenate([z, a])))

    def q(self, k, z, a, keep=None):
        stack = [[None if t is None else t[k] for t in layer] for layer in self.critic]
        return self.mlp(stack, np.concatenate([z, a]), keep)[0]

    def sample(self, z, eps):
        out = self.mlp(self.pi, z)
        mean, log_std = out[:A], -10 + 0.5 * 12 * (np.tanh(out[A:]) + 1)
        u = mean + np.exp(log_std) * eps
        density = np.prod(np.exp(-0.5 * eps**2) / (np.exp(log_std) * math.sqrt(2 * math.pi)))
        return np.tanh(u), math.log(density / np.prod(1 - np.tanh(u) ** 2))

    def v(self, pi, pair, z, eps):
        a, log_prob = pi.sample(z, eps)
        return min(self.q(k, z, a) for k in pair) - BETA * log_prob


def randomised(seed, **options):
    torch.manual_seed(seed)
    model = WorldModel(OBS, A, ModelConfig(
        encoder_dim=6, hidden_dim=5, latent_dim=Z, critics=K, **options))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return model.double()


@pytest.fixture
def case():
    model, target = randomised(1), randomised(2)
    batch = Batch(
        torch.randn(H + 1, 2 * N, OBS).double(), torch.rand(H, 2 * N, A).double() * 2 - 1,
        torch.randn(H, 2 * N).double(), (torch.rand(H, 2 * N) < 0.3).double(), N)
    noise = ModelNoise(
        torch.randn(H, 2 * N, A).double(), torch.randn(H, 2 * N, A).double(),
        (torch.rand(K, H * 2 * N, 5) < 0.8).double() / 0.8, torch.rand(H, N, 1).double(),
        torch.tensor([2, 0]))
    return model, target, batch, noise


def by_hand(case, objective, dropout=True):
    """(consistency, critic loss) of the formulas, with loops over t, k and rows."""
    model, target, batch, noise = case
    m, bar = Plain(model.weights()), Plain(target.weights())
    obs, action, reward, done = (t.numpy() for t in batch[:4])
    eps, eps0, keep = noise.target.numpy(), noise.initial.numpy(), noise.keep.numpy()
    pair, rows = noise.pair.tolist(), 2 * N
    z = [[m.h(obs[0, b]) for b in range(rows)]]
    for t in range(H):
        z.append([m.d(z[t][b], action[t, b]) for b in range(rows)])
    hat = [[m.h(obs[t + 1, b]) for b in range(rows)] for t in range(H)]
    consistency = sum(
        RHO**t * np.mean([(z[t + 1][b] - hat[t][b]) ** 2 for b in range(rows)])
        for t in range(H)) / H
    backup = [[GAMMA * (1 - done[t, b]) * bar.v(m, pair, hat[t][b], eps[t, b])
               for b in range(rows)] for t in range(H)]
    total = 0.0
    for k in range(K):
        for t in range(H):
            r = [m.q(k, z[t][b], action[t, b], keep[k, t * rows + b] if dropout else None)
                 - backup[t][b] for b in range(rows)]
            if objective == "td":
                part = np.mean([(r[b] - reward[t, b]) ** 2 for b in range(rows)])
            else:
                part = -np.mean(r[:N]) + np.mean(np.square(r)) / (4 * ALPHA)
                if objective == "iq":
                    part += (1 - GAMMA) * np.mean(
                        [m.v(m, pair, z[0][b], eps0[0, b]) for b in range(N)])
                else:
                    part += np.mean([m.v(m, pair, z[t][b], eps0[t, b]) - backup[t][b]
                                     for b in range(N, rows)])
            total += RHO**t * part
    return consistency, total / (H * K)


def settings(objective):
    return LearnerConfig(objective=objective, alpha=ALPHA, rho=RHO, beta=BETA)


def run(case, objective, penalise=False):
    model, target, batch, noise = case
    return losses.model_loss(model.weights(), target.weights().critics, batch, noise,
                             settings(objective), GAMMA, BETA, penalise)


@pytest.mark.parametrize("objective", ["iq", "v_diff", "td"])
def test_model_and_critic_loss(case, objective):
    consistency, critic = by_hand(case, objective)
    loss, _, metrics = run(case, objective)
    assert metrics["consistency"].item() == pytest.approx(consistency, rel=1e-10)
    assert metrics["critic_loss"].item() == pytest.approx(critic, rel=1e-10)
    assert loss.item() == pytest.approx(20 * consistency + 0.1 * critic, rel=1e-10)


def test_gradient_penalty(case):
    """Against central differences of Q, interpolating expert row b with behaviour row b."""
    model, _, batch, noise = case
    m, mix = Plain(model.weights()), noise.mix.numpy()
    z = torch.rand(H, 2 * N, Z).double()
    x = np.concatenate([z.numpy(), batch.action.numpy()], -1)
    total = 0.0
    for k in range(K):
        for t in range(H):
            errors = []
            for b in range(N):
                at = mix[t, b] * x[t, b] + (1 - mix[t, b]) * x[t, N + b]
                slope = []
                for i in range(Z + A):
                    step = np.eye(Z + A)[i] * 1e-5
                    up, down = (m.q(k, p[:Z], p[Z:]) for p in (at + step, at - step))
                    slope.append((up - down) / 2e-5)
                errors.append((math.sqrt(np.square(slope).sum()) - 1) ** 2)
            total += RHO**t * np.mean(errors)
    penalty = losses.gradient_penalty(model.weights().critics, z, batch.action, noise.mix, RHO)
    assert penalty.item() == pytest.approx(total / (H * K), rel=1e-6)


def test_gradient_penalty_enters_the_loss_and_trains_the_critics_alone(case):
    model, _, _, _ = case
    plain, _, _ = run(case, "iq")
    penalised, _, metrics = run(case, "iq", penalise=True)
    assert (penalised - plain).item() == pytest.approx(
        0.1 * metrics["gradient_penalty"].item(), rel=1e-8)
    difference = torch.autograd.grad(
        penalised - plain, [*model.critics.parameters(), *model.encoder.parameters()],
        allow_unused=True)
    critics = len(list(model.critics.parameters()))
    assert any(g.abs().max() > 1e-6 for g in difference[:critics] if g is not None)
    assert all(g.abs().max() < 1e-12 for g in difference[critics:])


def test_gradient_penalty_is_differentiable_at_the_initial_critic():
    """The last layer starts at zero, where the norm's own gradient is infinite."""
    model = WorldModel(OBS, A, ModelConfig(encoder_dim=6, hidden_dim=5, latent_dim=Z, critics=K))
    losses.gradient_penalty(model.weights().critics, torch.rand(H, 2 * N, Z),
                            torch.rand(H, 2 * N, A), torch.rand(H, N, 1), RHO).backward()
    assert all(p.grad.isfinite().all() for p in model.critics.parameters() if p.grad is not None)


def test_policy_loss(case):
    model, _, _, noise = case
    m, eps = Plain(model.weights()), torch.randn(H + 1, 2 * N, A).double()
    latents = torch.rand(H + 1, 2 * N, Z).double()
    total = 0.0
    for t in range(H + 1):
        terms = []
        for b in range(2 * N):
            z = latents[t, b].numpy()
            a, log_prob = m.sample(z, eps[t, b].numpy())
            terms.append(BETA * log_prob - min(m.q(k, z, a) for k in noise.pair.tolist()))
        total += RHO**t * np.mean(terms)
    loss, _ = losses.policy_loss(
        model.weights(), latents, PolicyNoise(eps, noise.pair), RHO, BETA)
    assert loss.item() == pytest.approx(total / (H + 1), rel=1e-10)


@pytest.mark.parametrize("objective", ["iq", "v_diff", "td"])
def test_the_model_step_moves_all_but_the_policy(case, objective):
    model, target, _, _ = case
    run(case, objective, penalise=objective != "td")[0].backward()
    for part in (model.encoder, model.dynamics, model.critics):
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())
    for part in (model.policy, target):
        assert all(p.grad is None for p in part.parameters())


def test_the_policy_step_moves_the_policy_alone(case):
    model, _, _, noise = case
    latents = model.encode(torch.randn(H + 1, 2 * N, OBS).double())
    loss, _ = losses.policy_loss(
        model.weights(), latents, PolicyNoise(torch.randn(H + 1, 2 * N, A).double(), noise.pair),
        RHO, BETA)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.policy.parameters())
    for part in (model.encoder, model.dynamics, model.critics):
        assert all(p.grad is None for p in part.parameters())


def test_consistency_targets_are_constants(case):
    """The encoder learns from z_0 alone: observations after the first carry no gradient."""
    model, target, batch, noise = case
    obs = batch.obs.clone().requires_grad_()
    loss, _, _ = run((model, target, batch._replace(obs=obs), noise), "iq")
    loss.backward()
    assert obs.grad[0].abs().sum() > 0 and obs.grad[1:].abs().sum() == 0


def test_terminal_transitions_do_not_bootstrap(case):
    model, target, batch, noise = case
    batch = batch._replace(terminated=torch.ones_like(batch.terminated))
    changed = [map_layers(lambda t, s=s: t + s, target.weights().critics) for s in (0.0, 1.0)]
    first, second = (
        losses.model_loss(model.weights(), critics, batch, noise, settings("iq"), GAMMA, BETA,
                          False)[0] for critics in changed)
    assert first.item() == second.item()


def with_head(case):
    model = randomised(3, termination=True)
    model.load_state_dict(case[0].state_dict(), strict=False)
    with torch.no_grad():  # so that it claims some of the rows and not others
        z, logits = model.encode(case[2].obs[0]), []
        for action in case[2].action:
            z = model.next(z, action)
            logits.append(layers.termination(model.weights(), z))
        model.termination[-1].bias -= torch.stack(logits).median()
    return model, *case[1:]


@pytest.mark.parametrize("objective", ["iq", "td"])
def test_termination_loss(case, objective):
    """-w d log p - (1 - d) log(1 - p) of z_{t+1} as the rollout gives it, on top of the rest."""
    plain, _, _ = run(case, objective)
    case = with_head(case)
    loss, _, metrics = run(case, objective)
    model, _, batch, _ = case
    m, done, total = Plain(model.weights()), batch.terminated.numpy(), 0.0
    z = [m.h(batch.obs[0, b].numpy()) for b in range(2 * N)]
    claimed = np.zeros((H, 2 * N), bool)
    for t in range(H):
        z = [m.d(z[b], batch.action[t, b].numpy()) for b in range(2 * N)]
        p = np.array([1 / (1 + math.exp(-m.mlp(m.head, z[b])[0])) for b in range(2 * N)])
        claimed[t] = p > 0.5
        total += RHO**t * np.mean(-10 * done[t] * np.log(p) - (1 - done[t]) * np.log(1 - p))
    assert metrics["termination_loss"].item() == pytest.approx(total / H, rel=1e-10)
    assert (loss - plain).item() == pytest.approx(total / H, rel=1e-8)
    assert 0 < claimed.sum() < claimed.size and 0 < done.sum() < done.size
    right = (claimed & (done == 1)).sum()
    assert metrics["termination_recall"].item() == pytest.approx(right / done.sum())
    assert metrics["termination_precision"].item() == pytest.approx(right / claimed.sum())


def test_the_termination_loss_shapes_the_latents_it_is_read_from(case):
    """Encoder (through z_0), dynamics and head; neither critics nor policy."""
    case = with_head(case)
    model = case[0]
    (_, _, metrics), weights = run(case, "iq"), model.weights()
    assert not metrics["termination_loss"].requires_grad
    z = [model.encode(case[2].obs[0])]
    for action in case[2].action:
        z.append(model.next(z[-1], action))
    loss, _ = losses.termination_loss(
        layers.termination(weights, torch.stack(z[1:])), case[2].terminated, RHO, 10.0)
    loss.backward()
    for part in (model.encoder, model.dynamics, model.termination):
        assert all(p.grad.abs().sum() > 0 for p in part.parameters())
    by_hand = [p.grad.clone() for p in model.dynamics.parameters()]
    model.zero_grad()
    (run(case, "iq")[0]).backward()
    whole = [p.grad.clone() for p in model.dynamics.parameters()]
    other = randomised(1)  # the same without the head
    run((other, *case[1:]), "iq")[0].backward()
    for full, rest, part in zip(whole, (p.grad for p in other.dynamics.parameters()), by_hand,
                                strict=True):
        torch.testing.assert_close(full - rest, part, rtol=1e-6, atol=1e-12)


def test_termination_metrics_without_terminations_are_not_numbers():
    _, metrics = losses.termination_loss(
        torch.full((H, 4), -1.0), torch.zeros(H, 4), RHO, 10.0)
    assert metrics["termination_loss"].item() == pytest.approx(
        math.log1p(math.exp(-1)) * (1 + RHO + RHO**2) / H)
    assert metrics["termination_recall"].isnan() and metrics["termination_precision"].isnan()


def test_images_are_shifted_as_the_noise_says(case):
    """The loss on shifted images is that on images which were shifted before."""
    _, _, batch, noise = case
    model = WorldModel((3, 64, 64), A, ModelConfig(hidden_dim=5, latent_dim=Z, critics=K)).double()
    torch.nn.init.normal_(model.critics[-1].weight)
    batch = batch._replace(obs=torch.randint(0, 256, (H + 1, 2 * N, 3, 64, 64), dtype=torch.uint8))
    shift = torch.randint(-3, 4, (H + 1, 2 * N, 2))

    def loss(batch, noise):
        weights = model.weights()
        return losses.model_loss(
            weights, weights.critics, batch, noise, LearnerConfig(), GAMMA, BETA, False)

    there, latents, _ = loss(batch, noise._replace(shift=shift))
    moved = batch._replace(obs=layers.shifted(batch.obs, shift))
    before, same, _ = loss(moved, noise)
    assert torch.equal(there, before) and torch.equal(latents, same)
    assert not torch.equal(there, loss(batch, noise)[0])
    there.backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.encoder.parameters())
