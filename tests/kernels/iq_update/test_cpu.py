"""iqmpc.kernels.iq_update: the C++ update against the losses under autograd in float64."""

from __future__ import annotations

import math
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iqmpc import _C
from iqmpc.config import ModelConfig
from iqmpc.kernels.iq_update import (
    METRICS,
    FusedUpdate,
    Rows,
    UpdateSettings,
    UpdateState,
    iq_update_reference,
)
from iqmpc.kernels.weights import Layer, map_layers
from iqmpc.losses import Batch, ModelNoise, PolicyNoise
from iqmpc.model import WorldModel

LEVELS = _C.isa_levels()
# Relative to a layer's largest gradient (for bf16, in norm), and to a tensor's largest parameter.
TOLERANCE = {"float32": 1e-4, "bf16": 2e-2}
SETTINGS = UpdateSettings(
    objective="iq",
    entropy="exact",
    horizon=3,
    rho=0.6,
    discount=0.97,
    alpha=0.4,
    entropy_coef=0.03,
    c_cons=15.0,
    c_iq=0.2,
    c_gp=0.0,
    c_bc=0.0,
    c_termination=0.8,
    termination_weight=3.0,
    dropout=0.125,
    dropout_always=False,
    lr=3e-4,
    encoder_lr_scale=0.3,
    grad_clip=20.0,
    tau=0.05,
    average_rate=0.02,
)


class Problem:
    """A random model with critics that disagree, a batch, and both ways to update it.

    `fused` works on float32 tensors, `exact` are float64 copies of the same numbers. Critics lie
    `apart`, so that rounding never decides which of a pair is the smaller.
    """

    def __init__(
        self,
        changes: UpdateSettings = SETTINGS,
        *,
        obs: int = 5,
        actions: int = 3,
        hidden: int = 37,
        encoder: int = 9,
        latent: int = 24,
        group: int = 8,
        critics: int = 3,
        experts: int = 7,
        behaviour: int = 5,
        termination: bool = False,
        average: bool = True,
        apart: float = 0.0,
        seed: int = 0,
        **options: object,
    ):
        self.settings, self.seed = changes, seed
        random = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=random)

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = WorldModel(
                obs,
                actions,
                ModelConfig(
                    encoder_dim=encoder,
                    hidden_dim=hidden,
                    latent_dim=latent,
                    simnorm_dim=group,
                    critics=critics,
                ),
                termination=termination,
            )
        with torch.no_grad():
            for p in model.parameters():
                p += (0.15 if p.shape[-1] > 1 else 0.3) * normal(*p.shape)
        weights = model.weights()
        with torch.no_grad():
            weights.critics[-1].bias.add_(apart * torch.arange(critics).unsqueeze(1))
        self.state = state_of(
            weights,
            map_layers(lambda t: t.detach() + 0.05 * normal(*t.shape), weights.critics),
            average,
        )
        self.exact = in_float64(self.state)
        columns = experts + behaviour
        h = changes.horizon
        self.batch = Batch(
            normal(h + 1, columns, obs),
            torch.rand(h, columns, actions, generator=random) * 2 - 1,
            normal(h, columns),
            (torch.rand(h, columns, generator=random) < 0.2).float(),
            experts,
        )
        self.fused = FusedUpdate(self.state, changes, seed=seed, **options)

    def noise(self, update: int) -> tuple[ModelNoise, PolicyNoise]:
        """What the C++ update draws, in float64."""
        d = self.fused.native.draws(update, self.batch.action.shape[1], self.batch.experts)
        always = self.settings.dropout_always
        t = {
            k: torch.tensor(v, dtype=torch.int64 if "pair" in k else torch.float64)
            for k, v in d.items()
        }
        keep = None if self.settings.dropout == 0 else t["keep"]
        td = self.settings.objective == "td"
        return (
            ModelNoise(
                t["target"],
                t["initial"],
                keep,
                t["mix"],
                t["pair"],
                keep_target=t["keep_target"] if always else None,
                keep_value=t["keep_value"] if always and not td else None,
                keep_penalty=t["keep_penalty"] if always else None,
            ),
            PolicyNoise(t["policy"], t["policy_pair"], t["keep_policy"] if always else None),
        )

    def step(self, update: int = 0):
        """(metrics, metrics in float64, gradients, gradients in float64) of one update by both."""
        got, *skipped = self.fused.update(
            *self.batch, update=update, model_steps=update, policy_steps=update
        )
        assert skipped == [False, False]
        batch = Batch(*(t.double() for t in self.batch[:4]), self.batch.experts)
        expected, gradients = iq_update_reference(
            self.exact,
            batch,
            *self.noise(update),
            self.settings,
            model_steps=update,
            policy_steps=update,
        )
        return got, expected, self.fused.native.gradients(), self.in_order(gradients)

    def in_order(self, gradients: list[torch.Tensor]) -> list[np.ndarray]:
        """As the C++ library lists them: critics one by one."""
        w, result, rest = self.exact.weights, [], iter(gradients)

        def take(layers: tuple[Layer, ...]) -> list[torch.Tensor]:
            return [next(rest) for layer in layers for t in layer if t is not None]

        result += [*take(w.encoder), *take(w.dynamics)]
        stacked = take(w.critics)
        result += [t[k] for k in range(w.num_critics) for t in stacked]
        result += [*take(w.termination), *take(w.policy)]
        return [t.numpy() for t in result]

    def drift(self) -> float:
        """The largest difference of a parameter, target or average from its float64 twin, relative
        to the largest number of its tensor."""
        return max(
            float((a.double() - b).abs().max() / b.abs().max().clamp_min(1e-3))
            for a, b in zip(tensors(self.state), tensors(self.exact), strict=True)
        )


