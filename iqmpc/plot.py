"""Learning curves of runs: return against environment steps and minutes, as a figure and a CSV."""

from __future__ import annotations

import csv
import importlib.util
import io
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from iqmpc.composition import ablation
from iqmpc.errors import CheckpointError, IqmpcError
from iqmpc.files import write_atomically
from iqmpc.run_folder import RunFolder
from iqmpc.runlog import read_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Point(NamedTuple):
    """One episode of training or one evaluation (the mean over its episodes)."""

    task: str
    seed: int
    env_steps: int
    minutes: float
    kind: str
    value: float


class Curve(NamedTuple):
    """The points of a run, what it departs from its preset in, and its demonstrator's return.

    `agent` is its method's name, `demonstrator` None where there is none or the run has not ended.
    """

    points: list[Point]
    task: str
    agent: str
    seed: int
    ablation: str
    demonstrator: float | None

    def along(self, x: str, kind: str) -> tuple[np.ndarray, np.ndarray]:
        """(x, value), each [N], of the points of a kind; `x` is env_steps or minutes."""
        chosen = [p for p in self.points if p.kind == kind]
        return (
            np.array([getattr(p, x) for p in chosen], np.float64),
            np.array([p.value for p in chosen], np.float64),
        )


def read_curve(run: Path) -> Curve:
    """The curve of a run; `CheckpointError` for what is no run folder or has no metrics.csv."""
    folder = RunFolder(run)
    config, path = folder.load_config(), folder.metrics
    if not path.exists():
        raise CheckpointError(f"{run} has no metrics.csv")
    points = []
    rows, damaged = read_rows(path)
    if damaged:
        warnings.warn(
            f"{path}: {len(damaged)} damaged lines are left out", RuntimeWarning, stacklevel=2
        )
    for row in rows:
        for kind, column in (("training", "return"), ("evaluation", "eval_return_mean")):
            if row[column]:
                points.append(
                    Point(
                        config.task.name,
                        config.seed,
                        int(row["env_steps"]),
                        float(row["wall_s"]) / 60,
                        kind,
                        float(row[column]),
                    )
                )
    demonstrator = None
    try:
        demonstrator = folder.load_figures(folder.summary, {"demonstrator_return"}).get(
            "demonstrator_return"
        )
    except CheckpointError as error:
        warnings.warn(f"{error}: no demonstrator is drawn", RuntimeWarning, stacklevel=2)
    task, agent = config.task.name, config.agent.name
    return Curve(points, task, agent, config.seed, ablation(config), demonstrator)


def over_seeds(curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, ...]:
    """Curves (x [N], y [N]) of several seeds -> x, mean, least and greatest y, each [M].

    M counts the different x that lie within all curves; between its points a curve is a straight
    line. Empty where the curves have no x in common.
    """
    low, high = max(x.min() for x, _ in curves), min(x.max() for x, _ in curves)
    grid = np.unique(np.concatenate([x for x, _ in curves]))
    grid = grid[(low <= grid) & (grid <= high)]
    values = np.stack([np.interp(grid, x, y) for x, y in curves])
    return grid, values.mean(0), values.min(0), values.max(0)


def bootstrap_band(
    curves: Sequence[tuple[np.ndarray, np.ndarray]], draws: int = 2000
) -> tuple[np.ndarray, ...]:
    """Curves of several seeds -> x, mean, and the mean's 95 % bootstrap interval, each [M].

    x as in `over_seeds`. The interval is of percentiles over `draws` samples of whole curves, with
    replacement; the same curves give the same one.
    """
    grid, *_ = over_seeds(curves)
    values = np.stack([np.interp(grid, x, y) for x, y in curves])  # [seeds, M]
    chosen = np.random.default_rng(0).integers(len(values), size=(draws, len(values)))
    counts = np.stack([np.bincount(c, minlength=len(values)) for c in chosen])
    low, high = np.percentile(counts @ values / len(values), [2.5, 97.5], axis=0)
    return grid, values.mean(0), low, high


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


