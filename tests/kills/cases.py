"""Runs that are ended, what ends them, and what must hold afterwards."""

from __future__ import annotations

import csv
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no processes that survive a fork

import iqmpc
from iqmpc import checkpoint
from iqmpc.errors import Interrupted
from iqmpc.run_folder import RunFolder
from iqmpc.runlog import TIMING
from iqmpc.threads import set_threads
from tests.fuzz import samples

_EPISODE = 12
# A run must end within this many seconds, also where it is compiled and the machine is busy.
_LONGEST_S = 1800.0
_SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# What differs from one run to the next: time, and where it was made.
_OWN = ("wall_s", "commit", "machine", *TIMING)


@dataclass
class Case:
    """Settings of a run; once it has been made, how it ended and how long it took."""

    changes: dict[str, Any]
    weight: float = 1.0
    workers: bool = False
    folder: Path | None = None
    seconds: float = 0.0
    bytes: int = 0  # of its largest file
    digest: str = ""
    rows: list[dict[str, str]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)


def _case(weight: float = 1.0, workers: bool = False, **changes: Any) -> Case:
    return Case(
        {
            "train.steps": 240, "train.random_steps": 36, "train.initial_updates": 10,
            "train.eval_every": 48, "train.checkpoint_every": 60, "train.env_workers": workers,
            **{key.replace("__", "."): value for key, value in changes.items()},
        },
        weight,
        workers,
    )  # fmt: skip


CASES = {
    "fused": _case(3, learner__mode="fused"),
    "fused, sync": _case(1, learner__mode="fused", train__overlap="sync"),
    "fused, async": _case(3, learner__mode="fused", train__overlap="async"),
    "fused, average, penalty": _case(
        2,
        learner__mode="fused",
        agent__average="always",
        learner__gradient_penalty=True,
        model__termination=True,
    ),
    "fused, updates at ends": _case(1, learner__mode="fused", train__updates_at="episode_end"),
    "eager": _case(2, learner__mode="eager", train__overlap="off"),
    "eager, async": _case(2, learner__mode="eager", train__overlap="async"),
    "compile, async": _case(0.5, learner__mode="compile", train__overlap="async"),
    "three environments": _case(2, learner__mode="fused", train__num_envs=3),
    "three workers, async": _case(
        0.7, True, learner__mode="fused", train__num_envs=3, train__overlap="async"
    ),
    "replay that is full": _case(2, learner__mode="fused", train__capacity=60),
}


@dataclass(frozen=True)
class Ending:
    """`kind` at a share `at` of the run's time; of `disk`, no file may exceed `at` of the largest.

    `twice` follows a signal with the same one, so many seconds later.
    """

    kind: str
    at: float
    twice: float | None = None

    @classmethod
    def drawn(cls, rng: random.Random, case: Case) -> Ending:
        if rng.random() < 0.2:
            return cls("disk", rng.uniform(0.0, 1.3))
        number = rng.choice(_SIGNALS)
        twice = number != signal.SIGKILL and rng.random() < 0.2
        return cls(number.name, rng.uniform(0.0, 1.1), rng.uniform(0, 0.2) if twice else None)


