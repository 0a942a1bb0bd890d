"""The command line: `iqmpc train`, `eval`, `export`, `demos`, … (`iqmpc --help`)."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Annotated

import typer

from iqmpc import __version__
from iqmpc.commands import (
    bench,
    config,
    doctor,
    evaluate,
    export,
    make,
    plot,
    record,
    reproduce,
    table,
    train,
)
from iqmpc.commands.demos import app as demos_app
from iqmpc.console import print_error, show_warning
from iqmpc.errors import IqmpcError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Learn from demonstrations without rewards, act by planning in a latent world model.",
)
app.command("train")(train.train)
app.command("config")(config.show_config)
app.command("eval")(evaluate.evaluate_run)
app.command("export")(export.export_agent)
app.command("bench")(bench.bench_agent)
app.command("table")(table.table_of_runs)
app.command("plot")(plot.plot)
app.command("reproduce")(reproduce.reproduce_experiment)
app.add_typer(demos_app, name="demos", help="Inspect, check, convert and make demonstrations.")
demos_app.command("record")(record.record)
demos_app.command("make")(make.make_demonstrations)
app.command("doctor")(doctor.doctor)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"iqmpc {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    """What is said before a command."""


def main() -> None:
    """Entry point: an error that is the input's fault is one message and exit code 2."""
    # torch's threads spin after each operation, by default for milliseconds: on a machine with as
    # many cores as threads, a plan after an update then finds no core for its own. So many spins,
    # some 0.2 ms, still bridge what lies between two operations. Read when torch is loaded.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    warnings.showwarning = show_warning
    try:
        app()
    except (IqmpcError, OSError) as error:
        print_error(error)
        sys.exit(2)


if __name__ == "__main__":
    main()
