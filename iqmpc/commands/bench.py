"""`iqmpc bench`: an agent in a control loop on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from iqmpc.commands.options import Agent
from iqmpc.console import console

if TYPE_CHECKING:
    from iqmpc.bench import Bench


def bench_agent(
    run: Agent,
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...", help="planner.budget_us=1500 planner.threads=2, device=cuda"
        ),
    ] = None,
    hz: Annotated[float, typer.Option(help="Control steps a second.")] = 500.0,
    seconds: Annotated[float, typer.Option(help="How long.")] = 60.0,
    table: Annotated[bool, typer.Option(help="Also which samples × iterations fit.")] = True,
    png: Annotated[Path | None, typer.Option(help="Write a histogram of plan times.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Drive an agent at a rate, in a real-time class where allowed, and say what plans took."""
    from iqmpc.bench import bench, draw
    from iqmpc.composition import parse
    from iqmpc.files import strict_json

    with console.status("loading") as status:
        found = bench(
            run,
            hz=hz,
            seconds=seconds,
            changes=parse(settings or []),
            table=table,
            progress=status.update,
        )
    if as_json:
        print(strict_json(found.summary()))
    else:
        _print(found)
    if png is not None:
        draw(found, png)
        console.print(f"wrote {png}")


def _print(found: Bench) -> None:
    for sentence in found.not_real_time:
        console.print(f"[yellow]{sentence}[/yellow]")
    s = found.summary()

    def times(name: str) -> str:
        shares = ("p50", "p99", "p99.9", "max")
        return ", ".join(f"{q} {s[f'{name}_{q}_us'] / 1e3:.3f} ms" for q in shares)

    plans = max(1, s["plans"])
    console.print(
        f"{s['plans']} plans at {found.hz:g} Hz, budget {found.budget_us / 1e3:.3f} ms, "
        f"{found.threads} thread(s): {s['samples_mean']:.0f} samples each on average"
    )
    console.print(f"plan  {times('plan')}")
    console.print(f"tick  {times('tick')} (from when it was due to its action)")
    console.print(
        f"late: {s['late_plans']} plans ({100 * s['late_plans'] / plans:.3f} %), "
        f"{s['late_ticks']} ticks; missed: {s['missed_plans']} plans "
        f"({100 * s['missed_plans'] / plans:.3f} %)"
    )
    if not found.fits:
        return
    console.print("\nsamples × iterations, median ms of a plan without a budget (* fits)")
    for row in found.fits:
        name = f"{row['samples']} × {row['iterations']}" if row["samples"] else "prior alone"
        star = "*" if row["max_ms"] <= found.budget_us / 1e3 else " "
        console.print(f"{star} {name:>12}  {row['median_ms']:.3f} (longest {row['max_ms']:.3f})")