def state_of(weights, targets, average: bool) -> UpdateState:
    moments = [
        {p: torch.zeros_like(p, requires_grad=False) for p in weights.tensors()} for _ in range(2)
    ]
    held = None
    if average:
        held = weights.map(lambda t: t.detach() + 0.1)
    return UpdateState(weights, targets, moments[0].__getitem__, moments[1].__getitem__, held)


def in_float64(state: UpdateState) -> UpdateState:
    def twin(weights, leaf):
        return weights.map(lambda t: t.detach().double().requires_grad_(leaf))

    weights = twin(state.weights, True)
    exact = state_of(weights, map_layers(lambda t: t.double(), state.targets), False)
    return exact._replace(average=None if state.average is None else twin(state.average, False))


def tensors(state: UpdateState) -> list[torch.Tensor]:
    targets = [t for layer in state.targets for t in layer if t is not None]
    averages = [] if state.average is None else state.average.tensors()
    return [t.detach() for t in [*state.weights.tensors(), *targets, *averages]]


def by_layer(problem: Problem, arrays: list[np.ndarray]) -> list[np.ndarray]:
    """Each layer's parameters end to end. A layer's gradients share one scale: that of a single
    bias can be a sum in which everything cancels."""
    w, rest = problem.exact.weights, iter(arrays)
    counts = [
        sum(t is not None for t in layer)
        for part in (w.encoder, w.dynamics, *[w.critics] * w.num_critics, w.termination, w.policy)
        for layer in part
    ]
    result = [np.concatenate([next(rest).ravel() for _ in range(count)]) for count in counts]
    assert next(rest, None) is None
    return result


def check(problem: Problem, tolerance: float) -> None:
    got, expected, gradients, exact = problem.step()
    rounding = 1e-6 * max(np.abs(e).max() for e in exact)  # where a layer's are all 0
    for g, e in zip(by_layer(problem, gradients), by_layer(problem, exact), strict=True):
        assert np.abs(g - e).max() <= tolerance * np.abs(e).max() + rounding
    assert set(got) == set(METRICS)
    for name, value in expected.items():
        if name != "q_difference":
            assert got[name] == pytest.approx(
                float(value), rel=20 * tolerance, abs=2 * tolerance, nan_ok=True
            ), name
    absent = set(got) - set(expected)
    assert all(math.isnan(got[name]) for name in absent)


options = st.fixed_dictionaries(
    {
        "objective": st.sampled_from(["iq", "v_diff", "td"]),
        "entropy": st.sampled_from(["exact", "presquash"]),
        "horizon": st.integers(1, 4),
        "c_gp": st.sampled_from([0.0, 0.7]),
        "c_bc": st.sampled_from([0.0, 0.4]),
        "dropout": st.sampled_from([0.0, 0.25]),
        "dropout_always": st.booleans(),
    }
)
sizes = st.fixed_dictionaries(
    {
        "obs": st.integers(1, 20),
        "actions": st.integers(1, 18),
        "hidden": st.integers(8, 70),
        "encoder": st.integers(8, 40),
        "critics": st.integers(2, 7),
        "experts": st.integers(1, 20),
        "behaviour": st.integers(1, 20),
        "termination": st.booleans(),
    }
)


