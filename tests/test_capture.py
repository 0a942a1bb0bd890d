"""The captured update: on a CPU by a recorder of tensor operations, on a GPU as a CUDA graph."""

import contextlib
import gc

import numpy as np
import pytest
import torch

import iqmpc.losses
import iqmpc.update_backends
from iqmpc import Episode, Learner, Trainer, capture
from iqmpc.capture import WARM_UPS, CapturedStep
from iqmpc.errors import ConfigError
from iqmpc.kernels.weights import refresh, snapshot
from iqmpc.replay import SliceReplay
from iqmpc.run_folder import RunFolder
from tests.recorder import Recorder
from tests.runs import rows_of

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")


class RecordedStep(CapturedStep):
    """A `CapturedStep` on the CPU."""

    def _prepare(self, device):
        assert device.type == "cpu"

    def _warm_up(self, function):
        return function()

    def _capture(self, function):
        # A capture executes nothing: what recording did is taken back.
        learner = self.learner
        state = {k: v.clone() for k, v in learner.state_dict().items()}
        sampler = learner.sampler.get_state()
        self.recorder = recorder = Recorder()
        with recorder:
            result = function()
        learner.load_state_dict(state)
        learner.sampler.set_state(sampler)

        def replay():
            recorder.replay()
            return result

        return replay

    def _forget(self):
        self._replay = None


def learner_of(config, mode, monkeypatch, device="cpu", obs_shape=2):
    """`graph` on a CPU is the eager losses, recorded."""
    if mode != "graph" or device != "cpu":
        return Learner(obs_shape, 2, config.replace({"learner.mode": mode}), device)
    monkeypatch.setattr(
        iqmpc.update_backends, "resolve_update", lambda config, *_: config.learner.mode
    )
    monkeypatch.setattr(iqmpc.update_backends, "CapturedStep", RecordedStep)
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    learner = Learner(obs_shape, 2, config.replace({"learner.mode": "graph"}))
    learner.backend.captured.learner = learner
    return learner


def replays(device="cpu", episodes=4):
    experts, behaviour = (
        SliceReplay(2, 2, horizon=3, capacity=100_000, device=device) for _ in range(2)
    )
    for replay in (experts, behaviour):
        replay._range_on_device = True  # as on a GPU
    for number in range(episodes):
        add(experts, number, 30)
        add(behaviour, 100 + number, 20)
    return experts, behaviour


def add(replay, number, steps):
    g = torch.Generator().manual_seed(number)
    replay.add(
        Episode(
            torch.randn(steps + 1, 2, generator=g).numpy(),
            (torch.rand(steps, 2, generator=g) * 2 - 1).numpy(),
            torch.rand(steps, generator=g).numpy(),
            terminated=number % 2 == 0,
        )
    )


def values(metrics):
    """Bit for bit, and a NaN is itself."""
    return {k: v.item().hex() for k, v in metrics.items()}


def same_state(one, two):
    a, b = one.state_dict(), two.state_dict()
    assert a.keys() == b.keys()
    return all(torch.equal(a[k], b[k]) for k in a) and torch.equal(
        one.sampler.get_state(), two.sampler.get_state()
    )


def addresses(learner):
    moments = [
        t
        for o in (learner.model_optimiser, learner.policy_optimiser)
        for state in o.state.values()
        for t in state.values()
    ]
    targets = [t for layer in learner.targets for t in layer if t is not None]
    gradients = [p.grad for p in learner.model.parameters()]
    averages = [] if learner.averages is None else learner.averages.tensors()
    return [
        t.data_ptr()
        for t in [*learner.model.parameters(), *targets, *averages, *moments, *gradients]
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"learner.gradient_penalty": True},
        {"learner.objective": "v_diff", "model.dropout": 0.1},
        {"learner.objective": "td"},
        {"model.termination": True},
        {
            "learner.gradient_penalty": True,
            "learner.dropout": "always",
            "learner.entropy": "presquash",
            "agent.average": "always",
        },
        {"learner.gradient_penalty": True, "learner.matmul": "bf16"},
    ],
    ids=["iq", "v_diff", "td", "termination", "dropout and average", "bf16"],
)
def test_a_recorded_update_is_the_eager_one(small_config, monkeypatch, changes):
    """Same draws: the same metrics and state, bit for bit, in every update, the first included."""
    config = small_config.replace(changes)
    eager = learner_of(config, "eager", monkeypatch)
    graph = learner_of(config, "graph", monkeypatch)
    experts, behaviour = replays()
    if config.learner.objective == "td":
        experts = None
    seen = []
    for number in range(WARM_UPS + 9):
        if number % 4 == 3:  # the replay grows in place
            add(behaviour, number, 25)
        one = values(eager.learn(experts, behaviour))
        assert one == values(graph.learn(experts, behaviour))
        assert same_state(eager, graph)
        seen.append(one["critic_loss"])
    assert graph.backend.captured.captures == 1 and graph.updates == WARM_UPS + 9
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize(("matmul", "inside"), [("float32", "highest"), ("tf32", "high")])
def test_products_are_set_before_the_warm_ups_and_the_capture(
    small_config, monkeypatch, matmul, inside
):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    torch.set_float32_matmul_precision("medium")
    seen = []
    for name in ("model_loss", "policy_loss"):
        loss = getattr(iqmpc.losses, name)

        def spied(*arguments, loss=loss):
            seen.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
            return loss(*arguments)

        monkeypatch.setattr(iqmpc.losses, name, spied)
    try:
        graph = learner_of(small_config.replace({"learner.matmul": matmul}), "graph", monkeypatch)
        experts, behaviour = replays()
        for _ in range(WARM_UPS + 2):
            graph.learn(experts, behaviour)
        assert torch.get_float32_matmul_precision() == "medium"  # as others had it
    finally:
        torch.set_float32_matmul_precision("highest")
    # the last update was a replay: it asks nothing
    assert seen == [(inside, matmul == "tf32")] * 2 * (WARM_UPS + 1)


