"""Every loss against an independent float64 computation, written out row by row in NumPy."""

import copy
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

H, N, OBS, A, K, Z, HIDDEN = 3, 2, 4, 2, 3, 8, 5  # N experts and N behaviour rows
GAMMA, BETA, RHO, ALPHA = 0.97, 0.05, 0.6, 0.7


class Plain:
    """The model in NumPy, one vector at a time; log π in `form`."""

    def __init__(self, weights, form="exact"):
        def numpy(stack):
            return [[None if t is None else t.detach().numpy() for t in layer] for layer in stack]

        self.encoder, self.dyn, self.pi, self.critic, self.head = (
            numpy(s)
            for s in (
                weights.encoder,
                weights.dynamics,
                weights.policy,
                weights.critics,
                weights.termination,
            )
        )
        self.form = form

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

    def q_min(self, pair, z, a, keep, row):
        """keep [2, rows, hidden], in the pair's order, or None."""
        return min(
            self.q(k, z, a, None if keep is None else keep[i, row]) for i, k in enumerate(pair)
        )

    def sample(self, z, eps):
        out = self.mlp(self.pi, z)
        mean, log_std = out[:A], -10 + 0.5 * 12 * (np.tanh(out[A:]) + 1)
        a = np.tanh(mean + np.exp(log_std) * eps)
        density = np.prod(np.exp(-0.5 * eps**2) / (np.exp(log_std) * math.sqrt(2 * math.pi)))
        if self.form == "exact":
            return a, math.log(density / np.prod(1 - a**2))
        clipped = [math.log(max(1 - x * x, 0) + 1e-6) for x in a]
        return a, math.log(density) - sum(clipped) / A


def randomised(seed, **options):
    torch.manual_seed(seed)
    model = WorldModel(
        OBS, A, ModelConfig(encoder_dim=6, hidden_dim=HIDDEN, latent_dim=Z, critics=K, **options)
    )
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return model.double()


def multipliers(*shape):
    return (torch.rand(*shape, HIDDEN) < 0.8).double() / 0.8


@pytest.fixture
def case():
    model, target = randomised(1), randomised(2)
    batch = Batch(
        torch.randn(H + 1, 2 * N, OBS).double(),
        torch.rand(H, 2 * N, A).double() * 2 - 1,
        torch.randn(H, 2 * N).double(),
        (torch.rand(H, 2 * N) < 0.3).double(),
        N,
    )
    noise = ModelNoise(
        torch.randn(H, 2 * N, A).double(),
        torch.randn(H, 2 * N, A).double(),
        multipliers(K, H * 2 * N),
        torch.rand(H, N, 1).double(),
        torch.tensor([2, 0]),
    )
    return model, target, batch, noise


def dropped_everywhere(noise, objective):
    """The draws of `learner.dropout: always`."""
    values = {"iq": N, "v_diff": H * N}.get(objective)
    return noise._replace(
        keep_target=multipliers(2, H * 2 * N),
        keep_value=None if values is None else multipliers(2, values),
        keep_penalty=multipliers(K, H * N),
    )


def array(t):
    return None if t is None else t.detach().numpy()