@settings(deadline=None, max_examples=60)
@given(
    isa=st.sampled_from(LEVELS),
    options=options,
    sizes=sizes,
    groups=st.sampled_from([(24, 8), (6, 2), (15, 3), (9, 1), (40, 40)]),
    threads=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_gradients_and_metrics_of_every_option_are_the_references(
    isa, options, sizes, groups, threads, seed
):
    changes = SETTINGS._replace(**options)
    if changes.objective == "td":
        sizes["experts"], changes = 0, changes._replace(c_gp=0.0, c_bc=0.0)
    if changes.c_gp:
        sizes["behaviour"] = sizes["experts"]
    latent, group = groups
    check(
        Problem(changes, **sizes, latent=latent, group=group, isa=isa, threads=threads, seed=seed),
        TOLERANCE["float32"],
    )


# At sizes of use: of a few rows, what rounding to 8 bits does to single gradients has no bound.
@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(objective="v_diff", entropy="presquash"),
        dict(objective="td"),
        dict(c_gp=0.7),
        dict(dropout_always=True),
        dict(c_bc=0.4),
    ],
    ids=str,
)
def test_bf16_gradients_are_near_the_references(isa, changes):
    sizes = dict(obs=24, actions=6, hidden=128, encoder=64, latent=64, experts=32, behaviour=32)
    if changes.get("objective") == "td":
        sizes["experts"] = 0
    problem = Problem(SETTINGS._replace(**changes), **sizes, isa=isa, precision="bf16", apart=5.0)
    _, _, gradients, exact = problem.step()
    for g, e in zip(by_layer(problem, gradients), by_layer(problem, exact), strict=True):
        assert np.linalg.norm(g - e) <= TOLERANCE["bf16"] * np.linalg.norm(e) + 1e-9


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(objective="v_diff", c_gp=0.7),
        dict(objective="td", grad_clip=1e-3),
        dict(entropy="presquash", dropout_always=True, c_gp=0.3, c_bc=0.2, grad_clip=0.5),
    ],
    ids=str,
)
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_parameters_targets_and_averages_after_one_and_after_a_hundred_updates(changes, precision):
    sizes = (
        dict(experts=0, behaviour=12)
        if changes.get("objective") == "td"
        else dict(experts=6, behaviour=6)
    )
    problem = Problem(SETTINGS._replace(**changes), **sizes, termination=True, precision=precision)
    before = [t.clone() for t in tensors(problem.state)]
    problem.step(0)
    # One step of Adam goes as far for a gradient of any size, so that one whose sign is rounding's
    # may go either way: at most two steps' length.
    step = 2 * problem.settings.lr
    assert all(
        float((a.double() - b).abs().max()) <= 1.01 * step
        for a, b in zip(tensors(problem.state), tensors(problem.exact), strict=True)
    )
    if precision == "float32":
        assert problem.drift() < TOLERANCE["float32"]
    for update in range(1, 100):
        problem.step(update)
    moved = max(
        float((a - b).abs().max()) for a, b in zip(tensors(problem.state), before, strict=True)
    )
    assert moved > 20 * problem.settings.lr
    assert problem.drift() < TOLERANCE[precision]


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("changes", [dict(c_gp=0.7), dict(objective="v_diff")], ids=str)
def test_any_number_of_threads_gives_the_same_bits(changes, precision):
    def after(threads: int) -> list[torch.Tensor]:
        problem = Problem(
            SETTINGS._replace(**changes),
            experts=25,
            behaviour=25,
            hidden=70,
            termination=True,
            threads=threads,
            precision=precision,
        )
        for update in range(5):
            problem.fused.update(
                *problem.batch, update=update, model_steps=update, policy_steps=update
            )
        return tensors(problem.state)

    first = after(1)
    for threads in (2, 3, 4):
        assert all(torch.equal(a, b) for a, b in zip(first, after(threads), strict=True))


