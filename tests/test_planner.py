import dataclasses
import time

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from iqmpc import Planner, WorldModel, losses
from iqmpc.config import ModelConfig, PlannerConfig
from iqmpc.errors import BackendError
from iqmpc.kernels import layers
from iqmpc.kernels.mppi_plan import resolve_plan

MODEL = ModelConfig(encoder_dim=16, hidden_dim=16, latent_dim=16, critics=3)
CONFIG = PlannerConfig(samples=32, elites=8, policy_trajectories=4, iterations=3)


@pytest.fixture(params=["reference", "cpu"])
def config(request):
    return dataclasses.replace(CONFIG, backend=request.param)


def make(config, *, problems=1, seed=0, action_dim=2, model=MODEL):
    torch.manual_seed(3)
    model = WorldModel(5, action_dim, model)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return Planner(
        model.weights(), config, discount=0.95, entropy_coef=1e-3, problems=problems, seed=seed
    ), model


@pytest.mark.parametrize("explore", [False, True])
@pytest.mark.parametrize("score", ["advantage", "unrolled"])
@pytest.mark.parametrize(
    "shape",
    [
        dict(),
        dict(horizon=1),
        dict(samples=1, elites=1, policy_trajectories=0),
        dict(policy_trajectories=32),
        dict(policy_trajectories=0),
    ],
)
def test_actions_are_in_range(config, shape, score, explore):
    planner, _ = make(dataclasses.replace(config, score=score, **shape), problems=3, action_dim=1)
    for _ in range(4):
        action = planner.plan(torch.randn(3, 5) * 10, explore=explore)
        assert action.shape == (3, 1) and action.dtype == torch.float32
        assert action.isfinite().all() and action.abs().max() <= 1
    assert planner.nonfinite_plans == 0


def test_the_plan_beats_the_prior_by_the_models_own_critic(config):
    """What MPPI is for: looking one step ahead, its action has a higher Q than the policy's."""
    config = dataclasses.replace(config, horizon=1, iterations=6, samples=256, elites=16)
    planner, model = make(config, model=dataclasses.replace(MODEL, critics=2))
    obs = torch.randn(20, 5)
    z = model.encode(obs)

    def q(action):
        return model.q(z, action).amin(0)

    planned = torch.cat([planner.plan(o[None]) for o in obs])
    uniform = torch.stack([q(torch.rand(20, 2) * 2 - 1) for _ in range(64)])
    assert q(planned).mean() > q(torch.tanh(model.pi(z)[0])).mean()
    assert (q(planned) > uniform.quantile(0.9, dim=0)).float().mean() > 0.9


def test_same_seed_same_plans_other_seed_other_plans(config):
    obs = torch.randn(6, 1, 5)
    runs = []
    for seed in (0, 0, 1):
        planner, _ = make(config, seed=seed)
        runs.append(torch.cat([planner.plan(o, explore=True) for o in obs]))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_reset_forgets(config):
    planner, _ = make(config, problems=2)
    planner.plan(torch.randn(2, 5))
    planner.reset(0)
    assert planner.mean[0].count_nonzero() == 0 and planner.mean[1].count_nonzero() > 0
    planner.reset()
    assert planner.mean.count_nonzero() == 0


def test_the_shifted_mean_is_where_sampling_starts(config):
    """With one iteration and std at its floor, samples lie around the shifted mean."""
    planner, _ = make(
        dataclasses.replace(config, iterations=1, std_max=0.05, policy_trajectories=0, elites=32)
    )
    planner.mean[0] = torch.tensor([[0.9, 0.9], [0.5, -0.5], [0.1, 0.2]])
    planner.plan(torch.randn(1, 5))
    expected = torch.tensor([[0.5, -0.5], [0.1, 0.2], [0.0, 0.0]])
    torch.testing.assert_close(planner.mean[0], expected, atol=0.06, rtol=0)


def test_problems_in_a_batch_are_independent(config):
    obs = torch.randn(3, 5)
    changed = obs.clone()
    changed[1] += 5
    together, other = (make(config, problems=3)[0].plan(o) for o in (obs, changed))
    torch.testing.assert_close(together[[0, 2]], other[[0, 2]])
    assert not torch.allclose(together[1], other[1])


