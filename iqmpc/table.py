"""Runs as records of what they reached: measured, kept in a JSON file, shown as a table."""

from __future__ import annotations

import glob
import json
import math
import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from rich.table import Table

from iqmpc.composition import ablation
from iqmpc.config import Config
from iqmpc.errors import CheckpointError, IqmpcError, TaskError
from iqmpc.evaluation import evaluate, mixed_correlation, open_run, ratio
from iqmpc.files import write_atomically
from iqmpc.run_folder import RunFolder
from iqmpc.runlog import last_evaluations

EPISODES = 20
# Evaluations in training use the run's own seed: these episodes are ones it was never looked at in.
_SEED_OFFSET = 10_000
_DIGITS = 4
# What is taken from a summary.json: of the training, and of an evaluation.
_TOLD = {"env_steps", "wall_s", "demonstrator_return"}
_REACHED = {"episodes", "return_mean", "return_std", "success_rate"}

Record = dict[str, Any]


def key(r: Mapping[str, Any]) -> tuple[Any, ...]:
    """What two records of the same run agree in."""
    return tuple(r.get(field) for field in ("task", "agent", "seed", "ablation"))


def find_runs(patterns: Iterable[str]) -> list[Path]:
    """Folders by path, or by glob where there is nothing of that name; what is neither stays.

    In the place of a folder that is no run, such as a sweep's, are the runs in it.
    """
    found: list[Path] = []
    for pattern in patterns:
        matches = sorted(Path(p) for p in glob.glob(pattern) if Path(p).is_dir())
        found += [Path(pattern)] if Path(pattern).exists() or not matches else matches
    return list(dict.fromkeys(run for path in found for run in _runs_in(path)))


def _runs_in(path: Path) -> list[Path]:
    """The run that a folder is, or the runs below it; a folder that has none stays."""
    found = []
    for folder, below, _ in os.walk(path):
        if RunFolder(folder).holds_run:
            found.append(Path(folder))
            below.clear()
    return sorted(found) or [path]


def measure(run: Path, *, episodes: int, planner: bool = True) -> dict[str, Any]:
    """Evaluate a run's newest checkpoint over `episodes` episodes (0: none), and its correlation.

    Returns the checkpoint's facts and the figures as `iqmpc eval` names them. Episodes follow from
    the run's seed + 10,000. Raises as `open_run` does.
    """
    seed = RunFolder(run).load_config().seed + _SEED_OFFSET
    agent, env = open_run(run, {"planner.enabled": planner}, seed=seed)
    try:
        figures = {**agent.facts, "episodes": episodes, "seed": seed}
        if episodes:
            result = evaluate(agent, env, episodes=episodes, seed=seed)
            figures |= {
                "return_mean": result.return_mean,
                "return_std": result.return_std,
                "success_rate": result.success_rate,
            }
        figures["reward_correlation"] = mixed_correlation(agent, env, seed=seed)
    finally:
        env.close()
    return figures


def record(
    run: Path,
    *,
    episodes: int = EPISODES,
    planner: bool = True,
    on_message: Callable[[str], None] | None = None,
) -> Record:
    """What a run reached at its last checkpoint; `docs/results/README.md` names the fields.

    The evaluation of summary.json is taken where it has `episodes` episodes or more of the same
    agent, else one is made (`measure`). What was measured is kept in the run folder, in
    evaluation-AGENT.json (`RunFolder.evaluation`), until the run has gone on. `planner=False` acts
    with the policy prior.
    Raises `CheckpointError` where `run` is no run or has no checkpoint, and as `measure` does.
    """
    folder = RunFolder(run)
    config = folder.load_config()
    if not folder.has_checkpoint:
        raise CheckpointError(f"{run} has no checkpoint")
    summary = folder.load_figures(folder.summary, _TOLD | _REACHED)
    agent = _acting(config, planner)
    enough = summary.get("episodes", 0) >= episodes and agent == _acting(config, True)
    kept = folder.evaluation(agent)
    measured = folder.load_figures(kept, {"env_steps", "reward_correlation"})
    if (
        not summary
        or measured.get("env_steps") != summary["env_steps"]
        or (not enough and measured.get("episodes", 0) < episodes)
    ):
        try:
            measured = _in_own_process(run, 0 if enough else episodes, agent != "prior")
        except TaskError as error:  # such as an environment of the user's own
            if not enough:
                raise
            measured = {"env_steps": summary["env_steps"], "reward_correlation": None}
            if on_message is not None:
                on_message(f"{run}: no correlation: {error}")
        else:
            if summary and measured["env_steps"] != summary["env_steps"]:
                raise CheckpointError(
                    f"{run}: its newest whole checkpoint is of step {measured['env_steps']}, its "
                    f"summary.json of step {summary['env_steps']}"
                )
            text = json.dumps(_finite(measured), indent=2, allow_nan=False)
            write_atomically(kept, f"{text}\n".encode())
    told = summary or measured
    reached = summary if enough else measured
    steps, demonstrator = told["env_steps"], told["demonstrator_return"]
    last = last_evaluations(folder, before=steps if summary else steps + 1)
    of = "return" if reached["success_rate"] is None else "success"
    return _finite(
        {
            "task": config.task.name,
            "agent": agent,
            "seed": config.seed,
            "ablation": ablation(config),
            "preset": config.preset,
            "steps": steps,
            "minutes": told["wall_s"] / 60,
            "episodes": reached["episodes"],
            "return_mean": reached["return_mean"],
            "return_std": reached["return_std"],
            "demonstrator_return": demonstrator,
            "ratio": ratio(reached["return_mean"], demonstrator),
            "success_rate": reached["success_rate"],
            "last5_of": of,
            "last5_mean": last[f"last5_{of}_mean"],
            "last5_min": last[f"last5_{of}_min"],
            "correlation": measured["reward_correlation"],
            "machine": summary.get("machine"),
            "threads": summary.get("threads"),
            "commit": summary.get("commit"),
        }
    )


