"""The Triton kernels against the float64 reference.

On a machine with a CUDA device, here. Without one, the same tests run in Triton's interpreter, in
a process of their own (`test_all_of_this_in_the_interpreter`): TRITON_INTERPRET must be set before
Triton is imported, and Triton must not be imported after Mesa, which other tests load.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from iqmpc.config import PlannerConfig
from iqmpc.errors import BackendError
from iqmpc.kernels import layers
from iqmpc.kernels.mppi_plan import PlanNoise, ReferencePlan
from iqmpc.kernels.mppi_refit import mppi_refit
from iqmpc.kernels.mppi_rollout import mppi_rollout, triton_jobs
from iqmpc.kernels.triton_weights import TritonWeights
from iqmpc.kernels.weights import Layer, Weights, snapshot
from tests.kernels.contract import BETA, GAMMA, TOLERANCE, assert_within, drawn, in_float64

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU = torch.cuda.is_available() and not INTERPRETED
SCHEDULES = ("throughput", "latency")

needs_triton = pytest.mark.skipif(
    not (GPU or INTERPRETED), reason="no CUDA device; test_all_of_this_in_the_interpreter runs it"
)


all_nan = pytest.mark.filterwarnings("ignore:All-NaN slice")  # the interpreter is NumPy


def needs_gpu(test):
    skip = pytest.mark.skipif(not GPU, reason="torch sees no CUDA device")
    return pytest.mark.gpu(skip(test))


def device() -> str:
    return "cuda" if GPU else "cpu"


def to_device(weights: Weights) -> Weights:
    return weights.map(lambda t: t.to(device()))


def draw(*sizes: Any, **settings: Any) -> tuple[torch.Tensor, ...]:
    """The contract's draws, where these tests compute."""
    return tuple(t.to(device()) for t in drawn(*sizes, **settings))


def rollout(weights: Weights | TritonWeights, draws, score: str = "advantage", schedule=None):
    from iqmpc.kernels.mppi_rollout.triton import mppi_rollout_triton

    return mppi_rollout_triton(weights, *draws, GAMMA, score, BETA, schedule=schedule)


def pytest_of_this_file(**environment: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "not gpu",
        "-p",
        "no:cacheprovider",
        __file__,
    ]
    return subprocess.run(
        command,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )


# --- Without Triton -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_all_of_this_in_the_interpreter():
    result = pytest_of_this_file(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 0, result.stdout + result.stderr
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) > 30


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
@pytest.mark.parametrize("arch", [80, 90])
def test_every_kernel_compiles(arch):
    """For GPUs that need not be here, at the sizes in use, within their shared memory."""
    script = Path(__file__).with_name("triton_compile.py")
    result = subprocess.run(
        [sys.executable, script, "--arch", str(arch)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    done = [json.loads(line) for line in result.stdout.splitlines()]
    assert {x["kernel"] for x in done} == {
        "_chain_kernel",
        "_stage_kernel",
        "_score_kernel",
        "_refit_kernel",
        "_draw_kernel",
        "_begin_kernel",
        "_act_kernel",
        "_improve_kernel",
    }
    limit = {80: 163, 90: 227}[arch] * 1024
    for x in done:
        assert x["shared"] <= limit, x
        assert x["tensor_core"] or x["kernel"] not in ("_chain_kernel", "_stage_kernel"), x


@pytest.mark.skipif(GPU or INTERPRETED, reason="Triton can run here")
def test_triton_by_name_is_an_error_without_a_gpu(make_weights):
    weights = make_weights(5, 3)
    draws = draw(weights, 1, 2, 4)
    for call in (
        lambda: mppi_rollout(weights, *draws, GAMMA, backend="triton"),
        lambda: mppi_rollout(TritonWeights(weights), *draws, GAMMA, backend="triton"),
        lambda: mppi_refit(
            draws[1],
            torch.zeros(1, 4),
            elites=2,
            temperature=0.5,
            std_min=0.05,
            std_max=2.0,
            backend="triton",
        ),
    ):
        with pytest.raises(BackendError, match="'triton' cannot run: torch sees no CUDA device"):
            call()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(dynamics=()), "dynamics: the triton backend takes three layers, LayerNorm on all"),
        (dict(simnorm_dim=128), "simnorm_dim: the triton backend takes at most 64, got 128"),
        (dict(simnorm_dim=5), "simnorm_dim: must divide the latent size 128, got 5"),
    ],
)
def test_weights_that_do_not_fit_are_named(make_weights, change, message):
    with pytest.raises(ValueError, match=message):
        TritonWeights(make_weights(5, 3, latent=128)._replace(**change))
    with pytest.raises(ValueError, match="precision must be float32, tf32, bf16, got 'int8'"):
        TritonWeights(make_weights(5, 3), precision="int8")


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("simnorm", [8, 3])
def test_refreshed_weights_are_packed_weights_in_the_same_memory(make_weights, precision, simnorm):
    old, new = (make_weights(5, 3, latent=24, simnorm=simnorm, seed=s) for s in (0, 1))
    packed, expected = (TritonWeights(w, precision=precision) for w in (old, new))
    memory = [
        packed.matrices,
        packed.vectors,
        *(t for x in packed.policy_layers for t in x if t is not None),
    ]
    where = [t.data_ptr() for t in memory]
    assert not torch.equal(packed.matrices, expected.matrices)
    packed.refresh(new)
    assert torch.equal(packed.matrices, expected.matrices)
    assert torch.equal(packed.vectors, expected.vectors)
    assert [t.data_ptr() for t in memory] == where
    for x, y in zip(packed.policy_layers, expected.policy_layers, strict=True):
        assert torch.equal(x.weight, y.weight)


