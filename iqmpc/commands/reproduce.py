"""`iqmpc reproduce`: a table or figure of the paper."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from iqmpc.console import console
from iqmpc.errors import IqmpcError
from iqmpc.files import write_atomically

if TYPE_CHECKING:
    from iqmpc.reproduce import Experiment, PlannedRun


def reproduce_experiment(
    name: Annotated[str, typer.Argument(help="table1, figure2, …; list shows all.")],
    scale: Annotated[str, typer.Option(help="cpu (hours a run at most) or paper.")] = "cpu",
    seeds: Annotated[int, typer.Option(min=1, help="Of each run: 0 to SEEDS - 1.")] = 2,
    task: Annotated[list[str] | None, typer.Option(help="These tasks alone.")] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="These variants alone, such as iq_mpc.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the runs, and what they cost on this machine.")
    ] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 1,
    into: Annotated[
        Path | None, typer.Option(help="Where runs are made: runs/reproduce/SCALE.")
    ] = None,
    runs: Annotated[
        list[str] | None,
        typer.Option(help="Folders, or globs, of other runs: equal ones are not made again."),
    ] = None,
    demos: Annotated[Path, typer.Option(help="Where TASK.h5 or TASK.npz are looked for.")] = Path(
        "runs/demos"
    ),
    ours: Annotated[
        list[str] | None,
        typer.Option(help="A further setting of IQ-MPC's runs, such as learner.precision=bf16."),
    ] = None,
    episodes: Annotated[int, typer.Option(min=1, help="Of the evaluation of a run.")] = 20,
    out: Annotated[
        Path | None, typer.Option(help="Folder of NAME.md, NAME.csv and figures: that of the runs.")
    ] = None,
) -> None:
    """Make the runs of a table or figure that are not there, and show it beside the paper's.

    Stopped and started again, it goes on. What only a figure of the paper shows, and not its text,
    is not beside it.
    """
    from iqmpc import reproduce, run_list

    if name == "list":
        for known in reproduce.names():
            console.print(f"{known:10} {reproduce.experiment(known).title}", highlight=False)
        return
    what = reproduce.experiment(name).only(task or (), only or ())
    planned = reproduce.planned(what, scale, seeds, demos, ours or ())
    into = into or Path("runs/reproduce", scale)
    out = out or into
    without = sorted({run.task for run in planned if not run.words})
    for absent in without:
        console.print(
            f"{absent}: no demonstrations, so it is left out: iqmpc demos make {absent} "
            f"--episodes 100 --out {demos / absent}.h5",
            highlight=False,
            soft_wrap=True,
        )
    there = reproduce.finished([*(runs or []), str(into / "*")])
    made, missing = {}, []
    for run in planned:
        if not run.words:
            continue
        folder = there.get(reproduce.fingerprint(run.config))
        if folder is None:
            missing.append(run)
        else:
            made[run] = folder
    if dry_run:
        _list(made, missing)
        return
    wrong = run_list.make({run.name: run.words for run in missing}, into, jobs)
    made |= {run: into / run.name for run in missing if (into / run.name / "summary.json").exists()}
    made = {run: made[run] for run in planned if run in made}  # in order
    found = reproduce.rows(what, reproduce.measured(what, made, episodes=episodes))
    text = reproduce.to_markdown(what, found)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / f"{name}.md", text.encode())
    write_atomically(out / f"{name}.csv", reproduce.to_csv(found).encode())
    print(text)
    _draw(what, made, out)
    console.print(f"wrote {out / name}.md, .csv and figures", highlight=False)
    if wrong:
        raise IqmpcError("\n".join(wrong))


def _list(made: Mapping[PlannedRun, Path], missing: Sequence[PlannedRun]) -> None:
    """The runs, with the commands of those that are to be made and what they cost here."""
    from iqmpc import reproduce

    for run, folder in made.items():
        console.print(f"{run.name}: there, {folder}", highlight=False, soft_wrap=True)
    costs: dict[tuple[str, str], float | None] = {}
    for run in missing:
        kind = run.task, run.variant
        config = run.config
        if kind not in costs:
            try:
                costs[kind] = reproduce.step_times(config).run_s(config)
            except (IqmpcError, RuntimeError) as error:
                console.print(f"{run.name}: its cost is not known: {error}", soft_wrap=True)
                costs[kind] = None
        cost = costs[kind]
        hours = "unknown" if cost is None else f"{cost / 3600:.2f} h"
        console.print(
            f"{run.name}: {hours}: iqmpc train {' '.join(run.words)}",
            highlight=False,
            soft_wrap=True,
        )
    known = [costs[run.task, run.variant] for run in missing]
    total = sum(cost for cost in known if cost is not None)
    console.print(
        f"{len(made)} runs are there, {len(missing)} are to be made: {total / 3600:.1f} h, one "
        "after the other and without evaluations",
        highlight=False,
        soft_wrap=True,
    )


def _draw(what: Experiment, made: Mapping[PlannedRun, Path], out: Path) -> None:
    """Curves of every task, and decoded against true rewards where these are compared."""
    from iqmpc import run_list
    from iqmpc.plot import plot

    try:
        for task in what.tasks:
            folders = [folder for run, folder in made.items() if run.task == task]
            if folders:
                plot(folders, out / f"{what.name}-{task}.png", title=f"{what.title}, {task}")
    except IqmpcError as error:
        console.print(f"no figure: {error}", markup=False)
    if what.measure != "correlation":
        return
    for run, folder in made.items():
        if run.seed == 0:
            picture = out / f"{what.name}-{run.task}-{run.variant}.png"
            words = ["eval", folder, "--episodes", "1", "--scatter", picture]
            subprocess.run([*run_list.IQMPC, *map(str, words)], check=False)
