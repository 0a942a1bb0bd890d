"""What a kit of `benchmarks.offline.pack` does on a machine with a GPU and no network.

    python there.py report     # the report, a kernel profile, compute-sanitizer; below 10 minutes
    python there.py test       # every test that a GPU can run, in parallel; below 10 minutes

Results lie in `results/`, beside this file: report.json, profile.txt, sanitizer.txt, a log of each
group of tests, and summary.json, which says how each step ended. `--dry-run` prints the steps.
Needs nothing but Python's library to start.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
LIMITS_S = {"report": 330, "profile": 80, "sanitizer": 150, "test": 540}
GROUPS = 4  # of tests, at a time on one GPU


@dataclass
class Step:
    """A process: its words after `python`, seconds it may take and the log it writes."""

    name: str
    words: list[str]
    seconds: int
    before: tuple[str, ...] = ()  # a program that runs it


def environment() -> dict[str, str]:
    """The kit's own packages before the machine's; PYTHONSAFEPATH keeps the sources' `iqmpc`, which
    is not built, from hiding the installed one."""
    path = os.pathsep.join(str(HERE / name) for name in ("site", "source"))
    return os.environ | {
        "PYTHONPATH": path,
        "PYTHONSAFEPATH": "1",
        "TRITON_CACHE_DIR": str(HERE / "triton-cache"),
    }


def install() -> None:
    """The kit's wheels into `site`, once."""
    wheels, site = sorted(map(str, HERE.glob("wheels/*.whl"))), HERE / "site"
    if site.exists() or not wheels:
        return
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--target", str(site), *wheels], check=True)


def report_steps(results: Path, *, cpu: bool) -> list[Step]:
    check = ["--cpu-check"] * cpu
    steps = [
        Step(
            "report",
            ["-m", "benchmarks.gpu_report", "--out", str(results / "report.json"), *check]
            + ["--limit", str(LIMITS_S["report"] - 30)],
            LIMITS_S["report"],
        ),
        Step("profile", ["-m", "benchmarks.offline.profile", *check], LIMITS_S["profile"]),
    ]
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if Path(sanitizer).exists():
        steps.append(
            Step(
                "sanitizer",
                ["-m", "benchmarks.offline.profile", "--once", *check],
                LIMITS_S["sanitizer"],
                (sanitizer, "--tool", "memcheck", "--error-exitcode", "1"),
            )
        )
    return steps


def test_steps(results: Path, source: Path, groups: int) -> list[Step]:
    """The tests that are marked `gpu`, wherever they are, and all of Triton's, which are held to
    float64 at odd sizes and run on a GPU where there is one; spread over groups of files."""
    marked = [f for f in source.glob("tests/**/test_*.py") if "gpu" in f.read_text("utf-8")]
    triton = list(source.glob("tests/kernels/**/test_triton*.py"))
    files = sorted({*marked, *triton})
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu or not slow"]
    return [
        Step(
            f"test-{i}",
            [*words, f"--junitxml={results / f'test-{i}.xml'}"]
            + [str(f.relative_to(source)) for f in files[i::groups]],
            LIMITS_S["test"],
        )
        for i in range(min(groups, len(files)))
    ]


def run(steps: list[Step], results: Path, at_once: int) -> dict[str, str]:
    """How each step ended, by name; each writes NAME.txt. `at_once` of them run side by side."""
    ended: dict[str, str] = {}
    running: dict[str, tuple[subprocess.Popen, float]] = {}
    waiting = list(steps)
    while waiting or running:
        while waiting and len(running) < at_once:
            step = waiting.pop(0)
            with (results / f"{step.name}.txt").open("w") as log:
                process = subprocess.Popen(
                    [*step.before, sys.executable, *step.words],
                    cwd=HERE / "source",
                    env=environment(),
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            running[step.name] = process, time.monotonic() + step.seconds
        for name, (process, until) in list(running.items()):
            if process.poll() is not None:
                ended[name] = "ok" if process.returncode == 0 else f"exit code {process.returncode}"
                del running[name]
            elif time.monotonic() > until:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                ended[name] = "out of time"
                del running[name]
        time.sleep(0.05)
    return ended


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", choices=("report", "test"))
    parser.add_argument("--dry-run", action="store_true", help="print the steps")
    parser.add_argument("--groups", type=int, default=GROUPS, help="of tests, side by side")
    parser.add_argument("--cpu-check", action="store_true", help="does it work? no figure counts")
    given = parser.parse_args(arguments)
    results = HERE / "results"
    if given.what == "report":
        steps, at_once = report_steps(results, cpu=given.cpu_check), 1
    else:
        steps, at_once = test_steps(results, HERE / "source", given.groups), given.groups
    if given.dry_run:
        for step in steps:
            print(f"{step.name} ({step.seconds} s):", *step.before, "python", *step.words)
        return 0
    results.mkdir(exist_ok=True)
    install()
    ended = run(steps, results, at_once)
    path = results / "summary.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(before | ended, indent=2) + "\n")
    for name, how in ended.items():
        print(f"{name}: {how} (results/{name}.txt)")
    return 0 if set(ended.values()) <= {"ok"} else 1


if __name__ == "__main__":
    sys.exit(main())
