"""Feeds damaged files to readers, in a process that may die of it, and judges what they do."""

from __future__ import annotations

import collections
import json
import multiprocessing
import os
import random
import shutil
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

# A reader may use so much memory, and CPU time, for a file of n bytes.
FREE_BYTES, TIMES_SIZE = 2**29, 400
FREE_S = 20.0
_PROCESS_BYTES = 2**32
_LONGEST_MESSAGE = 4000
# Of a process, after which it is ended: far more than its CPU seconds on a busy machine.
_SILENCE_S = 1800.0

GOOD = ("loaded", "refused", "contained")


class Job(NamedTuple):
    """Inputs of a reader that are still to be read."""

    parser: str
    first: int
    last: int


@dataclass
class Report:
    """What became of the inputs of one reader."""

    parser: str
    counts: collections.Counter = field(default_factory=collections.Counter)
    peak: int = 0  # the most bytes beyond those in use before
    ratio: float = 0.0  # the most of the allowance
    seconds: float = 0.0  # the most CPU seconds
    faults: list[dict[str, Any]] = field(default_factory=list)

    @property
    def inputs(self) -> int:
        return sum(self.counts.values())

    def as_dict(self) -> dict[str, Any]:
        return {
            "parser": self.parser,
            "inputs": self.inputs,
            **{key: self.counts[key] for key in GOOD},
            "faults": sum(n for key, n in self.counts.items() if key not in GOOD),
            "kinds": dict(self.counts),
            "peak_mib": round(self.peak / 2**20, 1),
            "of_allowance": round(self.ratio, 3),
            "cpu_s": round(self.seconds, 2),
            "examples": self.faults,
        }


def fuzz(
    names: Sequence[str],
    inputs: int,
    *,
    seed: int = 0,
    first: int = 0,
    until: float | None = None,
) -> list[Report]:
    """Feed `inputs` damaged files to each reader, from number `first`; stop at the monotonic time.

    Input i of a seed is always the same file. One process reads for all, and is replaced where it
    dies.
    """
    reports = {name: Report(name) for name in names}
    jobs = [Job(name, first, first + inputs) for name in names]
    with tempfile.TemporaryDirectory(prefix="iqmpc-fuzz-", dir=_fast_folder()) as folder:
        for outcome in _outcomes(jobs, seed, Path(folder), until):
            _count(reports[outcome["parser"]], outcome, seed)
    return list(reports.values())


def _fast_folder() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _count(report: Report, outcome: dict[str, Any], seed: int) -> None:
    kind = outcome["kind"]
    report.counts[kind] += 1
    report.peak = max(report.peak, outcome["peak"])
    report.ratio = max(report.ratio, outcome["peak"] / allowance(outcome["size"]))
    report.seconds = max(report.seconds, outcome["seconds"])
    if kind not in GOOD and len(report.faults) < 200:
        report.faults.append({**outcome, "seed": seed})


def allowance(size: int) -> int:
    """Bytes of memory that reading a file of `size` bytes may take at its peak."""
    return FREE_BYTES + TIMES_SIZE * size


def _outcomes(
    jobs: list[Job], seed: int, folder: Path, until: float | None
) -> Iterator[dict[str, Any]]:
    """One for every input; a process that dies is replaced by one that goes on behind it."""
    context = multiprocessing.get_context("spawn")
    while jobs and not _over(until):
        ours, theirs = context.Pipe()
        worker = context.Process(target=_work, args=(theirs, jobs, seed, folder), daemon=True)
        worker.start()
        theirs.close()
        ready, how = False, ""
        try:
            while jobs and not _over(until):
                if not ours.poll(_SILENCE_S):
                    how = "hang: no sign of life"
                    break
                outcome = ours.recv()
                ready = True
                if outcome is not None:
                    yield outcome
                    jobs = _after(jobs)
        except EOFError:
            worker.join(10)
            how = f"crash: exit code {worker.exitcode}"
        finally:
            worker.kill()
            worker.join()
            ours.close()
        if how:
            if not ready:
                raise RuntimeError(f"the fuzzing process for {jobs[0].parser} could not start")
            yield _died(jobs[0], seed, folder, how)
            jobs = _after(jobs)


def _after(jobs: list[Job]) -> list[Job]:
    """What is left to do after the first input."""
    job = jobs[0]._replace(first=jobs[0].first + 1)
    return [job, *jobs[1:]] if job.first < job.last else jobs[1:]


def _over(until: float | None) -> bool:
    return until is not None and time.monotonic() > until


def _died(job: Job, seed: int, folder: Path, how: str) -> dict[str, Any]:
    """A reader that dies in our process is sound where users reach it only in one of its own."""
    from tests.fuzz.parsers import PARSERS

    parser, kind, message = PARSERS[job.parser], how.partition(":")[0], how
    if parser.isolated is not None:
        place = _own(folder)
        files = damaged(parser, seed, job.first, parser.samples(_own(folder)))
        kind, message = _contained(parser, write(parser, files, place), how)
    return {"parser": job.parser, "input": job.first, "kind": kind, "message": message, "peak": 0,
            "size": 0, "seconds": 0.0}  # fmt: skip