def test_a_recorded_update_that_is_not_finite_is_left_out(small_config, monkeypatch):
    """Found and counted on the device: the host neither waits nor decides."""
    config = small_config.replace({"agent.average": "evaluation", "learner.batch": 4})
    eager = learner_of(config, "eager", monkeypatch)
    graph = learner_of(config, "graph", monkeypatch)
    experts, behaviour = replays()
    behaviour.add(Episode(np.full((5, 2), np.nan, np.float32), np.zeros((4, 2), np.float32)))
    skipped = []
    for _ in range(WARM_UPS + 30):
        one = values(eager.learn(experts, behaviour))
        assert one == values(graph.learn(experts, behaviour)) and same_state(eager, graph)
        skipped.append(graph.skipped_updates)
    assert all(t.isfinite().all() for t in graph.weights.tensors())
    assert 0 < skipped[-1] < graph.updates == len(skipped) and skipped[-1] > skipped[WARM_UPS]
    assert (
        one["skipped_updates"] == float(skipped[-1]).hex() and graph.backend.captured.captures == 1
    )


def test_a_recorded_update_from_images_is_the_eager_one(small_config, monkeypatch):
    """Frames are stacked and shifted on the device too."""
    config = small_config.replace({"learner.batch": 3})
    eager = learner_of(config, "eager", monkeypatch, obs_shape=(9, 64, 64))
    graph = learner_of(config, "graph", monkeypatch, obs_shape=(9, 64, 64))
    behaviour = SliceReplay((9, 64, 64), 2, horizon=3, capacity=100)
    behaviour._range_on_device = True
    for _ in range(WARM_UPS + 4):
        frames, *rest = (
            torch.randint(256, (9, 3, 64, 64), dtype=torch.uint8),
            torch.rand(8, 2),
            torch.rand(8),
        )
        behaviour.add(Episode(frames.numpy(), *(x.numpy() for x in rest)))
        assert values(eager.learn(behaviour, behaviour)) == values(
            graph.learn(behaviour, behaviour)
        )
        assert same_state(eager, graph)
    assert graph.backend.captured.captures == 1


def test_a_recorded_update_follows_its_replay(small_config, monkeypatch):
    """Slices that came after the capture are drawn, also when the replay had to move."""
    eager = learner_of(small_config, "eager", monkeypatch)
    graph = learner_of(small_config, "graph", monkeypatch)
    experts, behaviour = replays()
    one = behaviour._line.data_ptr()
    for number in range(12):
        for _ in range(WARM_UPS + 2):
            assert values(eager.learn(experts, behaviour)) == values(
                graph.learn(experts, behaviour)
            )
        add(behaviour, number, 800)
    assert behaviour._line.data_ptr() != one and behaviour.allocations == 3
    assert graph.backend.captured.captures == 3  # one for each place where the rows were
    # demonstrations on both sides is another graph
    for _ in range(WARM_UPS + 2):
        assert values(eager.learn(experts, experts)) == values(graph.learn(experts, experts))
    assert graph.backend.captured.captures == 4


