"""Groups of variants that wait, and some that end their process: a report's processes find them."""

from __future__ import annotations

import os
import sys
import time
from types import SimpleNamespace

from benchmarks import gpu_report
from benchmarks.gpu_report import Goal, Group, Settings
from benchmarks.variants import Variant


def waits(ms: float):
    return lambda case: lambda: time.sleep(ms / 1000)


def aborts(case):
    def run():
        print("the last words", file=sys.stderr, flush=True)
        os.abort()

    return run


def loses(case):
    gpu_report.lost = sys.modules["__main__"].lost = lambda device: True
    raise RuntimeError("illegal memory access")


def groups(settings: Settings) -> list[Group]:
    builds = dict(slow=waits(8), quick=waits(1), aborts=aborts, loses=loses, after=waits(1))
    return [
        Group(
            SimpleNamespace(name="case"),
            {k: Variant(build, lambda case: 1000, "bfloat16") for k, build in builds.items()},
            operations=1000,
            bytes=100,
            dtype="bfloat16",
            baseline="slow",
            judged="quick",
            must=Goal(speedup=2),
            aim=Goal(ms=1e-6),
        )
    ]


def none(settings: Settings) -> list[Group]:
    return []