def _acting(config: Config, planner: bool) -> str:
    """Who acts: `planner` or `prior` of IQ-MPC, with the planner where it is wanted, or a baseline
    by its name."""
    if config.is_baseline:
        return config.agent.name
    return "planner" if planner and config.planner.enabled else "prior"


def read_records(path: Path) -> list[Record]:
    """The records of a file, none where there is no file; `IqmpcError` for anything else."""
    try:
        records = json.loads(path.read_text(), parse_constant=lambda _: None)  # NaN is null
        _text(records)  # that they can be written again
    except FileNotFoundError:
        return []
    except (OSError, ValueError, RecursionError) as error:
        raise IqmpcError(f"{path} cannot be read: {error}") from error
    if not isinstance(records, list) or not all(map(_is_record, records)):
        raise IqmpcError(f"{path} is no list of records")
    return records


def _is_record(value: Any) -> bool:
    return isinstance(value, dict) and all(
        inner is None or isinstance(inner, (str, int, float)) for inner in value.values()
    )


def merge_records(path: Path, records: Sequence[Record]) -> None:
    """Put `records` into the file, in the place of those of the same task, agent, seed, ablation.

    All others stay. The file is written whole or not at all, one record a line, in order.
    """
    new = {key(r): r for r in records}
    merged = [*(r for r in read_records(path) if key(r) not in new), *new.values()]
    merged.sort(
        key=lambda r: (
            *(str(r.get(field)) for field in ("task", "agent", "ablation")),
            str(r.get("seed")).zfill(10),
        )
    )
    lines = b",\n".join(map(_text, merged))
    write_atomically(path, b"[\n" + lines + b"\n]\n")


def _text(value: Any) -> bytes:
    return json.dumps(value, allow_nan=False, ensure_ascii=False).encode()


def to_rich(records: Sequence[Record]) -> Table:
    """The table for a terminal."""
    header, *rows = _cells(records)
    table = Table()
    for index, title in enumerate(header):
        table.add_column(
            title,
            justify="left" if index < _TEXT else "right",
            overflow="fold",
            no_wrap=index >= _TEXT,
        )
    for row in rows:
        table.add_row(*row, style="bold" if row[_TEXT].startswith("mean") else None)
    return table


def to_markdown(records: Sequence[Record]) -> str:
    """The same table in Markdown."""
    header, *rows = _cells(records)
    lines = [header, ["---" if i < _TEXT else "--:" for i in range(len(header))], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def made_on(records: Sequence[Record]) -> str:
    """Machines, threads and commits of the records, in a line."""
    found = {
        field: sorted({str(r[field]) for r in records if r[field] is not None})
        for field in ("machine", "threads", "commit")
    }
    return "; ".join(f"{field} {', '.join(values) or 'unknown'}" for field, values in found.items())


# Title, field and how it is shown.
_COLUMNS = (
    ("task", "task", "{}"),
    ("agent", "agent", "{}"),
    ("ablation", "ablation", "{}"),
    ("seed", "seed", "{}"),
    ("steps", "steps", "{:,.0f}"),
    ("minutes", "minutes", "{:.0f}"),
    ("return", "return_mean", "{:.1f}"),
    ("demonstrator", "demonstrator_return", "{:.1f}"),
    ("ratio", "ratio", "{:.2f}"),
    ("success", "success_rate", "{:.2f}"),
    ("last 5", "last5_mean", "{:.2f}"),
    ("least", "last5_min", "{:.2f}"),
    ("correlation", "correlation", "{:.2f}"),
)
_TEXT = 3  # columns of text; the seed follows, then the figures


def _cells(records: Sequence[Record]) -> list[list[str]]:
    """The header and a row for each record; means over seeds follow where there are several."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for r in records:
        groups.setdefault((r["task"], r["agent"], r["ablation"]), []).append(r)
    rows = [[title for title, _, _ in _COLUMNS]]
    for group in groups.values():
        means = [{**_means(group), "seed": f"mean of {len(group)}"}] if len(group) > 1 else []
        for r in [*group, *means]:
            rows.append(
                [
                    "–" if r[field] is None else shape.format(r[field])
                    for _, field, shape in _COLUMNS
                ]
            )
    return rows


def _means(group: Sequence[Record]) -> Record:
    """Of every figure that all of the group have."""
    means = dict(group[0])
    for field in [field for _, field, _ in _COLUMNS[_TEXT + 1 :]]:
        values = [r[field] for r in group]
        means[field] = None if None in values else statistics.fmean(values)
    return means


def _in_own_process(run: Path, episodes: int, planner: bool) -> dict[str, Any]:
    """`measure` in a process of its own: dm_control chooses its graphics library once a process,
    and a simulator that crashes takes nothing with it."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(measure, run, episodes=episodes, planner=planner).result()
        except BrokenProcessPool:
            raise IqmpcError(
                f"{run}: the process that evaluated it died (killed for want of "
                "memory, or a simulator that crashed); iqmpc eval says more"
            ) from None


def _finite(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Floats rounded, and None for those that are not finite."""
    return {
        k: v if not isinstance(v, float) else round(v, _DIGITS) if math.isfinite(v) else None
        for k, v in figures.items()
    }
