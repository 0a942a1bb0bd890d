"""Options that several commands share, and what they do to a run's settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

Agent = Annotated[
    Path,
    typer.Argument(
        metavar="RUN", help="A run folder, a file of iqmpc export, or packaged:TASK, which ships."
    ),
]
MinReturn = Annotated[
    float | None, typer.Option(help="Keep only episodes with at least this return.")
]
Device = Annotated[str | None, typer.Option(help="auto, cpu or cuda; the run's own by default.")]
Checkpoint = Annotated[
    str,
    typer.Option(
        metavar="newest|best|STEP",
        help="Which of the run's: best is of the best evaluation on the way.",
    ),
]
Backend = Annotated[str | None, typer.Option(help="The planner's kernel backend.")]


def acting(planner: bool, device: str | None, backend: str | None) -> dict[str, Any]:
    """What the options change in the settings of a run that acts."""
    changes = {
        "planner.enabled": None if planner else False,
        "device": device,
        "planner.backend": backend,
    }
    return {key: value for key, value in changes.items() if value is not None}


def check_target(out: Path, force: bool) -> None:
    """`DemonstrationError`, before anything is run, where `out` could not be saved."""
    from iqmpc.demos import DemonstrationError

    if out.exists() and not force:
        raise DemonstrationError(f"{out} exists; --force overwrites it")
    if out.suffix not in (".h5", ".hdf5") or not out.resolve().parent.is_dir():
        raise DemonstrationError(f"{out} must be an .h5 file in a folder that exists")