@pytest.mark.parametrize("horizon", range(1, 6))
def test_jobs_read_what_was_written(make_weights, horizon):
    """No job reads memory before it is written, and none of a stage's jobs disturb it."""
    w = TritonWeights(make_weights(5, 3))

    def reads(job):
        found = {job.x} if job.inputs else set()
        found |= {job.source} if job.init == triton_jobs.SAVED else set()
        found |= {("root", job.source)} if job.init == triton_jobs.SHARED else set()
        found |= {("a", job.step)} if job.action == triton_jobs.GIVEN else set()
        return found | ({"ã"} if job.action == triton_jobs.POLICY_ACTION else set())

    def writes(job):
        kind = {
            triton_jobs.POLICY: "ã",
            triton_jobs.ACT: ("a", job.step),
            triton_jobs.ROOT: ("root", job.out),
        }
        return {kind.get(job.kind, job.out)} | ({job.save} if job.save >= 0 else set())

    def run(stages, written):
        for stage in stages.stages:
            raw = stage.inputs == triton_jobs.RAW  # its x is not in scratch memory
            read = set().union(*(reads(job) - ({job.x} if raw else set()) for job in stage.jobs))
            new = [writes(job) for job in stage.jobs]
            assert read <= written and not read & set().union(*new)
            assert sum(map(len, new)) == len(set().union(*new))  # each has places of its own
            assert raw or all(job.inputs == 0 or job.in_features > 1 for job in stage.jobs)
            written |= set().union(*new)
        assert max((x for x in written if isinstance(x, int)), default=-1) < stages.columns
        return written

    def heads(stages):
        return {stages.heads + i * w.width for i in range(2 * (2 * horizon - 1))}

    actions = {("a", t) for t in range(horizon)}
    parts = {("root", i * w.width) for i in range(2 + (horizon > 1))}
    policy = {("root", 3 * w.width)}
    assert run(triton_jobs.root_stage(w, horizon), set()) == parts
    started = run(triton_jobs.start(w, horizon), set())
    assert {x for x in started if isinstance(x, tuple)} == parts | policy
    alone = run(triton_jobs.start(w, 0), set())
    assert {x for x in alone if isinstance(x, tuple)} == policy

    chain = triton_jobs.chain(w, horizon)
    written = actions | parts
    for job in chain.jobs:
        assert reads(job) <= written and not (job.inputs and job.x in writes(job))
        written |= writes(job)
    assert max(x for x in written if isinstance(x, int)) < chain.columns

    stages, trajectories = (f(w, horizon) for f in (triton_jobs.stages, triton_jobs.trajectories))
    assert heads(stages) <= run(stages, actions | parts)
    assert heads(trajectories) | actions <= run(trajectories, {("a", 0)} | parts)
    for jobs in (
        chain.jobs,
        *([job for stage in x.stages for job in stage.jobs] for x in (stages, trajectories)),
    ):
        assert sum(job.kind == triton_jobs.HEAD for job in jobs) == 2 * (2 * horizon - 1)
        assert sum(job.kind == triton_jobs.SIMNORM for job in jobs) == horizon - 1


# --- The kernels, on a GPU or in the interpreter ------------------------------------------------


