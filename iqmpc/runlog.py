"""What a run writes about its progress: the rows of metrics.csv."""

from __future__ import annotations

import csv
import io
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from iqmpc.files import naming, write_atomically
from iqmpc.run_folder import RunFolder

PROGRESS = ("env_steps", "updates", "episodes", "wall_s")
RESULTS = ("return", "eval_return_mean", "eval_return_std", "eval_success_rate", "nonfinite_plans")
LEARNING = (
    "consistency",
    "critic_loss",
    "q_expert",
    "q_behaviour",
    "q_difference",
    "reward_expert",
    "reward_behaviour",
    "target_value",
    "value_term",
    "gradient_penalty",
    "policy_loss",
    "q_policy",
    "entropy",
    "temperature",
    "reward_loss",
    "dynamics_loss",
    "model_grad_norm",
    "policy_grad_norm",
    "skipped_updates",
    "termination_loss",
    "termination_recall",
    "termination_precision",
    "cloning_error",
)
TIMING = ("plan_ms", "env_ms", "update_ms", "steps_per_s")
COLUMNS: tuple[str, ...] = PROGRESS + RESULTS + LEARNING + TIMING
_LAST = 5


class RunLog:
    """One row per call: a line in metrics.csv, a field empty where it is absent.

    A resumed run writes again what came after its checkpoint: `since` is the checkpoint's
    environment step and `evaluated` the step of the last evaluation before it; later rows are
    dropped, and so is a line that a crash left incomplete. Damaged lines are moved to
    metrics.csv.damaged, with a warning.
    """

    def __init__(self, run: RunFolder, *, since: int | None = None, evaluated: int = 0):
        self._path = path = run.metrics
        rows: list[dict[str, str]] = []
        if since is not None and path.exists():
            rows, damaged = read_rows(path)
            rows = [r for r in rows if _kept(r, since, evaluated)]
            if damaged:
                aside = path.with_name(path.name + ".damaged")
                with open(aside, "ab") as file:
                    file.writelines(line + b"\n" for line in damaged)
                warnings.warn(
                    f"{path}: {len(damaged)} damaged lines, now in {aside.name}",
                    RuntimeWarning,
                    stacklevel=2,
                )
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(path, text.getvalue().encode())
        self._file = open(path, "a", newline="")
        self._csv = csv.DictWriter(self._file, COLUMNS)

    def write(self, values: Mapping[str, float | int | None]) -> None:
        """Append a row; `values` has all of PROGRESS and any other of COLUMNS."""
        with naming(self._path):
            self._csv.writerow(
                {
                    k: f"{v:.6g}" if isinstance(v, float) else v
                    for k, v in values.items()
                    if v is not None
                }
            )
            self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_rows(path: Path) -> tuple[list[dict[str, str]], list[bytes]]:
    """The rows of a metrics.csv, every column of COLUMNS in each, and the lines that are none.

    A last line without its end is neither: a crash leaves one.
    """
    lines = path.read_bytes().split(b"\n")[:-1]
    header: Sequence[str] = COLUMNS
    rows, damaged = [], []
    for index, line in enumerate(line.removesuffix(b"\r") for line in lines):
        try:
            (fields,) = csv.reader([line.decode()], strict=True)
        except (UnicodeDecodeError, csv.Error, ValueError):
            fields = []
        if index == 0 and set(PROGRESS) <= set(fields) <= set(COLUMNS):
            header = fields
            continue
        names = header if len(fields) == len(header) else COLUMNS
        row = dict(zip(names, fields, strict=False)) if len(fields) == len(names) else {}
        if row and _is_row(row):
            rows.append({**dict.fromkeys(COLUMNS, ""), **row})
        else:
            damaged.append(line)
    return rows, damaged


def _is_row(row: Mapping[str, str]) -> bool:
    """Whether everything is a number or absent, and progress is there."""
    try:
        steps = [float(text) for text in row.values() if text]
    except ValueError:
        return False
    whole = all(row[key].isascii() and row[key].isdigit() for key in PROGRESS[:3])
    return bool(steps) and whole and bool(row["wall_s"])


def last_evaluations(run: RunFolder, *, before: int) -> dict[str, float | None]:
    """Mean and minimum over the last five evaluations on the way, or all where there were fewer.

    They are those of metrics.csv before step `before`: the evaluation that ends a run is not among
    them, given the run's last step. Keys: last5_return_mean, last5_return_min, last5_success_mean
    and last5_success_min, the latter of success rates; None where there is no such figure, or one
    that is not finite.
    """
    rows = []
    if run.metrics.exists():
        rows = [
            r
            for r in read_rows(run.metrics)[0]
            if _kept(r, before - 1, before - 1) and r["eval_return_mean"]
        ][-_LAST:]
    result: dict[str, float | None] = {}
    for name, column in (("return", "eval_return_mean"), ("success", "eval_success_rate")):
        values = [float(r[column]) for r in rows if r[column]]
        usable = bool(values) and all(map(math.isfinite, values))
        result[f"last{_LAST}_{name}_mean"] = sum(values) / len(values) if usable else None
        result[f"last{_LAST}_{name}_min"] = min(values) if usable else None
    return result


def _kept(row: Mapping[str, str], since: int, evaluated: int) -> bool:
    return int(row["env_steps"]) <= (evaluated if row["eval_return_mean"] else since)