def test_a_step_can_be_repeated_from_its_state(config):
    planner, _ = make(config)
    obs = torch.randn(3, 1, 5)
    planner.plan(obs[0])
    state = planner.state_dict()
    first = torch.cat([planner.plan(o, explore=True) for o in obs])
    planner.load_state_dict(state)
    assert planner.step == 1
    assert torch.equal(torch.cat([planner.plan(o, explore=True) for o in obs]), first)


@pytest.mark.parametrize("part", ["encoder", "dynamics", "policy", "critics"])
def test_nan_weights_never_reach_the_action(config, part):
    planner, model = make(config, problems=2)
    for p in getattr(model, part).parameters():
        p.data.fill_(torch.nan)
    planner.publish(model.weights())
    with pytest.warns(RuntimeWarning, match="no trajectory of a plan has a finite score"):
        action = planner.plan(torch.randn(2, 5), explore=True)
    assert action.isfinite().all() and action.abs().max() <= 1
    assert planner.nonfinite_plans == 2
    _, sound = make(config)
    planner.publish(sound.weights())
    planner.plan(torch.randn(2, 5))
    assert planner.nonfinite_plans == 2  # nothing of the bad plan was kept


@pytest.mark.parametrize("explore", [False, True])
def test_the_fallback_is_the_policys_mean_action(config, explore):
    planner, model = make(config)
    for p in model.critics.parameters():
        p.data.fill_(torch.nan)
    planner.publish(model.weights())
    obs = torch.randn(1, 5)
    with pytest.warns(RuntimeWarning):
        action = planner.plan(obs, explore=explore)
    torch.testing.assert_close(action, torch.tanh(model.pi(model.encode(obs))[0]))


def test_nan_observations_fall_back_too(config):
    planner, _ = make(config)
    with pytest.warns(RuntimeWarning):
        action = planner.plan(torch.full((1, 5), torch.nan))
    assert torch.equal(action, torch.zeros(1, 2)) and planner.nonfinite_plans == 1


def test_publish_takes_a_copy(config):
    planner, model = make(config)
    obs = torch.randn(1, 5)

    def plan():
        planner.reset()
        planner.step = 0
        return planner.plan(obs)

    first = plan()
    for p in model.parameters():
        p.data.normal_()
    assert torch.equal(plan(), first)
    planner.publish(model.weights())
    assert not torch.equal(plan(), first)


def test_without_planning_the_prior_acts(config):
    planner, model = make(dataclasses.replace(config, enabled=False))
    obs = torch.randn(1, 5)
    torch.testing.assert_close(
        planner.plan(obs), torch.tanh(layers.policy(model.weights(), model.encode(obs))[0])
    )
    assert not torch.equal(planner.plan(obs, explore=True), planner.plan(obs, explore=True))
    assert planner.missed_plans == 0


@pytest.mark.slow
def test_compiled_is_eager():
    config = dataclasses.replace(CONFIG, backend="reference")
    eager, _ = make(config, problems=2)
    compiled, _ = make(dataclasses.replace(config, mode="compile"), problems=2)
    for _ in range(3):
        obs = torch.randn(2, 5)
        torch.testing.assert_close(compiled.plan(obs), eager.plan(obs), rtol=1e-4, atol=1e-4)


def test_iterations_follow_the_action_size():
    free = dataclasses.replace(CONFIG, iterations=None)
    assert free.iterations_for(19) == 6 and free.iterations_for(20) == 8
    assert CONFIG.iterations_for(20) == 3


def test_cpu_is_the_default_without_a_gpu():
    assert make(CONFIG)[0].backend == "cpu"
    assert make(dataclasses.replace(CONFIG, precision="float64"))[0].backend == "reference"
    assert make(dataclasses.replace(CONFIG, precision="bf16"))[0].backend == "cpu"


@pytest.mark.parametrize("capture", [False, None])
def test_backends_without_graphs_need_no_setting(config, capture):
    planner, _ = make(dataclasses.replace(config, capture=capture))
    assert planner.plan(torch.randn(1, 5)).isfinite().all()


def test_misses_are_counted():
    planner, _ = make(dataclasses.replace(CONFIG, budget_us=1e-3), problems=2)
    action = planner.plan(torch.randn(2, 5))
    assert action.isfinite().all() and planner.missed_plans == 1
    assert planner.state_dict()["missed_plans"] == 1
    # A nanosecond has no room for the policy either.
    assert planner.late_plans == 1 and planner.state_dict()["late_plans"] == 1
    assert planner.last.missed and planner.last.late and planner.last.samples == 0
    planner.load_state_dict(planner.state_dict() | {"late_plans": torch.tensor(5)})
    assert planner.late_plans == 5
    old = {k: v for k, v in planner.state_dict().items() if k != "late_plans"}
    planner.load_state_dict(old)
    assert planner.late_plans == 0


