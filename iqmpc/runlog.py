"""What a run writes about itself: metrics.csv, TensorBoard and summary.json."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from iqmpc.files import write_atomically

PROGRESS = ("env_steps", "updates", "episodes", "wall_s")
RESULTS = ("return", "eval_return_mean", "eval_return_std", "eval_success_rate",
           "nonfinite_plans")
LEARNING = (
    "consistency", "critic_loss", "q_expert", "q_behaviour", "q_difference", "reward_expert",
    "reward_behaviour", "target_value", "value_term", "gradient_penalty", "policy_loss",
    "q_policy", "entropy", "model_grad_norm", "policy_grad_norm", "skipped_updates",
    "termination_loss", "termination_recall", "termination_precision",
)
COLUMNS = PROGRESS + RESULTS + LEARNING
_LAST = 5


class RunLog:
    """One row per call: a line in metrics.csv (empty where absent) and TensorBoard scalars.

    A resumed run writes again what came after its checkpoint: `since` is the checkpoint's
    environment step and `evaluated` the step of the last evaluation before it; later rows are
    dropped, and so is a line that a crash left incomplete.
    """

    def __init__(self, run: Path, *, since: int | None = None, evaluated: int = 0):
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        path = run / "metrics.csv"
        rows = []
        if since is not None and path.exists():
            with open(path, newline="") as file:
                rows = [r for r in csv.DictReader(file) if _kept(r, since, evaluated)]
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(path, text.getvalue().encode())
        self._file = open(path, "a", newline="")
        self._csv = csv.DictWriter(self._file, COLUMNS)
        self._board = SummaryWriter(
            str(run / "tensorboard"), purge_step=None if since is None else since + 1)

    def write(self, values: Mapping[str, float | int | None]) -> None:
        """Append a row; `values` has `env_steps` and any other of COLUMNS."""
        self._csv.writerow({k: f"{v:.6g}" if isinstance(v, float) else v
                            for k, v in values.items() if v is not None})
        self._file.flush()
        for key, value in values.items():
            if key not in PROGRESS and value is not None and math.isfinite(value):
                section = "learning" if key in LEARNING else "results"
                self._board.add_scalar(f"{section}/{key}", value, values["env_steps"])

    def close(self) -> None:
        self._file.close()
        self._board.close()


def write_summary(run: Path, summary: Mapping[str, Any]) -> None:
    write_atomically(run / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())


def last_evaluations(run: Path, *, before: int) -> dict[str, float | None]:
    """Mean and minimum over the last five evaluations on the way, or all where there were fewer.

    They are those of metrics.csv before step `before`: the evaluation that ends a run is not among
    them, given the run's last step. Keys: last5_return_mean, last5_return_min, last5_success_mean
    and last5_success_min, the latter of success rates; None where there is no such figure, or one
    that is not finite.
    """
    rows = []
    if (run / "metrics.csv").exists():
        with open(run / "metrics.csv", newline="") as file:
            rows = [r for r in csv.DictReader(file)
                    if _kept(r, before - 1, before - 1) and r["eval_return_mean"]][-_LAST:]
    result: dict[str, float | None] = {}
    for name, column in (("return", "eval_return_mean"), ("success", "eval_success_rate")):
        values = [float(r[column]) for r in rows if r[column]]
        usable = bool(values) and all(map(math.isfinite, values))
        result[f"last{_LAST}_{name}_mean"] = sum(values) / len(values) if usable else None
        result[f"last{_LAST}_{name}_min"] = min(values) if usable else None
    return result


def _kept(row: Mapping[str, str | None], since: int, evaluated: int) -> bool:
    if None in row.values() or not str(row["env_steps"]).isdigit():
        return False
    return int(row["env_steps"]) <= (evaluated if row["eval_return_mean"] else since)