def by_hand(case, config, penalise=False, live=None):
    """Loss and metrics of the formulas, with loops over t, k and rows.

    `live` is the model through which the loss is differentiated; what the formulas hold fixed
    (ẑ, V̄, π's actions and densities, the penalty's latents) stays that of `case`.
    """
    model, target, batch, noise = case
    live = model if live is None else live
    fixed, m = (Plain(x.weights(), config.entropy) for x in (model, live))
    bar, n, rows = Plain(target.weights()), batch.experts, batch.action.shape[1]
    obs, action, reward, done = (t.numpy() for t in batch[:4])
    eps, eps0, pair = noise.target.numpy(), noise.initial.numpy(), noise.pair.tolist()
    keep, keep_target, keep_value = map(array, (noise.keep, noise.keep_target, noise.keep_value))

    def rollout(m):
        z = [[m.h(obs[0, b]) for b in range(rows)]]
        for t in range(H):
            z.append([m.d(z[t][b], action[t, b]) for b in range(rows)])
        return z

    z, z_fixed = rollout(m), rollout(fixed)
    hat = [[fixed.h(obs[t + 1, b]) for b in range(rows)] for t in range(H)]
    consistency = (
        sum(
            RHO**t * np.mean([(z[t + 1][b] - hat[t][b]) ** 2 for b in range(rows)])
            for t in range(H)
        )
        / H
    )

    target_value = np.zeros((H, rows))
    for t in range(H):
        for b in range(rows):
            a, log_prob = fixed.sample(hat[t][b], eps[t, b])
            target_value[t, b] = (
                bar.q_min(pair, hat[t][b], a, keep_target, t * rows + b) - BETA * log_prob
            )
    backup = GAMMA * (1 - done) * target_value

    def value(t, b, row):
        a, log_prob = fixed.sample(z_fixed[t][b], eps0[t, b])
        return m.q_min(pair, z[t][b], a, keep_value, row) - BETA * log_prob

    q = np.array(
        [
            [
                [
                    m.q(k, z[t][b], action[t, b], None if keep is None else keep[k, t * rows + b])
                    for b in range(rows)
                ]
                for t in range(H)
            ]
            for k in range(K)
        ]
    )
    r = q - backup
    metrics = {
        "consistency": consistency,
        "target_value": target_value.mean(),
        "q_behaviour": q[:, :, n:].mean(),
    }
    if config.objective == "td":
        parts = [[np.mean((r[k, t] - reward[t]) ** 2) for t in range(H)] for k in range(K)]
    else:
        if config.objective == "iq":
            terms = [(1 - GAMMA) * np.mean([value(0, b, b) for b in range(n)])] * H
        else:
            behaviour = rows - n
            terms = [
                np.mean([value(t, b, t * behaviour + b - n) - backup[t, b] for b in range(n, rows)])
                for t in range(H)
            ]
        parts = [
            [
                -np.mean(r[k, t, :n]) + terms[t] + np.mean(r[k, t] ** 2) / (4 * config.alpha)
                for t in range(H)
            ]
            for k in range(K)
        ]
        metrics |= {
            "q_expert": q[:, :, :n].mean(),
            "q_difference": q[:, :, :n].mean() - q[:, :, n:].mean(),
            "reward_expert": r[:, :, :n].mean(),
            "reward_behaviour": r[:, :, n:].mean(),
            "value_term": np.mean(terms),
        }
    critic = sum(RHO**t * parts[k][t] for k in range(K) for t in range(H)) / (H * K)
    if penalise:  # its own tests say what it is
        latents = torch.tensor(np.array(z_fixed[:-1]))
        penalty = losses.gradient_penalty(
            live.weights().critics, latents, batch.action, noise.mix, RHO, noise.keep_penalty
        )
        metrics["gradient_penalty"] = penalty.item()
        critic += config.c_gp * penalty.item()
    loss = config.c_cons * consistency + config.c_iq * critic
    metrics["critic_loss"] = critic
    if m.head:
        logits = np.array([[m.mlp(m.head, z[t + 1][b])[0] for b in range(rows)] for t in range(H)])
        p, w = 1 / (1 + np.exp(-logits)), config.termination_weight
        ends = (
            sum(
                RHO**t * np.mean(-w * done[t] * np.log(p[t]) - (1 - done[t]) * np.log(1 - p[t]))
                for t in range(H)
            )
            / H
        )
        right, claimed = ((p > 0.5) & (done == 1)).sum(), (p > 0.5).sum()
        assert 0 < right < claimed < p.size and 0 < done.sum() < done.size
        metrics |= {
            "termination_loss": ends,
            "termination_recall": right / done.sum(),
            "termination_precision": right / claimed,
        }
        loss += config.c_termination * ends
    return loss, metrics


def settings(objective, **others):
    """Everything away from its default."""
    return LearnerConfig(
        **{
            "objective": objective,
            "alpha": ALPHA,
            "rho": RHO,
            "beta": 1.0,
            "c_cons": 3.0,
            "c_iq": 0.4,
            "c_gp": 0.7,
            "c_termination": 1.7,
            "termination_weight": 4.0,
            **others,
        }
    )


def run(case, config, penalise=False):
    model, target, batch, noise = case
    return losses.model_loss(
        model.weights(), target.weights().critics, batch, noise, config, GAMMA, BETA, penalise
    )


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


# (objective, log π, dropout, gradient penalty, termination head)
VARIANTS = [
    ("iq", "exact", "regression", False, False),
    ("iq", "presquash", "always", True, False),
    ("iq", "exact", "none", True, True),
    ("v_diff", "exact", "always", True, True),
    ("v_diff", "presquash", "regression", False, False),
    ("td", "exact", "always", False, True),
    ("td", "presquash", "regression", False, False),
]
varied = pytest.mark.parametrize(("objective", "form", "dropout", "penalise", "head"), VARIANTS)


def variant(case, objective, form, dropout, head):
    model, target, batch, noise = case
    if dropout == "always":
        noise = dropped_everywhere(noise, objective)
    if dropout == "none":
        noise = noise._replace(keep=None)
    case = model, target, batch, noise
    return with_head(case) if head else case, settings(objective, entropy=form)