def test_the_last_plan_and_statistics_say_what_was_done(config):
    planner, _ = make(config, problems=2)
    assert planner.last is None and planner.statistics().times.percentile(0.5) is None
    for _ in range(5):
        planner.plan(torch.randn(2, 5))
    last, found = planner.last, planner.statistics()
    samples = 2 * (4 + 3 * (32 - 4))
    assert (last.iterations, last.samples, last.missed, last.late) == (3, samples, False, False)
    assert last.elapsed_us > 0
    assert (found.plans, found.iterations, found.samples) == (5, 15, 5 * samples)
    assert (found.missed, found.late, found.nonfinite) == (0, 0, 0)
    assert len(found.times) == 5
    assert found.times.max_s == found.times.percentile(1) >= found.times.percentile(0.5) > 0
    assert found.times.max_s >= 1e-6 * last.elapsed_us
    planner.clear_statistics()
    assert planner.statistics().plans == 0 and found.plans == 5


def test_a_budget_counts_what_encoding_images_took(monkeypatch):
    """Torch encodes them, before the C++ planner is called."""
    model = WorldModel((3, 64, 64), 2, MODEL)
    planner = Planner(
        model.weights(), dataclasses.replace(CONFIG, budget_us=2e6), discount=0.95, problems=1
    )
    image = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    planner.plan(image)
    assert not planner.last.missed
    real = layers.encode

    def slow(*arguments):
        time.sleep(2.1)
        return real(*arguments)

    monkeypatch.setattr(layers, "encode", slow)
    planner.plan(image)
    assert planner.last.missed and planner.last.late and planner.last.elapsed_us > 2.1e6


def test_wrong_observations_and_backends_are_named(config):
    planner, _ = make(config, problems=2)
    with pytest.raises(ValueError, match=r"obs must be \[2, 5\], got \[1, 5\]"):
        planner.plan(torch.randn(1, 5))
    with pytest.raises(BackendError, match="unknown planner.backend 'cuda', expected auto, ref"):
        make(dataclasses.replace(CONFIG, backend="cuda"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(backend="reference", precision="bf16"),
            "backend=reference computes in float32 or float64, got planner.precision=bf16",
        ),
        (
            dict(backend="reference", budget_us=5.0),
            "backend=reference keeps to no planner.budget_us",
        ),
        (
            dict(backend="cpu", precision="float64"),
            "backend=cpu computes in float32 or bf16, got planner.precision=float64",
        ),
        (
            dict(precision="float64", budget_us=5.0),
            "no planner.backend can serve: triton computes in .*; "
            "cpu computes in .*; reference keeps to no planner.budget_us",
        ),
        (
            dict(backend="reference", precision="tf32"),
            "backend=reference computes in float32 or float64, got planner.precision=tf32",
        ),
        (dict(backend="cpu", precision="tf32"), "backend=cpu computes in float32 or bf16, got "),
        (
            dict(backend="triton", precision="float64"),
            "backend=triton computes in float32, tf32 or bf16, got planner.precision=float64",
        ),
        (dict(backend="triton", budget_us=5.0), "backend=triton keeps to no planner.budget_us"),
        (dict(backend="triton"), "backend=triton needs weights on a CUDA device, got cpu"),
        (
            dict(backend="reference", capture=True),
            "backend=reference captures no CUDA graph, got planner.capture=true",
        ),
        (dict(backend="cpu", capture=True), "backend=cpu captures no CUDA graph, got "),
        (
            dict(backend="cpu", mode="compile"),
            "planner.backend=cpu compiles nothing, got planner.mode=compile",
        ),
        (
            dict(backend="triton", mode="compile"),
            "planner.backend=triton compiles nothing, got planner.mode=compile",
        ),
        (
            dict(backend="triton", threads=2),
            "planner.backend=triton has no threads of its own, got planner.threads=2",
        ),
        (
            dict(backend="reference", threads=2),
            "planner.backend=reference has no threads of its own, got planner.threads=2",
        ),
        (
            dict(mode="compile", threads=2),
            "no planner.backend can serve: triton compiles .*; cpu compiles .*; reference has no ",
        ),
        (
            dict(capture=True),
            "no planner.backend can serve: triton needs weights .*; cpu captures no CUDA graph, ",
        ),
    ],
)
def test_settings_no_backend_can_serve_are_named(change, message):
    with pytest.raises(BackendError, match=message):
        make(dataclasses.replace(CONFIG, **change))