def plot(runs: Sequence[Path], out: Path, *, group: bool = False, title: str | None = None) -> None:
    """Draw the curves of `runs` into `out` (.png, .pdf or .svg) and write their points beside it.

    Runs of a task and agent that differ only in their seed are drawn as one: the mean of their
    evaluations, its range over seeds as a band, every evaluation as a dot. With `group` the band is
    the mean's 95 % bootstrap interval, and there are no dots. A run without others of its kind
    shows its training episodes too. The CSV has the columns task, seed, env_steps, minutes, kind,
    return.
    """
    figure = new_figure(out, figsize=(10, 3.8))
    curves = [read_curve(run) for run in runs]
    groups: dict[tuple[str, ...], list[Curve]] = {}
    for curve in curves:
        agent = "" if curve.agent == "iq_mpc" else f"agent={curve.agent}"
        groups.setdefault((curve.task, agent, curve.ablation), []).append(curve)
    if title is not None:
        figure.suptitle(title)
    axes = figure.subplots(1, 2, sharey=True)
    for index, (settings, alike) in enumerate(groups.items()):
        colour = f"C{index}"
        seeds = f"{len(alike)} seeds" if len(alike) > 1 else f"seed {alike[0].seed}"
        label = textwrap.fill(", ".join(filter(None, [*settings, seeds])), 50)
        demonstrators = {c.demonstrator for c in alike} - {None}
        for axis, x in zip(axes, ("env_steps", "minutes"), strict=True):
            _draw(axis, alike, x, colour, label, bootstrap=group)
            for demonstrator in demonstrators:
                axis.axhline(demonstrator, color=colour, ls="--", lw=1)
    axes[0].set(xlabel="environment steps", ylabel="return")
    axes[1].set(xlabel="minutes")
    pale = "95 % of bootstrapped means over seeds" if group else "range over seeds"
    axes[0].legend(
        title=f"dots: evaluations; pale: training, or {pale}\ndashed: the demonstrator",
        title_fontsize="small",
        fontsize="small",
    )
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["task", "seed", "env_steps", "minutes", "kind", "return"])
    for curve in curves:
        writer.writerows(
            p._replace(minutes=round(p.minutes, 2), value=round(p.value, 1)) for p in curve.points
        )
    save_figure(figure, out)
    write_atomically(out.with_suffix(".csv"), text.getvalue().encode())


def scatter_rewards(
    true: np.ndarray, decoded: np.ndarray, out: Path, *, title: str | None = None
) -> None:
    """Draw decoded rewards [N] against the true ones into `out`, and write both beside it.

    The CSV has the columns true, decoded. Raises as `new_figure`.
    """
    figure = new_figure(out, figsize=(5, 4))
    axis = figure.subplots()
    axis.scatter(true, decoded, s=4, alpha=0.25, lw=0)
    axis.set(xlabel="true reward", ylabel="decoded reward", title=title)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["true", "decoded"])
    writer.writerows((f"{t:.6g}", f"{d:.6g}") for t, d in zip(true, decoded, strict=True))
    save_figure(figure, out)
    write_atomically(out.with_suffix(".csv"), text.getvalue().encode())


def _draw(
    axis: Axes, group: Sequence[Curve], x: str, colour: str, label: str, *, bootstrap: bool
) -> None:
    """Runs that differ in their seed alone, along `x`."""
    evaluations = [c.along(x, "evaluation") for c in group]
    if len(group) == 1:
        axis.plot(*group[0].along(x, "training"), color=colour, alpha=0.35, lw=1)
        axis.plot(*evaluations[0], color=colour, marker="o", ms=4, label=label)
        return
    for steps, values in [] if bootstrap else evaluations:
        axis.plot(steps, values, color=colour, ls="", marker="o", ms=3, alpha=0.6)
    started = [e for e in evaluations if len(e[0])]
    band = bootstrap_band if bootstrap else over_seeds
    grid, mean, low, high = band(started) if started else np.empty((4, 0))
    axis.plot(grid, mean, color=colour, label=label)
    axis.fill_between(grid, low, high, color=colour, alpha=0.2, lw=0)
