"""`iqmpc eval`: evaluate a trained run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from iqmpc.commands.options import Agent, Backend, Checkpoint, Device, acting
from iqmpc.console import console, print_summary


def evaluate_run(
    run: Agent,
    episodes: Annotated[int, typer.Option(min=1)] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
    planner: Annotated[bool, typer.Option(help="--no-planner acts with the policy prior.")] = True,
    video: Annotated[Path | None, typer.Option(help="Write the first episode as MP4.")] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of the episodes; the run's own by default.")
    ] = None,
    correlation: Annotated[
        bool,
        typer.Option(
            "--correlation",
            help="Correlate decoded with true rewards too, over 18 further episodes: "
            "the agent, the agent with noise, random actions.",
        ),
    ] = False,
    scatter: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.png",
            help="Draw these rewards against each other too, their values in a CSV beside it.",
        ),
    ] = None,
    checkpoint: Checkpoint = "newest",
    device: Device = None,
    backend: Backend = None,
) -> None:
    """Evaluate a trained run, or an agent's file."""
    changes = acting(planner, device, backend)
    recorder = None
    if video is not None:
        from iqmpc.video import Recorder

        recorder = Recorder(video)
    from iqmpc.evaluation import evaluate, mixed_rewards, open_run

    agent, env = open_run(run, changes, checkpoint=checkpoint, seed=seed, render=video is not None)
    seed = agent.config.seed if seed is None else seed
    with console.status("evaluating") as status:
        result = evaluate(
            agent,
            env,
            episodes=episodes,
            seed=seed,
            on_step=recorder,
            progress=lambda n, g: status.update(f"episode {n}/{episodes}: return {g:.1f}"),
        )
    summary = {
        "task": agent.config.task.name,
        "seed": seed,
        **agent.facts,
        **result.summary(agent.facts["demonstrator_return"]),
        "reward_correlation": None,
        "planner": planner,
        **agent.planner.summary(),
    }
    pairs = None
    if correlation or scatter is not None:
        with console.status("correlating") as status:
            pairs = mixed_rewards(
                agent,
                env,
                seed=seed,
                progress=lambda n, g: status.update(f"correlating, episode {n}: return {g:.1f}"),
            )
        summary["reward_correlation"] = None if pairs is None else pairs.correlation
    if scatter is not None and pairs is not None:
        from iqmpc.plot import scatter_rewards

        scatter_rewards(*pairs, scatter, title=f"{agent.config.task.name}, {run}")
    if as_json:
        from iqmpc.files import strict_json

        print(strict_json(summary))
    else:
        print_summary(summary, run)
    if recorder is not None:
        recorder.save()
        console.print(f"wrote {video}")
