import collections
import dataclasses
import math

import numpy as np
import pytest
import torch

from iqmpc import Agent, Planner, WorldModel
from iqmpc.config import ModelConfig
from iqmpc.kernels import layers
from iqmpc.seeding import stream_seed

SMALL = ModelConfig(encoder_dim=20, hidden_dim=24, latent_dim=16, critics=3)


def test_parameter_count_of_the_paper():
    assert sum(p.numel() for p in WorldModel(91, 39).parameters()) == 4_274_259


def test_a_termination_head_is_added_and_changes_nothing_else():
    torch.manual_seed(0)
    without = WorldModel(5, 2, SMALL)
    torch.manual_seed(0)
    model = WorldModel(5, 2, dataclasses.replace(SMALL, termination=True))
    own = {k: v for k, v in model.state_dict().items() if not k.startswith("termination.")}
    assert own.keys() == without.state_dict().keys()
    assert all(torch.equal(v, without.state_dict()[k]) for k, v in own.items())
    added = sum(p.numel() for p in model.termination.parameters())
    assert added == (16 + 1 + 2) * 24 + (24 + 1 + 2) * 24 + 24 + 1
    z = model.encode(torch.randn(4, 7, 5))
    logit = layers.termination(model.weights(), z)
    assert logit.shape == (4, 7) and not logit.any()  # nothing is terminal yet
    assert not WorldModel(5, 2, SMALL, termination=False).weights().termination
    assert len(WorldModel(5, 2, SMALL, termination=True).weights().termination) == 3


def test_initialisation():
    model = WorldModel(5, 2, SMALL)
    assert model.critics[-1].weight.count_nonzero() == 0
    weight = WorldModel(91, 39).dynamics[1].weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.15) and weight.abs().max() < 2
    for linear in (*model.encoder, *model.dynamics):
        assert linear.bias.count_nonzero() == 0
        assert torch.all(linear.gamma == 1) and torch.all(linear.beta == 0)


def test_shapes_and_simplices():
    model = WorldModel(5, 2, SMALL)
    z = model.encode(torch.randn(4, 7, 5))
    action = torch.rand(4, 7, 2) * 2 - 1
    for latent in (z, model.next(z, action)):
        assert latent.shape == (4, 7, 16)
        torch.testing.assert_close(
            latent.unflatten(-1, (2, 8)).sum(-1), torch.ones(4, 7, 2), rtol=1e-5, atol=1e-5
        )
    assert model.q(z, action).shape == (3, 4, 7)


def test_modules_of_torch_compute_the_same():
    """The functions on weights against the textbook composition of torch's own modules."""
    model = WorldModel(5, 2, SMALL).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    z = torch.rand(6, 16, dtype=torch.float64)
    a = torch.rand(6, 2, dtype=torch.float64) * 2 - 1

    def normed(linear, x, k=None):
        pick = (lambda p: p) if k is None else (lambda p: p[k])
        y = torch.nn.functional.linear(x, pick(linear.weight), pick(linear.bias))
        norm = torch.nn.LayerNorm(y.shape[-1]).double()
        norm.weight.data, norm.bias.data = pick(linear.gamma), pick(linear.beta)
        return norm(y)

    mish = torch.nn.Mish()
    x = torch.cat([z, a], -1)
    h = mish(normed(model.dynamics[1], mish(normed(model.dynamics[0], x))))
    expected = normed(model.dynamics[2], h).reshape(6, 2, 8).softmax(-1).reshape(6, 16)
    torch.testing.assert_close(model.next(z, a), expected)
    for k in range(3):
        h = mish(normed(model.critics[1], mish(normed(model.critics[0], x, k)), k))
        last = model.critics[2]
        torch.testing.assert_close(model.q(z, a)[k], h @ last.weight[k, 0] + last.bias[k, 0])


