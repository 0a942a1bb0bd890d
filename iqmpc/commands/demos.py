"""`iqmpc demos`: look at demonstration files, check them, convert them.

Errors that are the input's fault are left to `iqmpc.cli.main`, which prints them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from iqmpc.demos.demonstrations import Demonstrations, packaged_path, packaged_tasks
from iqmpc.demos.formats import FORMATS
from iqmpc.demos.formats.isolated import read
from iqmpc.demos.types import DemonstrationError, Draft, Facts
from iqmpc.errors import printable
from iqmpc.files import strict_json

app = typer.Typer(no_args_is_help=True, help="Look at, check and convert demonstrations.")

Source = Annotated[
    str, typer.Argument(help="A file or folder of any readable format, or a packaged task.")
]
# What a format does not say; docs/demonstrations.md has which needs what.
Format = Annotated[
    str | None,
    typer.Option("--format", help=f"{', '.join(FORMATS)}; by default what the content says."),
]
ObsKeys = Annotated[
    str | None,
    typer.Option(metavar="A,B", help="Members of a dictionary of observations, in this order."),
]
Low = Annotated[
    str | None, typer.Option(metavar="N[,N…]", help="The least that each action may be.")
]
High = Annotated[str | None, typer.Option(metavar="N[,N…]", help="The most.")]
Length = Annotated[
    int | None, typer.Option(min=1, help="Steps to a time limit, where the file marks none.")
]
Mask = Annotated[str | None, typer.Option(help="Take this subset of a robomimic file.")]
Clip = Annotated[
    bool,
    typer.Option("--clip-actions", help="Clip actions to [-1, 1], as their simulator did."),
]
ActionKey = Annotated[
    str | None, typer.Option(help="The actions of a LeRobot dataset; by default 'action'.")
]
AllowGaps = Annotated[
    bool,
    typer.Option("--allow-gaps", help="Take a LeRobot dataset in which episodes are missing."),
]


def _facts(
    task: str | None,
    obs_keys: str | None,
    action_low: str | None,
    action_high: str | None,
    episode_length: int | None,
    mask: str | None,
    clip_actions: bool,
    action_key: str | None,
    allow_gaps: bool,
    episodes: int | None = None,
) -> Facts:
    def numbers(option: str, text: str | None) -> tuple[float, ...] | None:
        try:
            return None if text is None else tuple(float(part) for part in text.split(","))
        except ValueError:
            raise DemonstrationError(f"{option} {text}: needs N or N,N,…") from None

    return Facts(
        task=task,
        obs_keys=None if obs_keys is None else tuple(obs_keys.split(",")),
        action_low=numbers("--action-low", action_low),
        action_high=numbers("--action-high", action_high),
        episode_length=episode_length,
        mask=mask,
        clip_actions=clip_actions,
        action_key=action_key,
        allow_gaps=allow_gaps,
        episodes=episodes,
    )


def _locate(source: str) -> Path:
    """A packaged task's file or the path itself; ./NAME reaches a file named like a task."""
    if source in packaged_tasks():
        return packaged_path(source)
    path = Path(source)
    if not path.suffix and not path.exists():
        raise DemonstrationError(
            f"{source}: no such file, nor a packaged task ({', '.join(packaged_tasks())})"
        )
    return path


@app.command()
def info(
    path: Source,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Draw its distributions: .png, .pdf or .svg.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="The task, where the file names none.")] = None,
    format: Format = None,
    obs_keys: ObsKeys = None,
    action_low: Low = None,
    action_high: High = None,
    episode_length: Length = None,
    mask: Mask = None,
    clip_actions: Clip = False,
    action_key: ActionKey = None,
    allow_gaps: AllowGaps = False,
) -> None:
    """Show what a demonstration set holds."""
    facts = _facts(
        task,
        obs_keys,
        action_low,
        action_high,
        episode_length,
        mask,
        clip_actions,
        action_key,
        allow_gaps,
    )
    demos = Demonstrations.load(_locate(path), format=format, facts=facts)
    returns = demos.returns()
    lengths = [len(episode.actions) for episode in demos.episodes]
    summary = {
        "task": demos.task,
        "episodes": len(demos),
        "transitions": demos.transitions,
        "length_min": min(lengths),
        "length_max": max(lengths),
        "obs_shape": demos.obs_shape,
        "action_dim": demos.action_dim,
        "return_mean": demos.return_mean,
        "return_sd": None if returns is None else float(np.std(returns)),
        "success_rate": demos.success_rate,
        "terminated": sum(episode.terminated for episode in demos.episodes),
        "provenance": demos.provenance,
    }
    if as_json:
        typer.echo(strict_json(summary))
    else:
        _print_table(summary)
    if out is not None:
        from iqmpc.demos.figure import draw

        draw(demos, out)


