"""`iqmpc export`: a run's agent as one file, for robots."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from iqmpc.commands.options import Checkpoint
from iqmpc.console import console


def export_agent(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write, agent.iqmpc.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="What to change: planner.budget_us=2000 planner.threads=1",
        ),
    ] = None,
    checkpoint: Checkpoint = "newest",
    onnx: Annotated[
        bool,
        typer.Option("--onnx", help="Write encoder and policy prior alone, as an ONNX model."),
    ] = False,
    force: Annotated[bool, typer.Option(help="Overwrite OUT.")] = False,
) -> None:
    """Write a run's agent as one file, which C++, C and `iqmpc eval` take."""
    from iqmpc.composition import parse
    from iqmpc.errors import ConfigError
    from iqmpc.export import export, export_onnx

    if out.exists() and not force:
        raise ConfigError(f"{out} exists; --force overwrites it")
    changes = parse(settings or [])
    if onnx:
        export_onnx(run, out, checkpoint=checkpoint, changes=changes)
        console.print(f"wrote {out}")
        return
    found = export(run, out, checkpoint=checkpoint, changes=changes)
    about, plan = found.about, found.about["planner"]
    sizes = f"{len(about['observation']['names'])} numbers in, {len(about['action']['names'])} out"
    budget = plan["budget_us"]
    console.print(
        f"wrote {out}: {about['task']}, {sizes}, {plan['samples']} samples × {plan['iterations']}"
        + ("" if budget is None else f" in {budget:g} µs")
    )
