"""The Triton kernels against the float64 reference.

On a machine with a CUDA device, here. Without one, the same tests run in Triton's interpreter, in
a process of their own (`test_all_of_this_in_the_interpreter`): TRITON_INTERPRET must be set before
Triton is imported, and Triton must not be imported after Mesa, which other tests load.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from iqmpc.errors import BackendError
from iqmpc.kernels.mppi_refit import mppi_refit
from iqmpc.kernels.mppi_rollout import mppi_rollout, triton_jobs
from iqmpc.kernels.triton_weights import TritonWeights
from iqmpc.kernels.weights import Weights, map_layers
from tests.kernels.contract import BETA, GAMMA, TOLERANCE, assert_within, drawn, in_float64

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU = torch.cuda.is_available() and not INTERPRETED
SCHEDULES = ("throughput", "latency")

needs_triton = pytest.mark.skipif(
    not (GPU or INTERPRETED),
    reason="no CUDA device; test_all_of_this_in_the_interpreter runs it")


all_nan = pytest.mark.filterwarnings("ignore:All-NaN slice")  # the interpreter is NumPy


def needs_gpu(test):
    skip = pytest.mark.skipif(not GPU, reason="torch sees no CUDA device")
    return pytest.mark.gpu(skip(test))


def device() -> str:
    return "cuda" if GPU else "cpu"


def to_device(weights: Weights) -> Weights:
    return weights._replace(**{
        part: map_layers(lambda t: t.to(device()), getattr(weights, part))
        for part in ("encoder", "dynamics", "policy", "critics")})


def draw(*sizes: Any, **settings: Any) -> tuple[torch.Tensor, ...]:
    """The contract's draws, where these tests compute."""
    return tuple(t.to(device()) for t in drawn(*sizes, **settings))


def rollout(weights: Weights | TritonWeights, draws, score: str = "advantage", schedule=None):
    from iqmpc.kernels.mppi_rollout.triton import mppi_rollout_triton

    return mppi_rollout_triton(weights, *draws, GAMMA, score, BETA, schedule=schedule)


def pytest_of_this_file(**environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", "-p", "no:cacheprovider",
               __file__]
    return subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True,
        cwd=Path(__file__).parents[2])


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
        [sys.executable, script, "--arch", str(arch)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    done = [json.loads(line) for line in result.stdout.splitlines()]
    assert {x["kernel"] for x in done} == {
        "_chain_kernel", "_stage_kernel", "_score_kernel", "_refit_kernel"}
    limit = {80: 163, 90: 227}[arch] * 1024
    for x in done:
        assert x["shared"] <= limit, x
        assert x["tensor_core"] or x["kernel"] not in ("_chain_kernel", "_stage_kernel"), x


def test_importing_the_operations_does_not_import_triton():
    code = ("import sys, torch; before = 'triton' in sys.modules;"
            "import iqmpc.kernels.mppi_rollout, iqmpc.kernels.mppi_refit;"
            "assert before or 'triton' not in sys.modules")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(GPU or INTERPRETED, reason="Triton can run here")
def test_triton_by_name_is_an_error_without_a_gpu(make_weights):
    weights = make_weights(5, 3)
    draws = draw(weights, 1, 2, 4)
    for call in (lambda: mppi_rollout(weights, *draws, GAMMA, backend="triton"),
                 lambda: mppi_rollout(TritonWeights(weights), *draws, GAMMA, backend="triton"),
                 lambda: mppi_refit(draws[1], torch.zeros(1, 4), elites=2, temperature=0.5,
                                    std_min=0.05, std_max=2.0, backend="triton")):
        with pytest.raises(BackendError, match="'triton' cannot run: torch sees no CUDA device"):
            call()


@pytest.mark.parametrize(("change", "message"), [
    (dict(dynamics=()), "dynamics: the triton backend takes three layers, LayerNorm on all"),
    (dict(simnorm_dim=128), "simnorm_dim: the triton backend takes at most 64, got 128"),
    (dict(simnorm_dim=5), "simnorm_dim: must divide the latent size 128, got 5"),
])
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
    memory = [packed.matrices, packed.vectors, *(t for x in packed.policy_layers for t in x
                                                 if t is not None)]
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
    """No job reads scratch memory before it is written, and none of a stage's jobs disturb it."""
    w = TritonWeights(make_weights(5, 3))
    prior = -1  # stands for the place of ã_t

    def reads(job):
        found = {job.x} if job.inputs else set()
        found |= {job.source} if job.init == triton_jobs.SAVED else set()
        return found | ({prior} if job.action == triton_jobs.PRIOR else set())

    def writes(job):
        if job.kind == triton_jobs.POLICY:
            return {prior}
        return {job.out} | ({job.save} if job.save >= 0 else set())

    chain = triton_jobs.chain(w, horizon)
    written = set()
    for job in chain.jobs:
        assert reads(job) <= written and not (job.inputs and job.x in writes(job))
        written |= writes(job)
    assert max(written) < chain.columns

    stages = triton_jobs.stages(w, horizon)
    written = set()
    for stage in stages.stages:
        read, new = set().union(*map(reads, stage.jobs)), [writes(job) for job in stage.jobs]
        assert read <= written and not read & set().union(*new)
        assert sum(map(len, new)) == len(set().union(*new))  # each has places of its own
        assert all(job.inputs == 0 or job.in_features > 1 for job in stage.jobs)
        written |= set().union(*new)
    heads = {stages.heads + i * w.width for i in range(2 * (2 * horizon - 1))}
    assert heads <= written and max(written) < stages.columns
    for jobs in (chain.jobs, [job for stage in stages.stages for job in stage.jobs]):
        assert sum(job.kind == triton_jobs.HEAD for job in jobs) == len(heads)
        assert sum(job.kind == triton_jobs.SIMNORM for job in jobs) == horizon - 1


# --- The kernels, on a GPU or in the interpreter ------------------------------------------------


@needs_triton
@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("envs", "horizon", "samples", "action_dim", "latent", "simnorm", "hidden", "score"), [
        (3, 3, 5, 1, 8, 8, 13, "advantage"),  # tiles over several problems
        (1, 1, 1, 3, 24, 8, 37, "advantage"),  # no dynamics, one sample
        (2, 2, 70, 1, 8, 8, 9, "unrolled"),  # in the interpreter, more tiles than programs
        (1, 3, 9, 17, 136, 8, 100, "advantage"),  # several blocks of columns
        (2, 3, 3, 5, 24, 3, 70, "unrolled"),  # groups of three
        (1, 1, 4, 1, 8, 2, 9, "unrolled"),
    ])
