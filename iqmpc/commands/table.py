"""`iqmpc table`: what runs reached."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from iqmpc.console import console, print_error
from iqmpc.errors import IqmpcError


def table_of_runs(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run folders, or globs.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Merge the records into this file.")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
    episodes: Annotated[
        int, typer.Option(min=1, help="Evaluate anew where summary.json has fewer.")
    ] = 20,
    planner: Annotated[bool, typer.Option(help="--no-planner acts with the policy prior.")] = True,
) -> None:
    """What runs reached at their last checkpoint: a table, and records in JSON.

    A run that cannot be read is named, and the exit code is then 2; the others are reported.
    """
    from iqmpc import table

    if out is not None:
        table.read_records(out)  # an error now, not after the evaluations
        if not out.resolve().parent.is_dir():
            raise IqmpcError(f"{out} is in no folder that exists")
    records: dict[Path, dict[str, Any]] = {}
    failed = False
    for run in table.find_runs(runs):
        try:
            with console.status(f"{run}: evaluating"):
                new = table.record(
                    run,
                    episodes=episodes,
                    planner=planner,
                    on_message=partial(console.print, markup=False),
                )
            same = [other for other, r in records.items() if table.key(r) == table.key(new)]
            if same:
                raise IqmpcError(
                    f"{run} is left out: {same[0]} has the same task, agent, seed and settings"
                )
            records[run] = new
        except (IqmpcError, OSError) as error:
            print_error(error if str(run) in str(error) else f"{run}: {error}")
            failed = True
    if records:
        found = list(records.values())
        if out is not None:
            table.merge_records(out, found)
        if markdown:
            print(table.to_markdown(found))
        else:
            Console(width=None if sys.stdout.isatty() else 160).print(table.to_rich(found))
        console.print(table.made_on(found), highlight=False, soft_wrap=True)
    if failed:
        raise typer.Exit(2)