@varied
def test_model_loss_and_its_metrics(case, objective, form, dropout, penalise, head):
    case, config = variant(case, objective, form, dropout, head)
    loss, expected = by_hand(case, config, penalise)
    found, latents, metrics = run(case, config, penalise)
    assert found.item() == pytest.approx(loss, rel=1e-10)
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert metrics[name].item() == pytest.approx(value, rel=1e-9), name
        assert not metrics[name].requires_grad and metrics[name].dim() == 0
    assert not latents.requires_grad and latents.shape == (H + 1, 2 * N, Z)


def slopes(value, model, parameters, step=1e-5):
    """Derivative of `value(model)` along one random direction in each parameter: differences."""
    for name, p in parameters:
        direction = torch.randn_like(p)
        ends = []
        for sign in (1, -1):
            moved = copy.deepcopy(model)
            dict(moved.named_parameters())[name].data += sign * step * direction
            ends.append(value(moved))
        yield name, p, direction, (ends[0] - ends[1]) / (2 * step)


@varied
def test_gradient_of_the_model_loss(case, objective, form, dropout, penalise, head):
    """Differences of the loss by hand, in which the fixed parts do not move; π has none."""
    case, config = variant(case, objective, form, dropout, head)
    model, target, _, _ = case
    run(case, config, penalise)[0].backward()
    for p in (*model.policy.parameters(), *target.parameters()):
        assert p.grad is None
    parameters = [(name, p) for name, p in model.named_parameters() if "policy" not in name]
    for name, p, direction, slope in slopes(
        lambda live: by_hand(case, config, penalise, live)[0], model, parameters
    ):
        assert p.grad.abs().sum() > 0
        assert (p.grad * direction).sum().item() == pytest.approx(slope, rel=1e-5, abs=1e-8), name


@pytest.mark.parametrize("dropout", [False, True])
def test_gradient_penalty(case, dropout):
    """Against central differences of Q, interpolating expert row b with behaviour row b."""
    model, _, batch, noise = case
    keep = multipliers(K, H * N) if dropout else None
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
                    up, down = (
                        m.q(k, p[:Z], p[Z:], None if keep is None else keep[k, t * N + b].numpy())
                        for p in (at + step, at - step)
                    )
                    slope.append((up - down) / 2e-5)
                errors.append((math.sqrt(np.square(slope).sum()) - 1) ** 2)
            total += RHO**t * np.mean(errors)
    penalty = losses.gradient_penalty(
        model.weights().critics, z, batch.action, noise.mix, RHO, keep
    )
    assert penalty.item() == pytest.approx(total / (H * K), rel=1e-6)


@pytest.mark.parametrize("dropout", [False, True])
def test_gradient_of_the_gradient_penalty(case, dropout):
    """Differences of its value; none through the latents."""
    model, _, batch, noise = case
    keep = multipliers(K, H * N) if dropout else None
    z = torch.rand(H, 2 * N, Z).double().requires_grad_()

    def value(model):
        return losses.gradient_penalty(
            model.weights().critics, z, batch.action, noise.mix, RHO, keep
        )

    value(model).backward()
    assert z.grad is None
    assert model.critics[0].bias.grad.abs().max() > 1e-3
    for name, p, direction, slope in slopes(
        lambda m: value(m).item(), model, model.critics.named_parameters("critics")
    ):
        found = 0.0 if p.grad is None else (p.grad * direction).sum().item()
        assert found == pytest.approx(slope, rel=1e-5, abs=1e-8), name


def test_gradient_penalty_is_differentiable_at_the_initial_critic():
    """The last layer starts at zero, where the norm's own gradient is infinite."""
    model = WorldModel(
        OBS, A, ModelConfig(encoder_dim=6, hidden_dim=HIDDEN, latent_dim=Z, critics=K)
    )
    losses.gradient_penalty(
        model.weights().critics,
        torch.rand(H, 2 * N, Z),
        torch.rand(H, 2 * N, A),
        torch.rand(H, N, 1),
        RHO,
    ).backward()
    assert all(p.grad.isfinite().all() for p in model.critics.parameters() if p.grad is not None)


