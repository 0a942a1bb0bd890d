"""An agent in a control loop: what is counted, and what is said where real time is not allowed."""

import errno
import json
import os

import numpy as np
import pytest
from typer.testing import CliRunner

from iqmpc import bench, cli
from iqmpc.errors import BackendError, ConfigError
from iqmpc.latency import LatencyHistogram
from tests.test_export import random_agent, saved


@pytest.fixture
def file(tmp_path, monkeypatch):
    """An agent, in a process that stays as it is."""
    monkeypatch.setattr(bench, "become_real_time", lambda threads: [f"nothing for {threads}"])
    return saved(tmp_path / "agent.iqmpc", random_agent(horizon=2))


def test_every_tick_is_counted(file):
    found = bench.bench(file, hz=200, seconds=0.2)
    summary = found.summary()
    assert summary["plans"] == 40 and len(found.ticks) == 40
    assert summary["budget_us"] == pytest.approx(0.8 * 5000)
    assert summary["not_real_time"] == ["nothing for 1"]
    assert summary["plan_p50_us"] <= summary["plan_p99_us"] <= summary["plan_max_us"]
    assert summary["tick_max_us"] >= summary["plan_p50_us"] / 2
    prior, *others = found.fits
    assert prior["samples"] == 0 and 0 < prior["median_ms"] <= prior["max_ms"]
    assert {row["samples"] for row in others} == set(bench.SAMPLES)
    for samples in bench.SAMPLES:  # all but the last of a row fit
        row = [r["median_ms"] for r in others if r["samples"] == samples]
        assert all(ms <= 4.0 for ms in row[:-1])
    with pytest.raises(ConfigError, match="hz and seconds must be positive, got 0 and 1"):
        bench.bench(file, hz=0, seconds=1)


def test_a_backend_that_keeps_to_no_budget_is_late_beyond_it(file):
    """As a GPU's: the same loop and table, and plans as long as they take."""
    reference = {"planner.backend": "reference", "planner.iterations": 1}
    found = bench.bench(file, hz=0.02, seconds=50, changes=reference, table=False)
    assert found.late_plans == 0 and found.plans.plans == 1 and found.budget_us == 40e6
    late = bench.bench(file, hz=20_000, seconds=2e-4, changes=reference, table=False)
    assert late.summary()["late_plans"] == late.plans.plans == 4  # in 40 microseconds
    assert late.summary()["samples_mean"] == found.summary()["samples_mean"] > 0
    with pytest.raises(BackendError, match="planner.backend=triton needs weights on a CUDA"):
        bench.bench(file, hz=20, seconds=0.1, changes={"planner.backend": "triton"})


def test_the_command_prints_and_draws(file, tmp_path):
    words = ["bench", str(file), "planner.budget_us=1e6", "--hz", "100", "--seconds", "0.05"]
    done = CliRunner().invoke(cli.app, [*words, "--no-table", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["plans"] == 5 and found["budget_us"] == 1e6 and found["fits"] == []
    assert found["late_plans"] == found["missed_plans"] == 0 and found["samples_mean"] == 108
    pytest.importorskip("matplotlib")
    done = CliRunner().invoke(cli.app, [*words, "--png", str(tmp_path / "plans.png")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "plans.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_not_allowed_is_said(monkeypatch):
    def refuse(*arguments):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    class Libc:
        @staticmethod
        def mlockall(flags):
            return -1

    monkeypatch.setattr(os, "sched_setscheduler", refuse, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1}, raising=False)
    monkeypatch.setattr(bench.ctypes, "CDLL", lambda *a, **k: Libc)
    monkeypatch.setattr(bench.ctypes, "get_errno", lambda: errno.ENOMEM)
    scheduler, core, memory = bench.become_real_time(2)
    assert scheduler.startswith("no real-time class (SCHED_FIFO): Operation not permitted")
    assert core == "no core of its own: 2 threads, 2 cores"
    assert memory.startswith("no locked memory (mlockall): Cannot allocate memory")


def test_a_thread_gets_the_last_core(monkeypatch):
    asked = []
    monkeypatch.setattr(os, "sched_setscheduler", lambda *a: asked.append(a[1]), raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {4, 2, 7}, raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", lambda *a: asked.append(a), raising=False)
    monkeypatch.setattr(
        bench.ctypes, "CDLL", lambda *a, **k: type("Libc", (), {"mlockall": lambda flags: 0})
    )
    assert bench.become_real_time(1) == []
    assert asked == [os.SCHED_FIFO, (0, [7])]


def test_bins_of_a_histogram():
    histogram = LatencyHistogram()
    edges, counts = histogram.bins()
    assert len(counts) == 0
    for seconds in (0.001, 0.001, 0.004):
        histogram.add(seconds)
    edges, counts = histogram.bins()
    assert counts.sum() == 3 and counts[0] == 2 and counts[-1] == 1
    assert len(edges) == len(counts) + 1 and np.all(np.diff(edges) > 0)
    assert edges[0] <= 0.001 < edges[1] and edges[-2] <= 0.004 < edges[-1]
