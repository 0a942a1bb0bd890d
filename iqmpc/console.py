"""How the command line speaks: figures for programs on stdout, everything for people on stderr."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from iqmpc.errors import printable

console = Console(stderr=True)


def print_summary(summary: dict[str, Any], run: Path) -> None:
    table = Table(title=f"{summary['task']}  ({run})", show_header=False)
    for key, value in summary.items():
        if value is not None and key != "task":
            text = (
                f"{value:.3g}"
                if key.endswith(("ratio", "_rate", "_correlation"))
                else f"{value:.1f}"
                if isinstance(value, float)
                else str(value)
            )
            table.add_row(key, text)
    console.print(table)
    demonstrator = summary.get("demonstrator_return")
    if demonstrator is not None:
        share = "" if summary["ratio"] is None else f" ({100 * summary['ratio']:.0f} %)"
        console.print(
            f"return {summary['return_mean']:.1f} beside the demonstrator's "
            f"{demonstrator:.1f}{share}",
            style="bold",
            highlight=False,
        )


def print_error(error: Exception | str) -> None:
    console.print(
        printable(f"iqmpc: {error}"),
        style="bold red",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def show_warning(message: Any, category: Any, *_: Any, **__: Any) -> None:
    if issubclass(category, (DeprecationWarning, FutureWarning)):
        return
    console.print(
        printable(f"warning: {message}"),
        style="yellow",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
