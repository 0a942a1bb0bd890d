"""benchmarks.offline: the kit is packed and run, on a CPU and without a network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.offline import pack as packing
from benchmarks.offline import there
from benchmarks.offline.pack import ROOT, pack

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def kit(tmp_path_factory) -> Path:
    """Without what needs a network or minutes."""
    out = tmp_path_factory.mktemp("kit") / "kit"
    manifest = pack(out, wheels=False, cache=False)
    assert json.loads((out / "manifest.json").read_text()) == manifest
    assert 0 < manifest["mib"] < packing.LIMIT_MIB and manifest["arch"] is None
    return out


def run_there(kit: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "there.py", *words], cwd=kit, capture_output=True, text=True
    )


def test_the_sources_are_whole_and_nothing_else_is_there(kit: Path) -> None:
    source = kit / "source"
    for name in ("iqmpc/kernels", "iqmpc/configs"):
        assert (source / name).is_symlink() and (source / name / "__init__.py").exists()
    assert (source / "benchmarks/gpu_report.py").exists() and (source / "pyproject.toml").exists()
    assert not list(source.glob("**/*.so")) and not (source / ".git").exists()


def test_a_kit_above_the_limit_and_a_folder_in_use_are_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(packing, "LIMIT_MIB", 0)
    with pytest.raises(ValueError, match="MiB, expected at most 0"):
        pack(tmp_path / "kit", wheels=False, cache=False)
    with pytest.raises(ValueError, match="is not empty"):
        pack(tmp_path / "kit", wheels=False, cache=False)


def test_the_steps_and_their_time(kit: Path, monkeypatch) -> None:
    monkeypatch.setattr(there.shutil, "which", lambda name: sys.executable)
    steps = there.report_steps(kit / "results", cpu=False)
    assert [step.name for step in steps] == ["report", "profile", "sanitizer"]
    assert sum(step.seconds for step in steps) < 600 > there.LIMITS_S["test"]
    assert steps[-1].before[0] == sys.executable and "--once" in steps[-1].words

    tests = there.test_steps(kit / "results", kit / "source", 3)
    files = [word for step in tests for word in step.words if word.endswith(".py")]
    assert len(tests) == 3 and len(files) == len(set(files))
    assert {"tests/test_capture.py", "tests/kernels/test_triton_tiles.py"} <= set(files)
    printed = run_there(kit, "test", "--dry-run", "--groups", "3").stdout.splitlines()
    assert len(printed) == 3 and all(line.startswith("test-") for line in printed)


def test_what_hangs_or_fails_is_said_and_the_others_run(kit: Path, monkeypatch) -> None:
    monkeypatch.setattr(there, "HERE", kit)
    results = kit / "results"
    results.mkdir(exist_ok=True)
    steps = [
        there.Step("good", ["-c", "import benchmarks; print(benchmarks.__file__)"], 60),
        there.Step("bad", ["-c", "raise SystemExit(3)"], 60),
        there.Step("long", ["-c", "import time; time.sleep(60)"], 1),
    ]
    ended = there.run(steps, results, at_once=2)
    assert ended == {"good": "ok", "bad": "exit code 3", "long": "out of time"}
    assert str(kit / "source") in (results / "good.txt").read_text()  # of the kit, not of here


@pytest.mark.slow
def test_a_cache_is_warm_for_a_gpu_that_is_not_here(tmp_path: Path) -> None:
    """By Triton's own way from a launch to a cubin: a second process compiles nothing."""
    script = """if True:
        import sys
        from iqmpc.config import PlannerConfig
        from benchmarks.offline.warm import warm
        from tests.kernels.conftest import random_weights
        config = PlannerConfig(enabled=False, precision="bf16")
        warm(random_weights(5, 3), config, arch=90)
    """
    made = []
    for _ in range(2):
        subprocess.run(
            [sys.executable, "-c", script],
            check=True,
            cwd=ROOT,
            env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path)},
        )
        made.append({f: f.stat().st_mtime_ns for f in tmp_path.rglob("*.cubin")})
        packing.prune(tmp_path)
    assert made[0] == made[1]
    assert {"_draw_kernel", "_stage_kernel", "_act_kernel"} <= {f.stem for f in made[0]}
    assert {f.stat().st_size for f in tmp_path.rglob("*.ptx")} == {0}