@needs_triton
@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("envs", "horizon", "samples", "action_dim", "latent", "simnorm", "hidden", "score"),
    [
        (3, 3, 5, 1, 8, 8, 13, "advantage"),  # tiles over several problems
        (1, 1, 1, 3, 24, 8, 37, "advantage"),  # no dynamics, one sample
        (2, 2, 70, 1, 8, 8, 9, "unrolled"),  # in the interpreter, more tiles than programs
        (1, 3, 9, 17, 136, 8, 100, "advantage"),  # several blocks of columns
        (2, 3, 3, 5, 24, 3, 70, "unrolled"),  # groups of three
        (1, 1, 4, 1, 8, 2, 9, "unrolled"),
    ],
)
def test_rollout_is_the_reference(
    make_weights,
    envs,
    horizon,
    samples,
    action_dim,
    latent,
    simnorm,
    hidden,
    score,
    schedule,
    precision,
):
    weights = to_device(make_weights(5, action_dim, latent=latent, simnorm=simnorm, hidden=hidden))
    draws = draw(weights, envs, horizon, samples + 32, score)
    expected = in_float64(weights, draws, score)
    z0, actions, noise, pair = draws
    some = z0, actions[:, :, :samples], noise[:, :, :samples], pair
    returns = rollout(TritonWeights(weights, precision=precision), some, score, schedule)
    assert returns.shape == (envs, samples) and returns.dtype == torch.float32
    assert_within(returns, expected, precision)
    if precision == "bf16":  # it is another computation
        assert (returns - expected[:, :samples]).abs().max() > 0
        assert not torch.equal(returns, rollout(weights, some, score))


@needs_triton
def test_the_schedule_follows_from_the_number_of_tiles(monkeypatch):
    from iqmpc.kernels.mppi_rollout import triton as module

    monkeypatch.setattr(module, "multiprocessors", lambda device: 132)
    where = torch.device(device())
    assert module.choose_schedule(1, 488, where) == "latency"
    assert module.choose_schedule(16, 488, where) == "latency"  # 122 tiles of 64 rows
    assert module.choose_schedule(64, 488, where) == "throughput"


@needs_triton
def test_the_faster_schedule_is_kept(make_weights, monkeypatch, tmp_path):
    from iqmpc.kernels.mppi_rollout import triton as module

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(module, "_measured", {})
    weights, timed = TritonWeights(to_device(make_weights(5, 3))), []

    def resolve(samples, times, envs=1):
        def timer(call):
            call()  # what is timed is a rollout
            timed.append(samples)
            return times[len(timed) % 2]  # of the schedules, the latency schedule's comes second

        z0, actions, noise, pair = draw(weights, envs, 1, samples)
        r = module.Launch(
            weights,
            actions,
            noise,
            pair,
            GAMMA,
            torch.zeros(envs, samples, device=device()),
            module.new_root(weights, envs),
            samples,
        )
        return module.resolve_schedule(r, timer)

    assert resolve(4, (1.0, 2.0)) == "latency" and timed == [4, 4]
    assert resolve(4, (2.0, 1.0)) == "latency" and timed == [4, 4]  # not timed again, ...
    module._measured.clear()
    assert resolve(3, (2.0, 1.0)) == "latency" and timed == [4, 4]  # ... nor by another process
    assert resolve(9, (2.0, 1.0)) == "throughput" and timed == [4, 4, 9, 9]
    monkeypatch.setattr(module, "_LARGEST", 1)
    assert resolve(20, (1.0, 2.0)) == "throughput" and timed == [4, 4, 9, 9]


@needs_triton
def test_triton_by_name(make_weights):
    weights = to_device(make_weights(5, 3))
    draws = draw(weights, 1, 2, 6)
    expected = rollout(weights, draws)
    for given in (weights, TritonWeights(weights)):
        assert torch.equal(
            mppi_rollout(given, *draws, GAMMA, entropy_coef=BETA, backend="triton"), expected
        )


@pytest.mark.skipif(not INTERPRETED, reason="about the interpreter")
def test_auto_does_not_take_the_interpreter(make_weights):
    weights = make_weights(5, 3)
    draws = draw(weights, 1, 2, 6)
    assert torch.equal(
        mppi_rollout(weights, *draws, GAMMA), mppi_rollout(weights, *draws, GAMMA, backend="cpu")
    )


@needs_triton
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_sample_does_not_depend_on_its_neighbours(make_weights, schedule):
    weights = to_device(make_weights(5, 3))
    z0, actions, noise, pair = draw(weights, 2, 2, 20)
    whole = rollout(weights, (z0, actions, noise, pair), schedule=schedule)
    part = rollout(
        weights, (z0[1:], actions[1:, :, 3:9], noise[1:, :, 3:9], pair), schedule=schedule
    )
    # Not bit for bit: other shapes may have other tiles.
    torch.testing.assert_close(part, whole[1:, 3:9], rtol=1e-5, atol=1e-5)