def episodes(problem: Problem, count: int, length: int, seed: int) -> Rows:
    g, w = torch.Generator().manual_seed(seed), problem.state.weights
    rows = count * (length + 1)
    starts = [
        e * (length + 1) + t
        for e in range(count)
        for t in range(length - problem.settings.horizon + 1)
    ]
    return Rows(
        torch.randn(rows, *w.obs_shape, generator=g),
        torch.rand(rows, w.action_dim, generator=g) * 2 - 1,
        torch.randn(rows, generator=g),
        (torch.rand(rows, generator=g) < 0.1).float(),
        torch.tensor(starts),
    )


@pytest.mark.parametrize("objective", ["iq", "td"])
def test_learning_from_replays_is_the_update_on_the_slices_that_it_draws(objective):
    problems = [Problem(SETTINGS._replace(objective=objective), termination=True) for _ in range(2)]
    behaviour = episodes(problems[0], 3, 9, seed=1)
    experts = episodes(problems[0], 2, 7, seed=2) if objective == "iq" else None
    learner, updater = (p.fused for p in problems)
    got = learner.learn(experts, behaviour, 6, update=5, model_steps=0, policy_steps=0)
    arrays = [None if r is None else tuple(t.numpy() for t in r) for r in (experts, behaviour)]
    columns = []
    for rows, is_expert in zip((experts, behaviour), (True, False), strict=True):
        if rows is None:
            continue
        starts = torch.from_numpy(learner.native.slices(5, is_expert, arrays[not is_expert], 6))
        assert set(starts.tolist()) <= set(rows.starts.tolist()) and len(set(starts.tolist())) > 2
        steps = starts + torch.arange(problems[0].settings.horizon + 1).unsqueeze(1)
        columns.append(
            (
                rows.obs[steps],
                rows.action[steps[:-1]],
                rows.reward[steps[:-1]],
                rows.terminated[steps[:-1]],
            )
        )
    batch = [torch.cat(parts, 1) for parts in zip(*columns, strict=True)]
    expected = updater.update(*batch, 6 if experts else 0, update=5, model_steps=0, policy_steps=0)
    assert got[1:] == expected[1:] == (False, False)
    assert all(
        a == b or math.isnan(a) for a, b in zip(got[0].values(), expected[0].values(), strict=True)
    )
    assert all(
        torch.equal(a, b) for a, b in zip(*(tensors(p.state) for p in problems), strict=True)
    )


def test_slices_are_drawn_uniformly_and_each_update_draws_anew():
    problem = Problem()
    rows = tuple(t.numpy() for t in episodes(problem, 1, 12, seed=0))
    draws = np.concatenate([problem.fused.native.slices(u, True, rows, 1000) for u in range(20)])
    counts = np.bincount(draws, minlength=10)
    assert len(counts) == 10 and abs(counts - 2000).max() < 5 * math.sqrt(2000)
    first, second = (problem.fused.native.draws(u, 12, 7) for u in (0, 1))
    assert not np.allclose(first["policy"], second["policy"])
    assert abs(first["policy"].std() - 1) < 0.2 and abs(first["target"].mean()) < 0.3
    kept = np.concatenate([problem.fused.native.draws(u, 12, 7)["keep"].ravel() for u in range(20)])
    assert set(np.unique(kept)) == {0.0, np.float32(1 / 0.875)}
    assert kept.mean() == pytest.approx(1, abs=0.01)
    pairs = {
        problem.fused.native.draws(u, 12, 7)[name]
        for u in range(50)
        for name in ("pair", "policy_pair")
    }
    assert pairs == {(i, j) for i in range(3) for j in range(3) if i != j}


@pytest.mark.parametrize("where", ["obs", "action", "weights", "policy"])
def test_a_step_that_is_not_finite_changes_nothing(where):
    problem = Problem()
    if where == "weights":
        problem.state.weights.dynamics[1].weight.data[0, 0] = math.nan
    elif where == "policy":  # whose density overflows, while V only ranks it
        problem.state.weights.policy[-1].bias.data[0] = math.nan
    else:
        getattr(problem.batch, where)[1, 2, 0] = math.inf if where == "obs" else math.nan
    moments = [
        f(p)
        for f in (problem.state.first, problem.state.second)
        for p in problem.state.weights.tensors()
    ]
    before = [t.clone() for t in [*tensors(problem.state), *moments]]
    _, *skipped = problem.fused.update(*problem.batch, update=0, model_steps=0, policy_steps=0)
    assert skipped == [True, True]
    assert all(
        torch.equal(a, b) or (a.isnan() == b.isnan()).all()
        for a, b in zip([*tensors(problem.state), *moments], before, strict=True)
    )


