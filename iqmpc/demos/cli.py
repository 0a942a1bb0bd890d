"""`iqmpc demos`: look at demonstration files, check them, convert them.

Errors that are the input's fault are left to `iqmpc.cli.main`, which prints them.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from iqmpc.demos.checks import find_defects
from iqmpc.demos.demonstrations import Demonstrations, packaged_path, packaged_tasks, read
from iqmpc.demos.types import DemonstrationError, Draft

app = typer.Typer(no_args_is_help=True, help="Look at, check and convert demonstrations.")

Source = Annotated[str, typer.Argument(help="A .h5, .hdf5 or .npz file, or a packaged task.")]


def _locate(source: str) -> Path:
    """A packaged task's file or the path itself; ./NAME reaches a file named like a task."""
    if source in packaged_tasks():
        return packaged_path(source)
    path = Path(source)
    if not path.suffix and not path.exists():
        raise DemonstrationError(
            f"{source}: no such file, nor a packaged task ({', '.join(packaged_tasks())})"
        )
    return path


@app.command()
def info(
    path: Source,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
) -> None:
    """Show what a demonstration set holds."""
    demos = Demonstrations.load(_locate(path))
    returns = demos.returns()
    lengths = [len(episode.actions) for episode in demos.episodes]
    summary = {
        "task": demos.task,
        "episodes": len(demos),
        "transitions": demos.transitions,
        "length_min": min(lengths),
        "length_max": max(lengths),
        "obs_dim": demos.obs_dim,
        "action_dim": demos.action_dim,
        "return_mean": demos.return_mean,
        "return_sd": None if returns is None else float(np.std(returns)),
        "success_rate": demos.success_rate,
        "terminated": sum(episode.terminated for episode in demos.episodes),
        "provenance": demos.provenance,
    }
    if as_json:
        typer.echo(json.dumps(summary, indent=2))
    else:
        _print_table(summary)


def _print_table(summary: dict[str, Any]) -> None:
    shortest, longest = summary["length_min"], summary["length_max"]
    mean, success = summary["return_mean"], summary["success_rate"]
    rows = {
        "task": summary["task"],
        "episodes": summary["episodes"],
        "steps an episode": longest if shortest == longest else f"{shortest} to {longest}",
        "steps in all": summary["transitions"],
        "observation values": summary["obs_dim"],
        "action values": summary["action_dim"],
        "return": "not recorded" if mean is None else f"{mean:.1f} ± {summary['return_sd']:.1f}",
        "success": "not defined" if success is None else f"{success:.0%}",
        "terminated": f"{summary['terminated']} of {summary['episodes']}",
        **{f"provenance: {key}": text for key, text in summary["provenance"].items()},
    }
    table = Table(show_header=False)
    for name, value in rows.items():
        table.add_row(Text(name), Text(str(value)))
    Console().print(table)


@app.command()
def check(
    path: Source,
    task: Annotated[str | None, typer.Option(help="The task that it must be for.")] = None,
) -> None:
    """List every defect of a demonstration file; exit with 1 if it has any."""
    draft = read(_locate(path))
    defects = list(find_defects(draft, task=task))
    for defect in defects:
        typer.echo(str(defect))
    if defects:
        typer.echo(f"{path}: {len(defects)} defect(s)")
        raise typer.Exit(1)
    demos = Demonstrations.from_draft(draft)
    typer.echo(f"{path}: ok, {len(demos)} episodes, {demos.transitions} steps of {demos.task}")


@app.command()
def convert(
    source: Source,
    target: Annotated[Path, typer.Argument(help="The .h5 file to write.")],
    task: Annotated[str | None, typer.Option(help="Name the task so in the new file.")] = None,
    episodes: Annotated[int | None, typer.Option(help="Take only the first so many.")] = None,
    provenance: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Note how it was made; may be repeated."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Write any readable demonstration file as HDF5."""
    notes = [note.partition("=") for note in provenance or []]
    for key, equals, value in notes:
        if not (key and equals and value):
            raise DemonstrationError(f"--provenance {key}{equals}{value}: needs KEY=VALUE")
    if target.exists() and not force:
        raise DemonstrationError(f"{target}: exists; --force replaces it")
    draft = read(_locate(source))
    if task is not None and isinstance(draft, Draft):
        draft = replace(draft, task=task)
    demos = Demonstrations.from_draft(draft)
    added = {key: value for key, _, value in notes}
    demos = replace(demos, provenance={**demos.provenance, **added})
    if episodes is not None:
        demos = demos.select(episodes)
    demos.save(target)
    typer.echo(f"{target}: {len(demos)} episodes, {target.stat().st_size} bytes")