def reference(name: str, folder: Path) -> Case:
    """A case with what it comes to when nothing ends it."""
    case = CASES[name]
    case.folder = folder
    for _ in range(2 if case.changes["learner.mode"] == "compile" else 1):  # then from a cache
        shutil.rmtree(folder, ignore_errors=True)
        started = time.monotonic()
        said = _waited(_started(case, folder, resume=False), _LONGEST_S)
        case.seconds = time.monotonic() - started
        if said != "ended well":
            raise RuntimeError(f"{name}: the run itself failed: {said}\n{_log(folder)}")
    case.bytes = max(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    case.digest, case.rows, case.summary = _result(folder)
    return case


def ended(case: Case, endings: list[Ending], run: Path) -> str:
    """Ends and continues a run; says what did not hold, nothing where all did."""
    try:
        for ending in endings:
            said = _end(case, ending, run)
            if said:
                return said
        if (run / "config.yaml").exists():
            how = _waited(_started(case, run, resume=True), _LONGEST_S)
        else:  # it was ended before there was a run
            how = _waited(_started(case, run, resume=False), _LONGEST_S)
        if how != "ended well":
            return f"the continuation {how}: {_log(run)}"
        return _compared(case, run)
    finally:
        shutil.rmtree(run, ignore_errors=True)
        _log_path(run).unlink(missing_ok=True)


def _end(case: Case, ending: Ending, run: Path) -> str:
    """Starts or continues the run and ends it; says what is wrong with what is left."""
    resume = (run / "config.yaml").exists()
    limit = int(ending.at * case.bytes) if ending.kind == "disk" else None
    child = _started(case, run, resume=resume, limit=limit)
    if ending.kind == "disk":
        how, log = _waited(child, _LONGEST_S), _log(run)
        full = "File too large" in log or "File size limit exceeded" in log  # a compiler's words
        if how != "ended well" and not ("failed" in how and full):
            return f"a full disk: {how}: {log}"
        return _left(case, run, saved=False)
    number = signal.Signals[ending.kind]
    time.sleep(ending.at * case.seconds)
    _send(child, number)
    if ending.twice is not None:
        time.sleep(ending.twice)
        _send(child, number)
    how = _waited(child, 300.0)
    expected = (
        "was ended by SIGKILL" if number == signal.SIGKILL else f"interrupted by {number.name}"
    )
    # Before the run listens, and with a second signal, Python's own ways are taken.
    own = (f"was ended by {number.name}", "interrupted by SIGINT")
    if how not in (expected, "ended well", *own):
        return f"{number.name}: {how}: {_log(run)}"
    saved = how == expected and number != signal.SIGKILL and ending.twice is None
    return _left(case, run, saved=saved)


def _send(child: int, number: signal.Signals) -> None:
    try:
        os.kill(child, number)
    except ProcessLookupError:
        pass


def _left(case: Case, run: Path, saved: bool) -> str:
    """What is wrong with a run folder.

    Of a run that was `saved` the last whole episode is there: one that has all of its updates, as
    in the run that nothing ended.
    """
    if not RunFolder(run).has_checkpoint:
        return ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        path, tensors, meta = RunFolder(run).newest()
    if caught:
        return f"a damaged checkpoint: {caught[0].message}"
    bad = [k for k, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()]
    if bad:
        return f"{path.name} is not finite: {bad[0]}"
    if saved:
        made = {(row["env_steps"], row["updates"]) for row in case.rows}
        ends = [(row["env_steps"], row["updates"]) for row in _rows(run) if row["return"]]
        whole = [int(end[0]) for end in ends if end in made]
        if whole and max(whole) > meta["env_steps"]:
            return f"saved as of step {meta['env_steps']}, an episode was whole at {max(whole)}"
    return ""


def _compared(case: Case, run: Path) -> str:
    digest, rows, summary = _result(run)
    if digest != case.digest:
        return "the last checkpoint is another"
    if rows != case.rows:
        return f"metrics.csv is another: {_difference(case.rows, rows)}"
    if summary != case.summary:
        return f"summary.json is another: {summary} for {case.summary}"
    stray = [p.name for p in run.rglob("*") if p.name.endswith((".tmp", ".damaged"))]
    kept = len(list((run / "checkpoints").glob("step_*")))
    if stray or kept > 2:
        return f"left over: {stray}, {kept} checkpoints"
    return ""


def _difference(expected: list[dict[str, str]], found: list[dict[str, str]]) -> str:
    for index, (one, other) in enumerate(zip(expected, found, strict=False)):
        if one != other:
            return f"row {index}: " + str(
                {k: (one[k], other[k]) for k in one if one[k] != other[k]}
            )
    return f"{len(found)} rows for {len(expected)}"


def _result(run: Path) -> tuple[str, list[dict[str, str]], dict[str, Any]]:
    """(digest of the last checkpoint, rows of metrics.csv, summary) but for what is a run's own."""
    _, tensors, _ = RunFolder(run).newest()
    summary = json.loads((run / "summary.json").read_text())
    return (
        checkpoint.digest(tensors),
        [{k: v for k, v in row.items() if k not in _OWN} for row in _rows(run)],
        {k: v for k, v in summary.items() if k not in _OWN},
    )


def _rows(run: Path) -> list[dict[str, str]]:
    if not (run / "metrics.csv").exists():
        return []
    text = (run / "metrics.csv").read_text()
    whole = text[: text.rfind("\n") + 1]
    return list(csv.DictReader(whole.splitlines()))


def _started(case: Case, run: Path, *, resume: bool, limit: int | None = None) -> int:
    """A process that trains, forked from this one, in which nothing has been computed."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        log = os.open(_log_path(run), os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = _train(case, run, resume, limit)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _train(case: Case, run: Path, resume: bool, limit: int | None) -> int:
    """0: to its end; 128 + n: a signal; 3: an error, which is printed."""
    if limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        set_threads(2, torch_idle=case.changes["learner.mode"] == "fused")
        config = samples.config(**case.changes)
        count = config.train.num_envs
        make = partial(samples.Point)
        env: Any = [make] * count if case.workers else [make() for _ in range(count)]
        trainer = iqmpc.Trainer(
            config,
            env,
            samples.demonstrations(),
            run=run,
            eval_env=make() if count > 1 else None,
            resume=resume,
            on_message=print,
        )
        trainer.train()
        return 0
    except Interrupted as interrupted:
        return 128 + interrupted.signal
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception as error:
        print(f"failed: {error}" if isinstance(error, OSError) else traceback.format_exc())
        return 3


def _waited(child: int, seconds: float) -> str:
    """How a process has ended; it is killed where it does not."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        time.sleep(0.01)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return f"did not end within {seconds:.0f} s"
    code = os.waitstatus_to_exitcode(status)
    if code == 0:
        return "ended well"
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    if code > 128:
        return f"interrupted by {signal.Signals(code - 128).name}"
    return f"failed with exit code {code}"


def _log_path(run: Path) -> Path:
    return run.with_name(run.name + ".log")


def _log(run: Path) -> str:
    path = _log_path(run)
    return path.read_text()[-1500:] if path.exists() else "(no log)"