def test_a_policys_step_that_is_not_finite_is_left_out_alone():
    problem = Problem()
    w = problem.state.weights
    # Actions of the usual size, but a gradient of the last layer's weights whose square overflows.
    w.policy[1].gamma.data.mul_(1e30)
    w.policy[2].weight.data.mul_(1e-30)
    policy = w._replace(encoder=(), dynamics=(), critics=(), termination=()).tensors()
    before = [t.detach().clone() for t in policy]
    critics, targets = w.critics[0].weight.detach().clone(), problem.state.targets[0].weight.clone()
    metrics, model_skipped, policy_skipped = problem.fused.update(
        *problem.batch, update=0, model_steps=0, policy_steps=0
    )
    assert (model_skipped, policy_skipped) == (False, True)
    assert math.isfinite(metrics["policy_loss"]) and math.isinf(metrics["policy_grad_norm"])
    assert all(torch.equal(a, b) for a, b in zip(policy, before, strict=True))
    assert not torch.equal(critics, w.critics[0].weight)
    assert not torch.equal(targets, problem.state.targets[0].weight)


def test_what_does_not_fit_is_refused_with_its_numbers():
    problem = Problem()
    obs, action, reward, terminated, experts = problem.batch
    call = dict(update=0, model_steps=0, policy_steps=0)
    for arguments, message in [
        (
            (obs[:-1], action, reward, terminated, experts),
            r"obs must be float32 with shape \[4, 12, 5\], got float32 \[3, 12, 5\]",
        ),
        ((obs, action.double(), reward, terminated, experts), "action must be float32"),
        (
            (obs, action, reward.T.contiguous().T, terminated, experts),
            "reward must be C-contiguous",
        ),
        (
            (obs, action, reward, terminated, 12),
            "a batch must have demonstrations and behaviour, got 12 columns, 12 of them",
        ),
        ((obs, action, reward, terminated, 0), "demonstrations and behaviour"),
    ]:
        with pytest.raises(ValueError, match=message):
            problem.fused.update(*arguments, **call)
    with pytest.raises(ValueError, match="no demonstrations for the objective td"):
        td = Problem(SETTINGS._replace(objective="td"), experts=0, behaviour=12)
        td.fused.update(obs, action, reward, terminated, 3, **call)
    with pytest.raises(ValueError, match="as many demonstrations as behaviour"):
        Problem(SETTINGS._replace(c_gp=1.0)).fused.update(*problem.batch, **call)
    rows = episodes(problem, 1, 8, seed=0)
    with pytest.raises(ValueError, match="the replay holds no slice of 3 steps"):
        problem.fused.learn(rows, rows._replace(starts=rows.starts[:0]), 4, **call)
    with pytest.raises(ValueError, match="from row 7 on, 3 steps long, lies beyond the replay's 9"):
        problem.fused.learn(rows, rows._replace(starts=torch.tensor([7])), 4, **call)
    with pytest.raises(ValueError, match="alpha must be positive, got 0"):
        Problem(SETTINGS._replace(alpha=0.0))
    with pytest.raises(ValueError, match="objective must be one of iq, v_diff, td, got sac"):
        Problem(SETTINGS._replace(objective="sac"))
    with pytest.raises(ValueError, match="precision must be float32 or bf16, got float16"):
        Problem(precision="float16")
    with pytest.raises(ValueError, match="dynamics layer 0 weight must be float32"):
        half = problem.state.weights._replace(
            dynamics=map_layers(torch.Tensor.half, problem.state.weights.dynamics)
        )
        FusedUpdate(state_of(half, problem.state.targets, False), SETTINGS, seed=0)


def test_two_threads_of_the_caller_take_turns():
    problem, other = Problem(), Problem()

    def run(first: int) -> None:
        for u in range(first, 40, 2):
            problem.fused.update(*problem.batch, update=0, model_steps=u, policy_steps=u)

    threads = [threading.Thread(target=run, args=(first,)) for first in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(t.isfinite().all() for t in tensors(problem.state))
    assert not torch.equal(tensors(problem.state)[0], tensors(other.state)[0])