def _contained(parser: Any, path: Path, how: str) -> tuple[str, str]:
    """What users see of a file that took more than its share, in a process with limits."""
    try:
        parser.isolated(path)
    except parser.errors as error:
        return "contained", f"{how}; {error}"[:300]
    return how.partition(":")[0], f"{how}; read all the same in a process of its own"


def _own(folder: Path) -> Path:
    return Path(tempfile.mkdtemp(dir=folder))


def damaged(parser: Any, seed: int, index: int, found: list[Any]) -> Any:
    """The files of an input."""
    return parser.damage(found, random.Random(f"{parser.name} {seed} {index}"))


def write(parser: Any, files: Any, folder: Path) -> Path:
    """Put files into an emptied folder; returns what the reader is given."""
    shutil.rmtree(folder)
    folder.mkdir()
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    path = folder / (parser.entry or next(iter(files), "nothing"))
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _work(pipe: Connection, jobs: list[Job], seed: int, folder: Path) -> None:
    """The process that reads: None when a reader is ready, then one outcome after the other."""
    import h5py
    import numpy as np
    import torch

    from tests.fuzz import guard
    from tests.fuzz.parsers import PARSERS

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    own = _own(folder)
    (own / "outside").mkdir()
    with h5py.File(own / "outside/canary.h5", "w") as file:
        file["data"] = np.full(4, 0.123456, np.float32)
    place = own / "input"
    place.mkdir()
    os.chdir(own)
    watch = guard.Guard(own)
    guard.limit_process(_PROCESS_BYTES, int(FREE_S) + 10)
    for job in jobs:
        parser = PARSERS[job.parser]
        guard.extend_time(600)
        found = parser.samples(_own(own))
        # Sound ones load (or an option that they do not fit is refused), and what is imported on
        # the way is there by now.
        sound = [_judged(parser, write(parser, files, place)) for files in found]
        if not any(kind == "loaded" for kind, _ in sound):
            raise RuntimeError(f"{parser.name}: no sample loads: {sound}")
        pipe.send(None)
        for index in range(job.first, job.last):
            files = damaged(parser, seed, index, found)
            pipe.send(_fed(parser, write(parser, files, place), index, files, watch))


def _fed(parser: Any, path: Path, index: int, files: Any, watch: Any) -> dict[str, Any]:
    """What becomes of one input."""
    from tests.fuzz import guard

    size = sum(map(len, files.values()))
    guard.extend_time(int(FREE_S) + 10)
    watch.start()
    kind, message = _judged(parser, path)
    seen, peak, seconds = watch.stop()
    if seen:
        kind, message = "opened or ran", "; ".join(seen[:3])
    elif kind in GOOD and peak > allowance(size):
        kind, message = "memory", f"{peak} bytes for a file of {size}"
    elif kind in GOOD and seconds > FREE_S:
        kind, message = "slow", f"{seconds:.1f} CPU seconds for a file of {size}"
    if kind in ("memory", "slow") and parser.isolated is not None:
        kind, message = _contained(parser, path, message)
    return {"parser": parser.name, "input": index, "kind": kind, "message": message, "peak": peak,
            "size": size, "seconds": seconds}  # fmt: skip


def _judged(parser: Any, path: Path) -> tuple[str, str]:
    try:
        parser.load(path)
        return "loaded", ""
    except parser.errors as error:
        text = str(error)
        if len(text.split()) < 3:
            return "says nothing", repr(text)
        if len(text) > _LONGEST_MESSAGE:
            return "says too much", f"{len(text)} characters: {text[:200]}"
        return "refused", text[:200]
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        ours = [f for f in traceback.extract_tb(error.__traceback__) if "iqmpc" in f.filename]
        near = ours[-1] if ours else where
        return (
            f"raises {type(error).__name__}",
            f"{Path(near.filename).name}:{near.lineno} {near.line!r:.80}: {error!s:.200}",
        )


def keep(parser_name: str, seed: int, index: int, to: Path) -> Path:
    """Write an input again, to look at it; returns what the reader is given."""
    from tests.fuzz.parsers import PARSERS

    parser = PARSERS[parser_name]
    with tempfile.TemporaryDirectory() as folder:
        files = damaged(parser, seed, index, parser.samples(Path(folder)))
    to.mkdir(parents=True, exist_ok=True)
    return write(parser, files, to)


def line(report: Report) -> str:
    r = report.as_dict()
    return (
        f"{r['parser']:10}  {r['inputs']:8,} inputs: {r['loaded']:,} loaded, "
        f"{r['refused']:,} refused, "
        f"{r['contained']:,} contained, {r['faults']:,} faults; peak {r['peak_mib']:.0f} MiB "
        f"({100 * r['of_allowance']:.0f} % of the allowance), {r['cpu_s']:.1f} s at most"
    )


def as_json(reports: list[Report]) -> str:
    return json.dumps([r.as_dict() for r in reports], indent=1)
