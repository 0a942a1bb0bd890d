"""`iqmpc demos record`: keep a trained run's episodes as demonstrations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from iqmpc.commands.options import Backend, Checkpoint, Device, MinReturn, acting, check_target
from iqmpc.console import console
from iqmpc.progress import RecordingDisplay


def record(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    out: Annotated[Path, typer.Argument(metavar="OUT.h5")],
    episodes: Annotated[int, typer.Option(min=1)] = 10,
    planner: Annotated[bool, typer.Option(help="--no-planner acts with the policy prior.")] = True,
    min_return: MinReturn = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the episodes.")] = 0,
    obs: Annotated[
        str | None,
        typer.Option(
            help="pixels: act on the state, keep the frames that task.obs=pixels observes."
        ),
    ] = None,
    fast_render: Annotated[
        bool, typer.Option("--fast-render", help="Frames of task.fast_render=true.")
    ] = False,
    checkpoint: Checkpoint = "newest",
    device: Device = None,
    backend: Backend = None,
    force: Annotated[bool, typer.Option(help="Overwrite OUT.")] = False,
) -> None:
    """Roll out a trained run and keep the episodes as demonstrations."""
    from iqmpc import demonstrators
    from iqmpc.demos import DemonstrationError
    from iqmpc.envs.pixels import FrameRecorder
    from iqmpc.evaluation import open_run

    check_target(out, force)
    if obs not in (None, "pixels"):
        raise DemonstrationError(f"--obs must be pixels, got {obs!r}")
    if fast_render and obs is None:
        raise DemonstrationError("--fast-render needs --obs pixels")
    changes = acting(planner, device, backend)
    if fast_render:
        changes["task.fast_render"] = True
    agent, env = open_run(run, changes, checkpoint=checkpoint, seed=seed, render=obs is not None)
    task = agent.config.task
    if obs is not None:
        if task.suite != "dmcontrol" or task.obs == "pixels":
            raise DemonstrationError(
                f"--obs pixels is for runs on the state of a DMControl task, {run} is one on "
                f"{task.obs} of suite {task.suite!r}"
            )
        env = FrameRecorder(env)
    with RecordingDisplay(episodes, console) as display:
        demonstrations = demonstrators.record(
            run_demonstrator(run, agent, planner),
            env,
            task=task.name,
            episodes=episodes,
            max_tries=episodes,
            fewer=True,
            seed=seed,
            min_return=min_return,
            episode_length=task.episode_length,
            provenance=drawn(task, images=obs is not None),
            progress=display.update,
        )
    save(demonstrations, out)


def run_demonstrator(run: Path, agent: Any, planner: bool) -> Any:
    from iqmpc import demonstrators

    return demonstrators.Demonstrator(
        demonstrators.AgentPolicy(agent),
        provenance={
            "demonstrator": "iqmpc agent",
            "run": run.resolve().name,
            "actor": "planner" if planner else "policy prior",
            "objective": agent.config.learner.objective,
            "trained_steps": str(agent.facts["env_steps"]),
        },
    )


def drawn(task: Any, images: bool = False) -> dict[str, str]:
    """How the images of demonstrations were drawn, for their provenance."""
    from iqmpc.expert_data import rendering

    return {"render": rendering(task)} if images or task.obs == "pixels" else {}


def save(demonstrations: Any, out: Path) -> None:
    demonstrations.save(out)
    console.print(
        f"wrote {len(demonstrations)} episodes to {out}, return {demonstrations.return_mean:.1f}"
    )
