"""`iqmpc plot`: learning curves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from iqmpc.console import console


def plot(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run folders, or globs.")],
    out: Annotated[Path, typer.Option(help="The figure: .png, .pdf or .svg.")] = Path("curves.png"),
    group: Annotated[
        bool, typer.Option("--group", help="Seeds as their mean, with a 95 % bootstrap band.")
    ] = False,
    title: Annotated[str | None, typer.Option(help="What stands above the figure.")] = None,
) -> None:
    """Draw the learning curves of runs and write their points to a CSV beside the figure."""
    from iqmpc.plot import plot as draw
    from iqmpc.table import find_runs

    draw(find_runs(runs), out, group=group, title=title)
    console.print(f"wrote {out} and {out.with_suffix('.csv')}")