def test_rollout_is_the_reference(make_weights, envs, horizon, samples, action_dim, latent,
                                  simnorm, hidden, score, schedule, precision):
    weights = to_device(
        make_weights(5, action_dim, latent=latent, simnorm=simnorm, hidden=hidden))
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
def test_triton_by_name(make_weights):
    weights = to_device(make_weights(5, 3))
    draws = draw(weights, 1, 2, 6)
    expected = rollout(weights, draws)
    for given in (weights, TritonWeights(weights)):
        assert torch.equal(
            mppi_rollout(given, *draws, GAMMA, entropy=BETA, backend="triton"), expected)


@pytest.mark.skipif(not INTERPRETED, reason="about the interpreter")
def test_auto_does_not_take_the_interpreter(make_weights):
    weights = make_weights(5, 3)
    draws = draw(weights, 1, 2, 6)
    assert torch.equal(mppi_rollout(weights, *draws, GAMMA),
                       mppi_rollout(weights, *draws, GAMMA, backend="cpu"))


@needs_triton
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_sample_does_not_depend_on_its_neighbours(make_weights, schedule):
    weights = to_device(make_weights(5, 3))
    z0, actions, noise, pair = draw(weights, 2, 2, 20)
    whole = rollout(weights, (z0, actions, noise, pair), schedule=schedule)
    part = rollout(
        weights, (z0[1:], actions[1:, :, 3:9], noise[1:, :, 3:9], pair), schedule=schedule)
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
@pytest.mark.parametrize(("change", "message"), [
    (dict(actions=torch.zeros(1, 3, 4, 3).double()),
     "actions must be float32 for the triton backend, got torch.float64"),
    (dict(z0=torch.zeros(1, 16, requires_grad=True)), "z0 requires grad and the triton backend"),
    (dict(policy_noise=torch.zeros(1, 2, 4, 3, device="meta")), "tensors on one"),
    (dict(critic_pair=torch.zeros(2, device="meta", dtype=torch.int64)), "tensors on one"),
])
def test_arguments_that_do_not_fit_are_named(make_weights, change, message):
    weights = to_device(make_weights(5, 3))
    names = ("z0", "actions", "policy_noise", "critic_pair")
    given = dict(zip(names, draw(weights, 1, 3, 4), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        mppi_rollout(weights, **given, discount=GAMMA, backend="triton")
    with pytest.raises(ValueError, match="schedule must be one of throughput, latency"):
        rollout(weights, draw(weights, 1, 3, 4), schedule="both")


def refits(actions: torch.Tensor, returns: torch.Tensor, elites: int):
    """The Triton kernel's answer and the float64 reference's."""
    settings = dict(elites=elites, temperature=0.5, std_min=0.05, std_max=2.0)
    actions, returns = actions.to(device()), returns.to(device())
    return (mppi_refit(actions, returns, **settings, backend="triton"),
            mppi_refit(actions.double(), returns.double(), **settings, backend="reference"))


@needs_triton
@pytest.mark.parametrize(("envs", "horizon", "samples", "action_dim", "elites"), [
    (1, 3, 1, 1, 1), (3, 2, 9, 2, 9), (2, 1, 33, 5, 7), (2, 3, 200, 17, 64), (1, 1, 300, 1, 300)])
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
        return returns, *mppi_refit(inputs[1], returns, elites=16, temperature=0.5, std_min=0.05,
                                    std_max=2.0, backend="triton")

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