def test_static_tensors_stay_where_they_are(small_config, monkeypatch):
    """Over updates, growth of the replay, load_state_dict and publishing."""
    small_config = small_config.replace({"agent.average": "always"})
    graph = learner_of(small_config, "graph", monkeypatch)
    experts, behaviour = replays()
    published = snapshot(graph.weights)
    for _ in range(WARM_UPS):
        graph.learn(experts, behaviour)
    state = {k: v.clone() for k, v in graph.state_dict().items()}
    sampler = graph.sampler.get_state()
    metrics = graph.learn(experts, behaviour)
    first, where = values(metrics), addresses(graph)
    add(behaviour, 50, 40)
    again = graph.learn(experts, behaviour)
    refresh(published, graph.weights)
    assert all(again[k] is metrics[k] for k in metrics) and values(metrics) != first
    assert all(
        torch.equal(a, b) for a, b in zip(published.tensors(), graph.weights.tensors(), strict=True)
    )

    # A state that is loaded is the one that the next replay starts from.
    eager = learner_of(small_config, "eager", monkeypatch)
    for learner in (eager, graph):
        learner.load_state_dict(state)
        learner.sampler.set_state(sampler)
        assert learner.updates == WARM_UPS
        learner.learn(experts, behaviour)
    assert same_state(eager, graph) and addresses(graph) == where
    assert graph.backend.captured.captures == 1


def test_loading_a_state_without_moments_is_a_fresh_start(small_config, monkeypatch):
    used, fresh = (learner_of(small_config, "eager", monkeypatch) for _ in range(2))
    state = {k: v.clone() for k, v in fresh.state_dict().items()}
    experts, behaviour = replays()
    for _ in range(3):
        used.learn(experts, behaviour)
    used.load_state_dict(state)
    used.sampler.set_state(fresh.sampler.get_state())
    for learner in (used, fresh):
        for _ in range(2):
            learner.learn(experts, behaviour)
    assert same_state(used, fresh)


def test_host_work_in_an_update_would_be_seen(small_config, monkeypatch):
    """The recorder sees a synchronisation, and a draw whose range is a number of the host's."""
    graph = learner_of(small_config, "graph", monkeypatch)
    experts, behaviour = replays()
    with pytest.raises(RuntimeError, match="_local_scalar_dense.* makes the host wait"), Recorder():
        graph.backend.update_on_device(graph.backend.batch(experts, behaviour))[
            "critic_loss"
        ].item()
    eager = learner_of(small_config, "eager", monkeypatch)
    graph = learner_of(small_config, "graph", monkeypatch)
    behaviour._range_on_device = False
    for _ in range(WARM_UPS + 1):
        eager.learn(experts, behaviour), graph.learn(experts, behaviour)
    assert same_state(eager, graph)
    add(behaviour, 50, 40)
    eager.learn(experts, behaviour), graph.learn(experts, behaviour)
    assert not same_state(eager, graph)


def test_graph_needs_cuda_and_slices(small_config, monkeypatch):
    with pytest.raises(ConfigError, match="learner.mode=graph needs a CUDA device, got cpu"):
        Learner(2, 2, small_config.replace({"learner.mode": "graph"}))
    graph = learner_of(small_config, "graph", monkeypatch)
    experts, behaviour = replays()
    for _ in range(WARM_UPS + 1):
        graph.learn(experts, behaviour)
    behaviour.load_state_dict(SliceReplay(2, 2, horizon=3, capacity=9).state_dict())
    with pytest.raises(ValueError, match="no episode of at least 3 steps"):
        graph.learn(experts, behaviour)


@pytest.mark.parametrize("overlap", ["off", "async"])
def test_a_run_on_recorded_updates_is_the_eager_run(
    tmp_path, small_config, point_env, point_demonstrations, monkeypatch, overlap
):
    """Also resumed, and what it logs: metrics are kept where the next update overwrites them."""

    def go(name, mode, steps=100, **options):
        config = small_config.replace(
            {"train.overlap": overlap, "learner.mode": mode, "train.steps": steps}
        )
        trainer = Trainer(config, point_env, point_demonstrations, run=tmp_path / name, **options)
        trainer.behaviour._range_on_device = trainer.experts._range_on_device = True
        if mode == "graph":
            trainer.learner.backend.captured.learner = trainer.learner
        trainer.train()
        if mode == "graph":
            assert trainer.learner.backend.captured.captures == 1

    monkeypatch.setattr(
        iqmpc.update_backends, "resolve_update", lambda config, *_: config.learner.mode
    )
    monkeypatch.setattr(iqmpc.update_backends, "CapturedStep", RecordedStep)
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    go("eager", "eager")
    go("graph", "graph")
    go("parts", "graph", 60)
    go("parts", "graph", resume=True)
    one, *others = (RunFolder(tmp_path / n).newest()[1] for n in ("eager", "graph", "parts"))
    for other in others:
        assert all(torch.equal(one[k], other[k]) for k in one) and one.keys() == other.keys()
    assert rows_of(tmp_path / "eager") == rows_of(tmp_path / "graph")