def test_mish_is_torchs_over_the_whole_range():
    x = torch.cat([torch.linspace(-100, 100, 4001), torch.tensor([-1e30, 1e30])]).double()
    x.requires_grad_()
    ours, theirs = layers.mish(x), torch.nn.functional.mish(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    for y in (ours, theirs):
        y.sum().backward(retain_graph=True)
    (a,), (b,) = (torch.autograd.grad(y.sum(), x, retain_graph=True) for y in (ours, theirs))
    torch.testing.assert_close(a[:-2], b[:-2], rtol=1e-8, atol=1e-10)
    assert layers.mish(torch.tensor(math.nan)).isnan()


def test_log_density_is_the_exact_squashed_gaussian():
    weights = WorldModel(5, 3, SMALL).double().weights()
    z, noise = torch.rand(10, 16).double(), torch.randn(10, 3).double()
    action, log_prob = layers.policy_sample(weights, z, noise)
    mean, log_std = layers.policy(weights, z)
    squashed = torch.distributions.TransformedDistribution(
        torch.distributions.Normal(mean, log_std.exp()),
        [torch.distributions.transforms.TanhTransform()],
    )
    torch.testing.assert_close(log_prob, squashed.log_prob(action).sum(-1), rtol=1e-6, atol=1e-6)
    assert -10 <= log_std.min() and log_std.max() <= 2


@pytest.mark.parametrize("form", ["exact", "presquash"])
def test_log_density_stays_finite_in_saturation(form):
    model = WorldModel(5, 1, SMALL)
    for noise in (1e4, -1e4):
        model.zero_grad()
        action, log_prob = layers.policy_sample(
            model.weights(), torch.rand(1, 16), torch.full((1, 1), noise), form
        )
        assert action.abs().item() == 1 and log_prob.isfinite().all()
        log_prob.sum().backward()
        assert all(p.grad.isfinite().all() for p in model.policy.parameters())


def test_presquash_is_the_gaussian_and_a_share_of_the_squashing():
    """The released code's log π, A Σ Gaussian - Σ log(max(1 - a², 0) + 1e-6), divided by A."""
    weights = WorldModel(5, 3, SMALL).double().weights()
    z, noise = torch.rand(10, 16).double(), torch.randn(10, 3).double()
    noise[0] = 1e3  # saturated: what the 1e-6 is for
    action, log_prob = layers.policy_sample(weights, z, noise, "presquash")
    mean, log_std = layers.policy(weights, z)
    gaussian = (
        torch.distributions.Normal(mean, log_std.exp())
        .log_prob(mean + log_std.exp() * noise)
        .sum(-1)
    )
    squash = torch.log(torch.relu(1 - action**2) + 1e-6).sum(-1)
    torch.testing.assert_close(3 * log_prob, 3 * gaussian - squash)
    assert torch.equal(action, layers.policy_sample(weights, z, noise)[0])
    assert squash[0].item() == pytest.approx(3 * math.log(1e-6))


def test_every_pair_of_different_critics_is_drawn_alike():
    generator = torch.Generator().manual_seed(0)
    pairs = torch.stack([layers.random_pair(4, generator) for _ in range(6000)])
    assert pairs.dtype == torch.int64
    found, count = pairs.sort(1).values.unique(dim=0, return_counts=True)
    assert found.tolist() == [[a, b] for a in range(4) for b in range(a + 1, 4)]
    assert (count - 1000).abs().max() < 5 * math.sqrt(1000)  # five standard deviations


def test_q_min_is_of_the_pair_and_drops_in_its_order():
    model = WorldModel(5, 2, SMALL).double()
    torch.nn.init.normal_(model.critics[-1].weight)
    weights, z, a = model.weights(), torch.rand(4, 7, 16).double(), torch.rand(4, 7, 2).double()
    keep = (torch.rand(2, 28, 24) < 0.5).double() * 2
    pair = layers.draw_pair(weights.critics, torch.tensor([2, 0]))
    every = layers.critics(weights.critics, z, a)
    torch.testing.assert_close(layers.q_min(pair, z, a), torch.minimum(every[0], every[2]))
    dropped = [
        layers.critics(weights.critics, z, a, keep[i].expand(3, -1, -1))[k]
        for i, k in enumerate((2, 0))
    ]
    assert not torch.allclose(dropped[0], every[2])
    torch.testing.assert_close(layers.q_min(pair, z, a, keep), torch.minimum(*dropped))


def test_images_have_an_encoder_of_convolutions():
    model = WorldModel((9, 64, 64), 2, SMALL)
    weights = model.weights()
    assert (
        weights.obs_shape == model.observation_spec.shape == (9, 64, 64)
        and weights.latent_dim == 16
    )
    assert [tuple(x.weight.shape) for x in weights.encoder] == [
        (32, 9, 7, 7),
        (32, 32, 5, 5),
        (32, 32, 3, 3),
        (32, 32, 3, 3),
        (16, 512),
    ]
    assert all(x.bias.count_nonzero() == 0 and x.gamma is None for x in weights.encoder)
    # the convolutions' 512 outputs are the latent where that has as many features
    assert len(WorldModel((9, 64, 64), 2).encoder) == 4
    z = model.encode(torch.randint(0, 256, (3, 9, 64, 64), dtype=torch.uint8))
    torch.testing.assert_close(z.unflatten(-1, (2, 8)).sum(-1), torch.ones(3, 2))
    assert z.std(0).mean() > 1e-3  # images differ in their latents from the start
    for flat in (5, (5,)):
        assert WorldModel(flat, 2, SMALL).observation_spec.shape == (5,)


@pytest.mark.parametrize("shape", [(9, 84, 84), (64, 64), ()])
def test_observations_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"obs_shape must be \(O,\) or \(3C, 64, 64\), got \("):
        WorldModel(shape, 2, SMALL)


def test_every_pair_of_critics_is_drawn():
    generator, drawn = torch.Generator().manual_seed(0), collections.Counter()
    for _ in range(3000):
        one, other = layers.random_pair(3, generator).tolist()
        drawn[one, other] += 1
    assert set(drawn) == {(i, j) for i in range(3) for j in range(3) if i != j}
    assert min(drawn.values()) > 400  # 500 each


def test_an_agent_plans_with_the_discount_and_entropy_of_its_settings(small_config):
    config = small_config.replace({"learner.discount": 0.7, "planner.backend": "reference"})
    torch.manual_seed(0)
    model = WorldModel(2, 2, config.model)
    for p in model.parameters():  # critics start at 0, where no discount shows
        p.data.add_(0.3 * torch.randn_like(p))
    obs = np.ones(2, np.float32)

    def planned(discount):
        planner = Planner(
            model.weights(),
            config.planner,
            discount=discount,
            entropy_coef=config.entropy_coefficient(2),
            seed=stream_seed(0, "planner"),
        )
        return planner.plan(torch.ones(1, 2))[0].numpy()

    np.testing.assert_array_equal(Agent(model, config).act(obs), planned(0.7))
    assert not np.array_equal(planned(0.7), planned(0.5))
