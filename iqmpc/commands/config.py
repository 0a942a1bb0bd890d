"""`iqmpc config`: the settings of a run, and what they mean."""

from __future__ import annotations

import json
import sys
from operator import attrgetter
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table


def show_config(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings as key=value, as of iqmpc train.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Every setting that `iqmpc train OVERRIDES` would take: key, value, meaning."""
    from iqmpc.composition import compose
    from iqmpc.config import meanings

    config = compose(overrides or [])
    rows = [(key, attrgetter(key)(config), meaning) for key, meaning in meanings().items()]
    if as_json:
        print(json.dumps({k: {"value": v, "meaning": m} for k, v, m in rows}, indent=2))
        return
    table = Table("key", "value", "meaning", box=None)
    for key, value, meaning in rows:
        text = value if isinstance(value, str) else json.dumps(value)
        table.add_row(*map(escape, (key, text, meaning)))
    Console(width=None if sys.stdout.isatty() else 160).print(table)