@pytest.mark.parametrize("form", ["exact", "presquash"])
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("cloned", [False, True])
def test_policy_loss_its_metrics_and_its_gradient(case, form, dropout, cloned):
    """By hand, and its differences; the first rows are saturated, where the forms differ most."""
    model, _, _, noise = case
    eps = torch.randn(H + 1, 2 * N, A).double()
    z = torch.rand(H + 1, 2 * N, Z).double()
    keep = multipliers(2, (H + 1) * 2 * N) if dropout else None
    model.policy[-1].bias.data += torch.tensor([2.0, -2.0, 0.3, 0.5]).double()
    shown = 2 * torch.rand(H, N, A).double() - 1

    def expected(model):
        m, terms = Plain(model.weights(), form), []
        for t in range(H + 1):
            for b in range(2 * N):
                a, log_prob = m.sample(z[t, b].numpy(), eps[t, b].numpy())
                terms.append(
                    (
                        log_prob,
                        m.q_min(
                            noise.pair.tolist(), z[t, b].numpy(), a, array(keep), t * 2 * N + b
                        ),
                        a,
                    )
                )
        log_prob, q, actions = map(np.array, zip(*terms, strict=True))
        weight = np.repeat([RHO**t for t in range(H + 1)], 2 * N)
        error = np.mean(
            [
                RHO**t * (actions[t * 2 * N + b] - shown[t, b].numpy()) ** 2
                for t in range(H)
                for b in range(N)
            ]
        )
        loss = (weight * (BETA * log_prob - q)).mean() + (0.7 * error if cloned else 0)
        return loss, -log_prob.mean(), q.mean(), error, actions

    latents = z.clone().requires_grad_()
    loss, metrics = losses.policy_loss(
        model.weights(),
        latents,
        PolicyNoise(eps, noise.pair, keep),
        RHO,
        BETA,
        form,
        *((shown, 0.7) if cloned else ()),
    )
    value, entropy, q, error, actions = expected(model)
    assert abs(actions).max() > 0.99
    assert loss.item() == pytest.approx(value, rel=1e-10)
    assert {k: v.item() for k, v in metrics.items()} == pytest.approx(
        {"policy_loss": value, "entropy": entropy, "q_policy": q}
        | ({"cloning_error": error} if cloned else {}),
        rel=1e-10,
    )
    loss.backward()
    for part in (model.encoder, model.dynamics, model.critics):
        assert all(p.grad is None for p in part.parameters())
    assert latents.grad is None
    for name, p, direction, slope in slopes(
        lambda m: expected(m)[0], model, model.policy.named_parameters("policy")
    ):
        assert p.grad.abs().sum() > 0
        assert (p.grad * direction).sum().item() == pytest.approx(slope, rel=1e-5, abs=1e-8), name


def test_what_is_cloned_and_with_what_weight(case):
    """The demonstrations' actions, by c_bc (1 + |their mean Q|), which carries no gradient."""
    _, _, batch, _ = case
    metrics = {"q_expert": torch.tensor(-3.0, requires_grad=True)}
    shown, weight = losses.cloning(batch, metrics, 0.5)
    assert torch.equal(shown, batch.action[:, : batch.experts]) and shown.shape[1] == N
    assert weight.item() == 2.0 and not weight.requires_grad
    assert losses.cloning(batch, metrics, 0.0) == ()
    assert losses.cloning(batch._replace(experts=0), metrics, 0.5) == ()


def test_consistency_targets_are_constants(case):
    """The encoder learns from z_0 alone: observations after the first carry no gradient."""
    model, target, batch, noise = case
    obs = batch.obs.clone().requires_grad_()
    loss, _, _ = run((model, target, batch._replace(obs=obs), noise), settings("iq"))
    loss.backward()
    assert obs.grad[0].abs().sum() > 0 and obs.grad[1:].abs().sum() == 0


def test_terminal_transitions_do_not_bootstrap(case):
    model, target, batch, noise = case
    batch = batch._replace(terminated=torch.ones_like(batch.terminated))
    changed = [map_layers(lambda t, s=s: t + s, target.weights().critics) for s in (0.0, 1.0)]
    first, second = (
        losses.model_loss(
            model.weights(), critics, batch, noise, settings("iq"), GAMMA, BETA, False
        )[0]
        for critics in changed
    )
    assert first.item() == second.item()


def test_termination_metrics_without_terminations_are_not_numbers():
    _, metrics = losses.termination_loss(torch.full((H, 4), -1.0), torch.zeros(H, 4), RHO, 10.0)
    assert metrics["termination_loss"].item() == pytest.approx(
        math.log1p(math.exp(-1)) * (1 + RHO + RHO**2) / H
    )
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
            weights, weights.critics, batch, noise, LearnerConfig(), GAMMA, BETA, False
        )

    there, latents, _ = loss(batch, noise._replace(shift=shift))
    moved = batch._replace(obs=layers.shifted(batch.obs, shift))
    before, same, _ = loss(moved, noise)
    assert torch.equal(there, before) and torch.equal(latents, same)
    assert not torch.equal(there, loss(batch, noise)[0])
    there.backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.encoder.parameters())
