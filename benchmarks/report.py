"""The report of a benchmark run: a JSON list with one record for each case and variant."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from iqmpc.provenance import processor


@dataclass(frozen=True)
class Measurement:
    """The rounds of one case and variant, in seconds, and the operations of each."""

    case: str
    variant: str
    dtype: str
    flops: int
    seconds: Sequence[float]

    @property
    def gflops(self) -> float | None:
        """The rate achieved in the median round, 1e9 operations a second; None without any."""
        return self.flops / statistics.median(self.seconds) / 1e9 if self.flops else None


def records(measurements: Sequence[Measurement]) -> list[dict[str, Any]]:
    """The report of one run; `docs/benchmarks.md` names the fields.

    `share_of_matmul` is None where the run has no matrix product of the same dtype, and so are it
    and `gflops` of what has no operations.
    """
    baseline = {m.dtype: m.gflops for m in measurements if m.case.startswith("matmul/")}
    common = {
        "threads": torch.get_num_threads(),
        "device": processor(),
        "torch": torch.__version__,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }
    return [
        {
            "case": m.case,
            "variant": m.variant,
            "dtype": m.dtype,
            "rounds": len(m.seconds),
            "median_ms": round(1e3 * statistics.median(m.seconds), 4),
            "p99_ms": round(1e3 * _percentile(m.seconds, 99), 4),
            "p99.9_ms": round(1e3 * _percentile(m.seconds, 99.9), 4),
            "max_ms": round(1e3 * max(m.seconds), 4),
            "gflops": None if m.gflops is None else round(m.gflops, 2),
            "share_of_matmul": None
            if m.gflops is None or m.dtype not in baseline
            else round(m.gflops / baseline[m.dtype], 4),
            **common,
        }
        for m in measurements
    ]


def write(path: Path, report: list[dict[str, Any]]) -> None:
    """Replace the report at `path` as a whole: a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    lines = ",\n".join(json.dumps(record) for record in report)
    partial.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    os.replace(partial, path)


def _percentile(seconds: Sequence[float], percent: float) -> float:
    """By nearest rank: p99 of fewer than 100 rounds is the slowest one."""
    return sorted(seconds)[math.ceil(round(percent / 100 * len(seconds), 6)) - 1]