@needs_triton
@all_nan
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_is_not_finite_is_nan(make_weights, schedule):
    weights = to_device(make_weights(5, 3))
    z0, actions, noise, pair = draw(weights, 1, 3, 9)
    packed = TritonWeights(weights, precision="bf16")
    clean = rollout(packed, (z0, actions, noise, pair), schedule=schedule)
    assert clean.isfinite().all()
    actions[0, 1, 4, 2] = torch.nan
    noise[0, 1, 7, 0] = torch.inf
    returns = rollout(packed, (z0, actions, noise, pair), schedule=schedule)
    others = torch.tensor([s not in (4, 7) for s in range(9)], device=returns.device)
    # Infinite noise saturates the tanh: a finite action.
    assert returns[0, 4].isnan() and returns[0, 7].isfinite()
    assert torch.equal(returns[0, others], clean[0, others])
    for out_of_range in ([0, 3], [-1, 0]):
        pair = torch.tensor(out_of_range, device=device())
        assert rollout(packed, (z0, actions, noise, pair), schedule=schedule).isnan().all()


@needs_triton
@all_nan
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("part", ["dynamics", "policy", "critics"])
def test_weights_that_are_not_finite_make_nan(make_weights, part, schedule):
    weights = to_device(make_weights(5, 3))
    layer = getattr(weights, part)[1].weight
    (layer[2] if part == "critics" else layer).view(-1)[7] = torch.nan
    assert rollout(weights, draw(weights, 1, 2, 5), schedule=schedule).isnan().all()


