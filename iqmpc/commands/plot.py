"""`iqmpc plot`: learning curves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from iqmpc.console import console


def plot(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")],
    out: Annotated[Path, typer.Option(help="The figure: .png, .pdf or .svg.")] = Path("curves.png"),
) -> None:
    """Draw the learning curves of runs and write their points to a CSV beside the figure."""
    from iqmpc.plot import plot as draw

    draw(runs, out)
    console.print(f"wrote {out} and {out.with_suffix('.csv')}")