def fitted_cliff():
    """A model of a point at x in [-1, 2] that moves by a/2 and has fallen beyond 1.

    Its critics know that the step over the edge costs 1. Of a fallen point, which no transition
    starts from, they say something else: that it gains by every action to the right.
    """
    torch.manual_seed(0)
    model = WorldModel(1, 1, dataclasses.replace(MODEL, hidden_dim=32, critics=2, termination=True))
    for p in model.encoder.parameters():
        torch.nn.init.normal_(p, std=0.7)
    model.critics[-1].weight.data.normal_(std=0.1)
    for p in model.policy[-1].parameters():
        p.data.zero_()  # it stands still
    adam = torch.optim.Adam(
        [
            p
            for part in (model.dynamics, model.critics, model.termination)
            for p in part.parameters()
        ],
        lr=3e-3,
    )
    for _ in range(400):
        x, a = torch.rand(256, 1) * 3 - 1, torch.rand(256, 1) * 2 - 1
        after = (x + a / 2).clamp(-1, 2)
        z = model.encode(x).detach()
        value = torch.where(x > 1, 5 * a, -(after > 1).float())[:, 0]
        ends, _ = losses.termination_loss(
            layers.termination(model.weights(), model.encode(after).detach())[None],
            (after > 1).float().T,
            1.0,
            1.0,
        )
        loss = (
            (model.q(z, a) - value).square().mean()
            + ends
            + 20 * (model.next(z, a) - model.encode(after).detach()).square().mean()
        )
        adam.zero_grad()
        loss.backward()
        adam.step()
    return model


def test_planning_does_not_fall_for_what_critics_say_of_terminal_states(config):
    model = fitted_cliff()
    x = torch.tensor([[0.6], [0.65], [0.7]])
    for score in ("advantage", "unrolled"):
        settings = dataclasses.replace(
            config, score=score, samples=256, elites=16, policy_trajectories=8, iterations=4
        )
        after = {}
        for weights in (model.weights(), model.weights()._replace(termination=())):
            planner = Planner(weights, settings, discount=0.95, problems=3)
            after[bool(weights.termination)] = x + planner.plan(x) / 2
        assert (after[True] < 1.01).all()
        assert (after[False] > 1.08).all()  # they are believed without the head


@pytest.mark.parametrize(("obs_shape", "termination"), [(5, True), ((9, 64, 64), False)])
def test_every_model_is_on_the_fast_path_of_a_gpu(monkeypatch, obs_shape, termination):
    """On a machine that has one."""
    weights = WorldModel(obs_shape, 2, MODEL, termination=termination).weights()
    assert resolve_plan(weights, CONFIG) == "cpu"
    monkeypatch.setattr(
        "iqmpc.kernels.backends._availability", lambda: dict.fromkeys(("cpu", "triton"))
    )
    with FakeTensorMode():  # tensors of a device that is not here
        there = weights.map(lambda t: torch.empty(t.shape, device="cuda"))
    assert resolve_plan(there, CONFIG) == "triton"


def test_images_are_planned_for(config):
    model = WorldModel((3, 64, 64), 2, MODEL)
    planner = Planner(model.weights(), config, discount=0.95, problems=2)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    assert planner.plan(images).abs().max() <= 1
    with pytest.raises(ValueError, match=r"obs must be \[2, 3, 64, 64\], got \[1, 3, 64, 64\]"):
        planner.plan(images[:1])
    with pytest.raises(ValueError, match="images must be uint8, got torch.float32"):
        planner.plan(images / 255)
    alone = Planner(
        model.weights(), dataclasses.replace(config, enabled=False), discount=0.95, problems=2
    )
    expected = torch.tanh(model.pi(model.encode(images))[0])
    torch.testing.assert_close(alone.plan(images), expected, rtol=1e-4, atol=1e-4)


def test_sizes_beyond_those_of_the_library_are_named_with_the_backend():
    config = dataclasses.replace(CONFIG, samples=2**21, backend="cpu")
    with pytest.raises(BackendError, match="planner.backend=cpu: samples must be at most 1048576"):
        make(config)
