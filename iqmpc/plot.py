"""Learning curves of runs: return against environment steps and minutes, as a figure and a CSV."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from iqmpc.checkpoint import load_config
from iqmpc.errors import CheckpointError, IqmpcError
from iqmpc.files import write_atomically
from iqmpc.runlog import read_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Point(NamedTuple):
    """One episode of training or one evaluation (the mean over its episodes)."""

    task: str
    seed: int
    env_steps: int
    minutes: float
    kind: str
    value: float


def read_curve(run: Path) -> tuple[list[Point], float | None]:
    """The points of a run and its demonstrator's return (None while the run has not ended)."""
    config = load_config(run)
    path = run / "metrics.csv"
    if not path.exists():
        raise CheckpointError(f"{run} has no metrics.csv")
    points = []
    rows, damaged = read_rows(path)
    if damaged:
        warnings.warn(f"{path}: {len(damaged)} damaged lines are left out", RuntimeWarning,
                      stacklevel=2)
    for row in rows:
        for kind, column in (("training", "return"), ("evaluation", "eval_return_mean")):
            if row[column]:
                points.append(Point(
                    config.task.name, config.seed, int(row["env_steps"]),
                    float(row["wall_s"]) / 60, kind, float(row[column])))
    summary = run / "summary.json"
    demonstrator = None
    if summary.exists():
        try:
            demonstrator = json.loads(summary.read_bytes())["demonstrator_return"]
        except (ValueError, TypeError, KeyError, RecursionError):
            warnings.warn(f"{summary} cannot be read: no demonstrator is drawn", RuntimeWarning,
                          stacklevel=2)
    return points, demonstrator


def new_figure(out: Path, **options: Any) -> Figure:
    """An empty figure for `out`; `IqmpcError` for another suffix and without matplotlib."""
    if out.suffix not in (".png", ".pdf", ".svg"):
        raise IqmpcError(f"the figure must be a .png, .pdf or .svg file, got {out}")
    if importlib.util.find_spec("matplotlib") is None:
        raise IqmpcError("plotting needs the extra 'plots': pip install 'iqmpc[plots]'")
    from matplotlib.figure import Figure

    return Figure(layout="constrained", **options)


def save_figure(figure: Figure, out: Path) -> None:
    """Write a figure whole or not at all, in the format that the suffix names."""
    image = io.BytesIO()
    figure.savefig(image, format=out.suffix[1:], dpi=120)
    write_atomically(out, image.getvalue())


def plot(runs: Sequence[Path], out: Path) -> None:
    """Draw the curves of `runs` into `out` (.png, .pdf or .svg) and write their points beside it.

    The CSV has the columns task, seed, env_steps, minutes, kind, return.
    """
    figure = new_figure(out, figsize=(10, 3.8))
    curves = [read_curve(run) for run in runs]
    axes = figure.subplots(1, 2, sharey=True)
    for index, (points, demonstrator) in enumerate(curves):
        colour = f"C{index}"
        label = f"{points[0].task}, seed {points[0].seed}" if points else runs[index].name
        for axis, x in zip(axes, ("env_steps", "minutes"), strict=True):
            for kind, style in (("training", dict(alpha=0.35, lw=1)),
                                ("evaluation", dict(marker="o", ms=4, label=label))):
                chosen = [p for p in points if p.kind == kind]
                axis.plot([getattr(p, x) for p in chosen], [p.value for p in chosen],
                          color=colour, **style)
            if demonstrator is not None:
                axis.axhline(demonstrator, color=colour, ls="--", lw=1)
    axes[0].set(xlabel="environment steps", ylabel="return")
    axes[1].set(xlabel="minutes")
    axes[0].legend(title="dots: evaluations; pale: training\ndashed: the demonstrator",
                   title_fontsize="small", fontsize="small")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["task", "seed", "env_steps", "minutes", "kind", "return"])
    for points, _ in curves:
        writer.writerows(
            p._replace(minutes=round(p.minutes, 2), value=round(p.value, 1)) for p in points)
    save_figure(figure, out)
    write_atomically(out.with_suffix(".csv"), text.getvalue().encode())