@needs_triton
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(actions=torch.zeros(1, 3, 4, 3).double()),
            "actions must be float32 for the triton backend, got torch.float64",
        ),
        (
            dict(z0=torch.zeros(1, 16, requires_grad=True)),
            "z0 requires grad and the triton backend",
        ),
        (dict(score_noise=torch.zeros(1, 2, 4, 3, device="meta")), "tensors on one"),
        (dict(critic_pair=torch.zeros(2, device="meta", dtype=torch.int64)), "tensors on one"),
    ],
)
def test_arguments_that_do_not_fit_are_named(make_weights, change, message):
    weights = to_device(make_weights(5, 3))
    names = ("z0", "actions", "score_noise", "critic_pair")
    given = dict(zip(names, draw(weights, 1, 3, 4), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        mppi_rollout(weights, **given, discount=GAMMA, backend="triton")
    with pytest.raises(ValueError, match="schedule must be one of throughput, latency"):
        rollout(weights, draw(weights, 1, 3, 4), schedule="both")


def refits(actions: torch.Tensor, returns: torch.Tensor, elites: int):
    """The Triton kernel's answer and the float64 reference's."""
    settings = dict(elites=elites, temperature=0.5, std_min=0.05, std_max=2.0)
    actions, returns = actions.to(device()), returns.to(device())
    return (
        mppi_refit(actions, returns, **settings, backend="triton"),
        mppi_refit(actions.double(), returns.double(), **settings, backend="reference"),
    )


@needs_triton
@pytest.mark.parametrize(
    ("envs", "horizon", "samples", "action_dim", "elites"),
    [(1, 3, 1, 1, 1), (3, 2, 9, 2, 9), (2, 1, 33, 5, 7), (2, 3, 200, 17, 64), (1, 1, 300, 1, 300)],
)
def test_refit_is_the_reference(envs, horizon, samples, action_dim, elites):
    actions = torch.rand(envs, horizon, samples, action_dim) * 2 - 1
    got, expected = refits(actions, torch.randn(envs, samples) * 3, elites)
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x.double(), y.double(), rtol=1e-4, atol=1e-5)
    assert torch.equal(got[2], expected[2]) and got[2].dtype == torch.int64


@needs_triton
def test_refit_breaks_ties_by_place():
    returns = torch.tensor([[1.0, 2.0, 1.0, 2.0, 0.0, -0.0, 2.0]])
    (_, _, index, weight), _ = refits(torch.rand(1, 2, 7, 2), returns, 7)
    assert index[0].tolist() == [1, 3, 6, 0, 2, 4, 5]
    assert weight[0, 0] == weight[0, 1] == weight[0, 2]


@needs_triton
def test_refit_ranks_what_is_not_finite_last():
    actions = torch.rand(1, 2, 6, 2)
    actions[0, :, [1, 2, 4]] = torch.nan
    nan, inf = torch.nan, torch.inf
    got, expected = refits(actions, torch.tensor([[0.0, nan, inf, -5.0, -inf, 1.0]]), 4)
    assert got[2].tolist() == [[5, 0, 3, 1]] and got[3][0, 3] == 0
    for i in (0, 1, 3):
        torch.testing.assert_close(got[i].double(), expected[i], rtol=1e-4, atol=1e-5)
    (mean, std, _, weight), _ = refits(actions, torch.full((1, 6), nan), 4)
    assert mean.isfinite().all() and (std == 0.05).all() and (weight == 0).all()


# --- Whole plans, on a GPU or in the interpreter ------------------------------------------------


SMALL = PlannerConfig(samples=6, elites=2, policy_trajectories=2, horizon=2, iterations=1)
unlikely = pytest.mark.filterwarnings("ignore:divide by zero")  # the logarithm of weight 0


def planner(weights: Weights, config: PlannerConfig = SMALL, *, move: bool = True, **settings: Any):
    from iqmpc.kernels.mppi_plan.triton import TritonPlan

    settings = dict(discount=GAMMA, seed=7) | settings
    return TritonPlan(to_device(weights) if move else weights, config, **settings)


def exact(weights: Weights, config: PlannerConfig, plan, obs, mean):
    """The float64 reference's answer to the last plan's draws: action, marks and mean."""
    config = dataclasses.replace(config, precision="float64", score="advantage", capture=None)
    weights = snapshot(to_device(weights), torch.float64)
    reference = ReferencePlan(weights, config, discount=GAMMA, problems=len(obs))
    *drawn, pair = plan.draws()
    marked, mean = reference.compute(
        weights,
        obs.to(device()).double(),
        mean.double(),
        PlanNoise(*(t.double() for t in drawn), pair),
    )
    return marked[:, :-1].cpu(), marked[:, -1].cpu(), mean


@needs_triton
@unlikely
@pytest.mark.parametrize(
    ("envs", "action_dim", "horizon", "shape", "iterations", "simnorm", "explore"),
    [
        (1, 3, 3, (12, 4, 5), 2, 8, True),
        (3, 1, 2, (9, 3, 4), 2, 3, False),
        (2, 17, 1, (9, 9, 0), 2, 8, True),  # no policy trajectories, no dynamics
        (1, 5, 2, (5, 5, 5), 1, 8, False),  # nothing but policy trajectories
    ],
)
def test_plan_is_the_reference(
    make_weights, envs, action_dim, horizon, shape, iterations, simnorm, explore
):
    samples, elites, trajectories = shape
    weights = make_weights(70, action_dim, latent=24, hidden=37, simnorm=simnorm)
    config = PlannerConfig(
        samples=samples,
        elites=elites,
        policy_trajectories=trajectories,
        horizon=horizon,
        iterations=iterations,
        score="unrolled",
    )
    plan = planner(weights, config, problems=envs, schedule=SCHEDULES[(horizon + trajectories) % 2])
    before = plan.mean.uniform_(-0.5, 0.5).clone()
    obs = torch.randn(envs, 70)
    done = plan(obs, explore=explore)
    action, _, mean = exact(weights, config, plan, obs, before)
    torch.testing.assert_close(done.action.double(), action, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plan.mean.double(), mean, rtol=1e-4, atol=1e-5)
    assert (done.nonfinite, done.iterations, done.missed) == (0, iterations, False)
    assert (plan.draws().explore != 0).any() == explore and plan.step == 1


@needs_triton
@unlikely
def test_the_report_tells_a_wrong_plan(make_weights):
    """What benchmarks/gpu_report.py times is right: its check takes this plan and no other."""
    from benchmarks.gpu_report import Wrong, check_plan

    config = dataclasses.replace(SMALL, samples=8)
    weights, obs = to_device(make_weights(5, 3)), torch.randn(1, 5)
    other = to_device(make_weights(5, 3, seed=1))
    plan = planner(weights, config, schedule="throughput")
    check_plan(plan, config, weights, obs, GAMMA, elites=0.95)
    with pytest.raises(Wrong, match="from the float64 reference, allowed 1e-04"):
        check_plan(plan, config, other, obs, GAMMA)
    with pytest.raises(Wrong, match="returns: "):
        check_plan(plan, config, weights._replace(critics=other.critics), obs, GAMMA)


@needs_triton
@unlikely
@all_nan
def test_a_problem_without_a_finite_score_falls_back(make_weights):
    weights, obs = make_weights(5, 3), torch.randn(2, 5)
    plan = planner(weights, problems=2)
    sound = plan(obs, explore=True).action
    plan.step, obs[1] = 0, torch.nan
    plan.mean.zero_()
    done = plan(obs, explore=True)
    assert torch.equal(done.action[0], sound[0]) and done.nonfinite == 1
    assert done.action[1].tolist() == [0, 0, 0]  # π(z_0) is not finite either
    assert plan.mean[0].any() and not plan.mean[1].any()

    weights.critics[1].weight[:] = torch.nan
    plan.publish(to_device(weights))  # in place: what was captured reads it too
    done = plan(torch.ones(2, 5), explore=True)
    mean, _ = layers.policy(weights, layers.encode(weights, torch.ones(2, 5)))
    torch.testing.assert_close(done.action, torch.tanh(mean), rtol=1e-4, atol=1e-5)
    assert done.nonfinite == 2 and not plan.mean.any()


@needs_triton
@unlikely
def test_a_plan_follows_from_seed_step_and_mean(make_weights):
    from iqmpc import Planner

    weights, obs = to_device(make_weights(5, 3)), torch.randn(2, 5)
    config = dataclasses.replace(SMALL, backend="triton")
    one, other = (Planner(weights, config, discount=GAMMA, problems=2, seed=s) for s in (1, 2))
    first, state = one.plan(obs, explore=True), one.state_dict()
    second = one.plan(obs, explore=True)
    assert first.device.type == "cpu" and not torch.equal(first, second)
    assert not torch.equal(other.plan(obs, explore=True), first)
    one.load_state_dict(state)
    assert one.step == 1 and torch.equal(one.plan(obs, explore=True), second)
    one.load_state_dict(state)
    one.reset(0)
    assert not one.mean[0].any() and one.mean[1].any()
    assert torch.equal(one.plan(obs, explore=True)[1], second[1])  # the other's is as it was


@needs_triton
def test_the_draws_are_random(make_weights):
    many, few = (
        planner(make_weights(5, 3), dataclasses.replace(SMALL, samples=n), problems=2)
        for n in (600, 6)
    )

    def drawn(step, seed=7, plan=many):
        plan._seed = seed
        plan._control.copy_(torch.tensor([seed - 2**64 * (seed >= 2**63), step, 1]))
        plan._draw()
        return plan._normal.clone().double(), plan._uniform.clone(), plan._pair.clone()

    x, uniform, _ = drawn(0)
    assert torch.equal(drawn(0)[0], x)
    bound = 5 / len(x) ** 0.5
    for power, moment, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((x**power).mean() - moment) < bound * spread**0.5
    others = [drawn(1)[0], drawn(2**32)[0], drawn(0, seed=8)[0], drawn(0, seed=2**63 + 7)[0]]
    quarters = x.view(4, -1)
    for y, z in (
        *((x, y) for y in others),
        (x[1:], x[:-1]),
        (quarters[0], quarters[1]),
        (quarters[0], quarters[2]),
    ):
        assert abs((y * z).mean()) < 5 / len(y) ** 0.5
    pairs, all_uniform = [], []
    for step in range(150):
        _, uniform, pair = drawn(step, plan=few)
        pairs.append(tuple(pair.tolist()))
        all_uniform.append(uniform)
    counts = {pair: pairs.count(pair) for pair in pairs}
    assert len(counts) == 6 and min(counts.values()) > 10  # of three critics, 25 each
    u = torch.cat(all_uniform).ravel()
    assert 0 < u.min() and u.max() < 1 and abs(u.mean() - 0.5) < 5 / (12 * len(u)) ** 0.5


@needs_triton
@unlikely
def test_bf16_plans_nearly_the_same(make_weights):
    weights, obs = make_weights(17, 6, latent=64, hidden=64), torch.randn(1, 17)
    config = dataclasses.replace(SMALL, samples=24, elites=12, horizon=1)
    plans = [
        planner(weights, dataclasses.replace(config, precision=p), schedule="latency")
        for p in ("float32", "bf16")
    ]
    for plan in plans:
        plan(obs)
    assert 0 < (plans[0].mean - plans[1].mean).abs().max() < 0.1


@needs_triton
def test_without_planning_the_policy_acts_on_the_device(make_weights):
    weights, obs = make_weights(5, 3), torch.randn(2, 5)
    plan = planner(weights, dataclasses.replace(SMALL, enabled=False), problems=2)
    z = layers.encode(weights, obs)
    for explore in (False, True):
        done = plan(obs, explore=explore)
        expected = layers.policy_action(weights, z, plan.draws().explore.cpu())
        torch.testing.assert_close(done.action, expected, rtol=1e-4, atol=1e-5)
        assert done.iterations == done.nonfinite == 0
    obs[1] = torch.nan
    done = plan(obs)
    assert done.nonfinite == 1 and done.action[1].tolist() == [0, 0, 0]


class Launches(TorchDispatchMode):
    """Stands in for every kernel of a plan, and refuses what would make the host wait or choose."""

    ALLOWED = {"empty", "new_empty", "slice", "select", "view", "detach", "alias", "as_strided"}

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        super().__init__()
        from iqmpc.kernels.mppi_plan import triton as plan
        from iqmpc.kernels.mppi_rollout import triton as rollout

        self.names: list[str] = []
        for module in (plan, rollout):
            for name in vars(module):
                if name.endswith("_kernel"):
                    monkeypatch.setattr(module, name, self.recorder(name))

    def recorder(self, name: str):
        class Kernel:
            def __getitem__(_, grid):
                return lambda *arguments, **named: self.names.append(name)

        return Kernel()

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        assert function._schema.name.removeprefix("aten::") in self.ALLOWED, function
        return function(*arguments, **(named or {}))


@pytest.mark.skipif(not INTERPRETED, reason="on the CPU, in the process that imports Triton")
@pytest.mark.parametrize(
    ("schedule", "launches"),
    [("latency", 1 + 5 + 1 + 15 + 8 * (11 + 1 + 1)), ("throughput", 1 + 5 + 1 + 15 + 8 * 2)],
)
def test_a_plan_is_launches_and_nothing_else(make_weights, monkeypatch, schedule, launches):
    """No synchronisation, no copy and no arithmetic outside the kernels, and not many of them."""
    plan = planner(make_weights(5, 39), PlannerConfig(), schedule=schedule)
    recorded = Launches(monkeypatch)
    plan._plan()  # the tables of jobs are copied once, before a capture
    recorded.names.clear()
    with recorded:
        plan._plan()
    assert len(recorded.names) == launches, Counter(recorded.names)


@pytest.mark.skipif(not INTERPRETED, reason="about the interpreter")
def test_the_interpreter_captures_nothing(make_weights):
    with pytest.raises(
        BackendError, match="interpreter captures no CUDA graph, got planner.capture=true"
    ):
        planner(make_weights(5, 3), dataclasses.replace(SMALL, capture=True))


@needs_triton
def test_what_a_plan_cannot_take_is_named(make_weights):
    weights = make_weights(5, 3)
    bare = weights._replace(encoder=(*weights.encoder[:-1], Layer(*weights.encoder[-1][:2])))
    with pytest.raises(ValueError, match="encoder: the triton backend takes linear layers, each "):
        planner(bare)
    with pytest.raises(ValueError, match="takes weights on a c[a-z]+ device, got meta"):
        planner(weights.map(lambda t: t.to("meta")), move=False)
    with pytest.raises(
        ValueError,
        match="for 1000000000 problems at once needs 57000000000 random "
        "numbers or actions, and the triton backend counts to",
    ):
        planner(weights, problems=10**9)


# --- On a GPU -----------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize("precision", [*TOLERANCE, "tf32"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("envs", [1, 8])
@pytest.mark.parametrize(("action_dim", "latent", "hidden"), [(39, 512, 512), (6, 128, 384)])
def test_at_the_sizes_in_use(make_weights, action_dim, latent, hidden, envs, schedule, precision):
    weights = to_device(make_weights(17, action_dim, latent=latent, hidden=hidden, encoder=64))
    draws = draw(weights, envs, 3, 488)
    expected = in_float64(weights, draws)
    returns = rollout(TritonWeights(weights, precision=precision), draws, schedule=schedule)
    assert (returns - expected).norm() <= TOLERANCE.get(precision, 1e-2) * expected.norm()
    for got, true in zip(returns.topk(64).indices, expected.topk(64).indices, strict=True):
        assert len(set(got.tolist()) & set(true.tolist())) >= 0.95 * 64


@needs_gpu
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_captured_iteration_is_the_uncaptured_one(make_weights, schedule):
    old, new = (to_device(make_weights(5, 6, latent=64, hidden=128, seed=s)) for s in (0, 1))
    packed = TritonWeights(old, precision="bf16")
    inputs = draw(old, 2, 3, 100)

    def iteration():
        returns = rollout(packed, inputs, schedule=schedule)
        return returns, *mppi_refit(
            inputs[1],
            returns,
            elites=16,
            temperature=0.5,
            std_min=0.05,
            std_max=2.0,
            backend="triton",
        )

    iteration()  # compiles and tunes
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = iteration()
    for t, fresh in zip(inputs, draw(old, 2, 3, 100, seed=1), strict=True):
        t.copy_(fresh)
    packed.refresh(new)
    graph.replay()
    for got, expected in zip(captured, iteration(), strict=True):
        assert torch.equal(got, expected)


@needs_gpu
def test_auto_takes_triton_for_tensors_on_the_gpu(make_weights):
    weights = to_device(make_weights(5, 3))
    draws = draw(weights, 1, 2, 8)
    assert torch.equal(mppi_rollout(weights, *draws, GAMMA), rollout(weights, draws))


def pairs_of_plans(make_weights, *configs: PlannerConfig, envs: int = 2, **sizes: Any):
    """Planners alike but for their settings, and observations for some steps."""
    weights = make_weights(17, 6, **(dict(latent=64, hidden=128) | sizes))
    plans = [planner(weights, config, problems=envs) for config in configs]
    return plans, torch.randn(4, envs, 17)


@needs_gpu
@pytest.mark.parametrize("precision", ["float32", "bf16", "tf32"])
@pytest.mark.parametrize("enabled", [True, False])
def test_a_captured_plan_is_the_uncaptured_one(make_weights, precision, enabled):
    config = PlannerConfig(precision=precision, enabled=enabled)
    (captured, launched), observations = pairs_of_plans(
        make_weights, config, dataclasses.replace(config, capture=False)
    )
    assert captured._graph is not None and launched._graph is None
    seen = []
    for step, obs in enumerate(observations):
        if step == 2:  # a new episode, and new weights: neither is captured again
            graph = captured._graph
            for plan in (captured, launched):
                plan.reset(1)
                plan.publish(to_device(make_weights(17, 6, latent=64, hidden=128, seed=1)))
        one, other = (plan(obs, explore=step % 2 == 1) for plan in (captured, launched))
        assert torch.equal(one.action, other.action) and one.nonfinite == other.nonfinite == 0
        assert torch.equal(captured.mean, launched.mean)
        for x, y in zip(captured.draws(), launched.draws(), strict=True):
            assert torch.equal(x, y)
        seen.append(captured.draws().sample_noise.clone())
    assert captured._graph is graph and captured.step == 4
    assert all(not torch.equal(x, y) for x, y in zip(seen, seen[1:], strict=False))  # new draws


@needs_gpu
def test_capturing_leaves_no_trace_and_a_step_can_be_repeated(make_weights):
    (one, other), observations = pairs_of_plans(make_weights, PlannerConfig(), PlannerConfig())
    assert one.step == 0 and not one.mean.any()
    first = [one(obs, explore=True).action for obs in observations]
    other.step = 2
    other(observations[0])
    other.step = 0
    other.reset()
    assert all(
        torch.equal(other(obs, explore=True).action, action)
        for obs, action in zip(observations, first, strict=True)
    )
    from_device = planner(make_weights(17, 6, latent=64, hidden=128), PlannerConfig(), problems=2)
    assert torch.equal(from_device(observations[0].cuda(), explore=True).action, first[0])


@needs_gpu
def test_new_weights_change_the_captured_plan(make_weights):
    old, new = (make_weights(17, 6, latent=64, hidden=128, seed=s) for s in (0, 1))
    refreshed, fresh = planner(old, PlannerConfig()), planner(new, PlannerConfig())
    obs = torch.randn(1, 17)
    before = refreshed(obs).action
    refreshed.publish(to_device(new))
    refreshed.reset()
    refreshed.step = 0
    after = refreshed(obs).action
    assert torch.equal(after, fresh(obs).action) and not torch.equal(after, before)


@needs_gpu
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("envs", [1, 8])
def test_a_plan_at_the_sizes_in_use(make_weights, envs, schedule):
    weights = make_weights(91, 39, latent=512, hidden=512, encoder=256, critics=5)
    config = PlannerConfig()
    plan, obs = planner(weights, config, problems=envs, schedule=schedule), torch.randn(envs, 91)
    for _ in range(2):
        before = plan.mean.clone()
        done = plan(obs, explore=True)
        action, _, mean = exact(weights, config, plan, obs, before)
        # An elite at the edge may be another one in float32.
        assert (plan.mean - mean).square().mean().sqrt() < 1e-2
        assert (done.action - action).abs().amax(1).lt(1e-3).float().mean() >= 0.5


@needs_gpu
def test_auto_plans_with_triton_on_the_gpu(make_weights):
    from iqmpc import Planner

    weights = to_device(make_weights(5, 3))
    for precision, backend in dict(
        float32="triton", tf32="triton", bf16="triton", float64="reference"
    ).items():
        planner = Planner(weights, PlannerConfig(precision=precision), discount=GAMMA)
        action = planner.plan(torch.randn(1, 5))
        assert planner.backend == backend and action.device.type == "cpu"