def _print_table(summary: dict[str, Any]) -> None:
    shortest, longest = summary["length_min"], summary["length_max"]
    mean, success = summary["return_mean"], summary["success_rate"]
    rows = {
        "task": summary["task"],
        "episodes": summary["episodes"],
        "steps an episode": longest if shortest == longest else f"{shortest} to {longest}",
        "steps in all": summary["transitions"],
        "observation values": " × ".join(map(str, summary["obs_shape"])),
        "action values": summary["action_dim"],
        "return": "not recorded" if mean is None else f"{mean:.1f} ± {summary['return_sd']:.1f}",
        "success": "not defined" if success is None else f"{success:.0%}",
        "terminated": f"{summary['terminated']} of {summary['episodes']}",
        **{f"provenance: {key}": text for key, text in summary["provenance"].items()},
    }
    table = Table(show_header=False)
    for name, value in rows.items():
        table.add_row(Text(printable(name)), Text(printable(str(value))))
    Console().print(table)


@app.command()
def check(
    path: Source,
    task: Annotated[str | None, typer.Option(help="The task that it must be for.")] = None,
    format: Format = None,
    obs_keys: ObsKeys = None,
    action_low: Low = None,
    action_high: High = None,
    episode_length: Length = None,
    mask: Mask = None,
    clip_actions: Clip = False,
    action_key: ActionKey = None,
    allow_gaps: AllowGaps = False,
) -> None:
    """List every defect of a demonstration file; exit with 1 if it has any."""
    facts = _facts(
        task,
        obs_keys,
        action_low,
        action_high,
        episode_length,
        mask,
        clip_actions,
        action_key,
        allow_gaps,
    )
    draft = read(_locate(path), format, facts)
    try:
        demos = Demonstrations.from_draft(draft, task)
    except DemonstrationError as error:
        for defect in error.defects:
            typer.echo(printable(str(defect)))
        typer.echo(f"{path}: {len(error.defects)} defect(s)")
        raise typer.Exit(1) from None
    typer.echo(
        f"{path}: ok, {len(demos)} episodes, {demos.transitions} steps of " + printable(demos.task)
    )


@app.command()
def convert(
    source: Source,
    target: Annotated[Path, typer.Argument(help="The .h5 file to write.")],
    task: Annotated[str | None, typer.Option(help="Name the task so in the new file.")] = None,
    episodes: Annotated[
        int | None, typer.Option(min=1, help="Take only the first so many.")
    ] = None,
    best: Annotated[
        int | None, typer.Option(min=1, help="Take only so many, of the highest return.")
    ] = None,
    provenance: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Note how it was made; may be repeated."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    legacy_pickle: Annotated[
        bool,
        typer.Option(
            "--legacy-pickle",
            help="SOURCE is a pickle of arrays in lists and dicts, as older code writes them; "
            "nothing in it is run.",
        ),
    ] = False,
    format: Format = None,
    obs_keys: ObsKeys = None,
    action_low: Low = None,
    action_high: High = None,
    episode_length: Length = None,
    mask: Mask = None,
    clip_actions: Clip = False,
    action_key: ActionKey = None,
    allow_gaps: AllowGaps = False,
) -> None:
    """Write any readable demonstration file as HDF5."""
    facts = _facts(
        task,
        obs_keys,
        action_low,
        action_high,
        episode_length,
        mask,
        clip_actions,
        action_key,
        allow_gaps,
        episodes,
    )
    notes = [note.partition("=") for note in provenance or []]
    for key, equals, value in notes:
        if not (key and equals and value):
            raise DemonstrationError(f"--provenance {key}{equals}{value}: needs KEY=VALUE")
    if target.exists() and not force:
        raise DemonstrationError(f"{target}: exists; --force replaces it")
    if legacy_pickle and format is not None:
        raise DemonstrationError("--legacy-pickle is a format of its own: give no --format")
    path = Path(source) if legacy_pickle else _locate(source)
    draft = read(path, "legacy pickle" if legacy_pickle else format, facts)
    if isinstance(draft, Draft):
        if task is not None:
            draft.task = task
        if isinstance(draft.provenance, Mapping):
            draft.provenance = {**draft.provenance, **{key: value for key, _, value in notes}}
    demos = Demonstrations.from_draft(draft)
    if episodes is not None:
        demos = demos.select(episodes)
    if best is not None:
        demos = demos.best(best)
    demos.save(target)
    typer.echo(f"{target}: {len(demos)} episodes, {target.stat().st_size} bytes")