@pytest.mark.parametrize("fails", [False, True])
def test_a_capture_is_alone_and_collects_nothing(monkeypatch, fails):
    """With stand-ins for CUDA's classes: what surrounds a capture, also one that fails."""
    seen = []

    class Graph:
        def register_generator_state(self, generator):
            seen.append(generator)

    @contextlib.contextmanager
    def graph_(graph, *, stream, capture_error_mode):
        seen.append((stream, capture_error_mode))
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph_)

    def work():
        assert not gc.isenabled() and capture._CAPTURING.locked()
        if fails:
            raise RuntimeError("not permitted when stream is capturing")
        return "result"

    if fails:
        with pytest.raises(RuntimeError, match="not permitted"):
            capture.captured(work, "stream", ["generator"])
    else:
        graph, result = capture.captured(work, "stream", ["generator"])
        assert isinstance(graph, Graph) and result == "result"
    assert seen == ["generator", ("stream", "thread_local")]
    assert gc.isenabled() and not capture._CAPTURING.locked()


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("penalty", [False, True])
def test_captured_updates_are_the_uncaptured_ones(small_config, monkeypatch, penalty):
    """The same kernels on the same draws: bit for bit, over growth, a loaded state and warm-ups."""
    config = small_config.replace({"learner.gradient_penalty": penalty, "agent.average": "always"})
    plain, graph = (learner_of(config, m, monkeypatch, "cuda") for m in ("compile", "graph"))
    experts, behaviour = replays("cuda")
    for number in range(40):
        assert values(plain.learn(experts, behaviour)) == values(graph.learn(experts, behaviour))
        assert same_state(plain, graph)
        add(behaviour, number, 20 if number != 20 else 5000)
    assert graph.backend.captured.captures == 2
    where = addresses(graph)
    state = {k: v.clone() for k, v in plain.state_dict().items()}
    sampler = plain.sampler.get_state()
    resumed = learner_of(config.replace({"seed": 5}), "graph", monkeypatch, "cuda")
    for learner in (plain, graph, resumed):
        learner.load_state_dict(state)
        learner.sampler.set_state(sampler)
        for _ in range(WARM_UPS + 5):
            learner.learn(experts, behaviour)
    assert same_state(plain, graph) and same_state(plain, resumed) and addresses(graph) == where


@pytest.mark.gpu
@on_gpu
def test_captured_updates_draw_anew(small_config, monkeypatch):
    """On fixed data no two replays are alike, and another seed draws otherwise."""
    seen = set()
    for seed in (0, 1):
        graph = learner_of(
            small_config.replace({"seed": seed, "learner.lr": 1e-12}), "graph", monkeypatch, "cuda"
        )
        experts, behaviour = replays("cuda")
        for _ in range(20):
            metrics = values(graph.learn(experts, behaviour))
            seen.add((metrics["policy_loss"], metrics["consistency"], metrics["target_value"]))
        assert graph.backend.captured.captures == 1
    assert len(seen) == 40


@pytest.mark.gpu
@on_gpu
def test_captured_updates_do_not_wait_for_the_device(small_config, monkeypatch):
    graph = learner_of(small_config, "graph", monkeypatch, "cuda")
    experts, behaviour = replays("cuda")
    for _ in range(WARM_UPS + 1):
        graph.learn(experts, behaviour)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            graph.learn(experts, behaviour)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@on_gpu
def test_captured_updates_do_not_drift_from_eager_ones(small_config, monkeypatch):
    """1,000 updates from one seed, on the same draws: rounding differs, what is learnt does not.

    In every block of 100 the mean of each loss is within 0.1 % of the eager one's.
    """
    config = small_config.replace({"learner.batch": 32})
    experts, behaviour = replays("cuda", episodes=10)
    blocks = []
    for mode in ("eager", "graph"):
        learner = learner_of(config, mode, monkeypatch, "cuda")
        losses = []
        for _ in range(1000):
            metrics = learner.learn(experts, behaviour)
            losses.append(
                torch.stack([metrics[k] for k in ("consistency", "critic_loss", "policy_loss")])
            )
        blocks.append(torch.stack(losses).unflatten(0, (10, 100)).mean(1))
    torch.testing.assert_close(blocks[1], blocks[0], rtol=1e-3, atol=1e-6)
