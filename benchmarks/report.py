"""The report of a benchmark run: a JSON list with one record for each case and variant.

One format for a CPU's run (`pytest --benchmark`) and a GPU's (`benchmarks.gpu_report`), whose
records say more: `docs/benchmarks.md` names the fields.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from iqmpc.provenance import processor


@dataclass(frozen=True)
class Measurement:
    """The rounds of one case and variant, in seconds, and the operations of each.

    No rounds: it was not measured.
    """

    case: str
    variant: str
    dtype: str
    flops: int
    seconds: Sequence[float]

    @property
    def gflops(self) -> float | None:
        """The rate achieved in the median round, 1e9 operations a second; None without any."""
        if not self.flops or not self.seconds:
            return None
        return self.flops / statistics.median(self.seconds) / 1e9


def records(
    measurements: Sequence[Measurement], conditions: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """The report of one run; `docs/benchmarks.md` names the fields.

    `conditions` are of the run, and stand in every record; by default those of a CPU.
    `share_of_matmul` is None where the run has no matrix product of the same dtype, and so are it
    and `gflops` of what has no operations.
    """
    baseline = {m.dtype: m.gflops for m in measurements if m.case.startswith("matmul/")}
    common = {"device": processor(), **now(), **(conditions or {})}
    return [
        {
            "case": m.case,
            "variant": m.variant,
            "dtype": m.dtype,
            "rounds": len(m.seconds),
            "median_ms": percentile_ms(m.seconds, 50),
            "p99_ms": percentile_ms(m.seconds, 99),
            "p99.9_ms": percentile_ms(m.seconds, 99.9),
            "max_ms": percentile_ms(m.seconds, 100),
            "gflops": None if m.gflops is None else round(m.gflops, 2),
            "share_of_matmul": None
            if m.gflops is None or baseline.get(m.dtype) is None
            else round(m.gflops / baseline[m.dtype], 4),
            **common,
        }
        for m in measurements
    ]


def now() -> dict[str, Any]:
    """torch's threads and version, and the day (UTC)."""
    return {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def percentile_ms(seconds: Sequence[float], percent: float) -> float | None:
    """Milliseconds, None of no rounds; the median as such, others by nearest rank.

    So p99 of fewer than 100 rounds is the slowest one.
    """
    if not seconds:
        return None
    if percent == 50:
        return round(1e3 * statistics.median(seconds), 4)
    rank = math.ceil(round(percent / 100 * len(seconds), 6)) - 1
    return round(1e3 * sorted(seconds)[rank], 4)


def write(path: Path, report: list[dict[str, Any]]) -> None:
    """Replace the report at `path` as a whole: a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    lines = ",\n".join(json.dumps(record) for record in report)
    partial.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    os.replace(partial, path)
