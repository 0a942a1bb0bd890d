"""`iqmpc demos make`: train or load who demonstrates, then record."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from iqmpc.commands.options import Backend, Checkpoint, Device, MinReturn, acting, check_target
from iqmpc.commands.record import drawn, run_demonstrator, save
from iqmpc.commands.train import train_run
from iqmpc.console import console
from iqmpc.errors import ConfigError
from iqmpc.progress import RecordingDisplay


def make_demonstrations(
    words: Annotated[
        list[str],
        typer.Argument(metavar="TASK [KEY=VALUE]...", help="A task, or its settings as for train."),
    ],
    out: Annotated[Path, typer.Option(help="The .h5 file to write.")],
    episodes: Annotated[int, typer.Option(min=1, help="How many to keep.")] = 10,
    policy: Annotated[
        str | None,
        typer.Option(
            metavar="sb3:ZIP|run:RUN|td",
            help="Who demonstrates: a Stable-Baselines3 model, a trained "
            "run, or an agent trained on the reward first. Default: the task's own demonstrator or "
            "td where it has none.",
        ),
    ] = None,
    train_steps: Annotated[
        int, typer.Option(min=1, help="Control steps of that training.")
    ] = 200_000,
    run_dir: Annotated[
        Path | None,
        typer.Option(
            help="Its run folder, continued where there is one. Default: "
            "runs/TASK/demonstrator-seedN."
        ),
    ] = None,
    min_return: MinReturn = None,
    successes_only: Annotated[
        bool | None,
        typer.Option(
            "--successes-only/--all-episodes",
            help="Keep only episodes that are solved at their last "
            "step. Default: what the demonstrator says.",
        ),
    ] = None,
    noise: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Standard deviation of Gaussian noise on actions. Default: the demonstrator's.",
        ),
    ] = None,
    max_tries: Annotated[
        int | None,
        typer.Option(min=1, help="Give up after so many episodes. Default: ten times --episodes."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the episodes, and of training.")] = 0,
    checkpoint: Checkpoint = "newest",
    device: Device = None,
    backend: Backend = None,
    force: Annotated[bool, typer.Option(help="Overwrite OUT.")] = False,
) -> None:
    """Make demonstrations of any task: train or load who demonstrates, then record."""
    import iqmpc
    from iqmpc import demonstrators
    from iqmpc.composition import compose
    from iqmpc.threads import prepare_torch

    check_target(out, force)
    words = [word if "=" in word else f"task={word}" for word in words]
    changes = acting(True, device, backend)
    words += [f"{key}={value}" for key, value in changes.items()]
    config = compose(words)
    prepare_torch(config)
    task = config.task.name
    kind, _, path = (policy or "").partition(":")
    if policy is not None and (kind, bool(path)) not in (
        ("sb3", True),
        ("run", True),
        ("td", False),
    ):
        raise ConfigError(f"--policy must be sb3:ZIP, run:RUN or td, got {policy!r}")
    if policy is None and task not in demonstrators.DEMONSTRATORS:
        kind = "td"
    if kind == "td":
        path = run_dir or Path(f"runs/{task}/demonstrator-seed{seed}")
        _train_demonstrator(
            compose([f"train.steps={train_steps}", *words, "learner=td", f"seed={seed}"]), path
        )
    env = iqmpc.make_env(config.task, seed=seed)
    demonstrator = _demonstrator(kind, path, checkpoint, env, config, seed, changes)
    with RecordingDisplay(episodes, console) as display:
        demonstrations = demonstrators.record(
            demonstrator,
            env,
            task=task,
            episodes=episodes,
            max_tries=max_tries or 10 * episodes,
            seed=seed,
            noise=noise,
            min_return=min_return,
            successes_only=successes_only,
            episode_length=config.task.episode_length,
            provenance=drawn(config.task),
            progress=display.update,
        )
    save(demonstrations, out)


def _train_demonstrator(config: Any, run: Path) -> None:
    """Train an agent on the task's reward into `run`, or continue or take the one that is there."""
    from iqmpc.run_folder import RunFolder

    folder = RunFolder(run)
    if folder.holds_run:
        there = folder.load_config()
        if (there.task, there.learner.objective) != (config.task, "td"):
            raise ConfigError(
                f"{run} holds a run of {there.task.name} with learner.objective="
                f"{there.learner.objective}, not of {config.task.name} with td; give another "
                "--run-dir"
            )
        done = folder.newest()[2]["env_steps"] if folder.has_checkpoint else 0
        if done >= config.train.steps:
            return
        config = there.replace(
            {
                "train.steps": config.train.steps,
                "device": config.device,
                "planner.backend": config.planner.backend,
            }
        )
    train_run(config, run, resume=folder.holds_run)


def _demonstrator(
    kind: str,
    path: str | Path,
    checkpoint: str,
    env: Any,
    config: Any,
    seed: int,
    changes: dict[str, Any],
) -> Any:
    """Who acts in `env`: kind is sb3, run or td with its path, or "" for the task's own.

    `changes` are settings of an agent that are replaced.
    """
    from iqmpc import demonstrators
    from iqmpc.envs import check_spaces

    spec, action_dim = check_spaces(env, config.task.name)
    if not kind:
        return demonstrators.DEMONSTRATORS[config.task.name](env, seed)
    if kind == "sb3":
        from iqmpc.demonstrators.sb3 import Sb3Policy

        if spec.images:
            raise ConfigError(
                f"--policy sb3 acts on flat observations, {config.task.name} has images"
            )
        policy = Sb3Policy(path, spec.shape[0], action_dim)
        return demonstrators.Demonstrator(
            policy,
            provenance={
                "demonstrator": "Stable-Baselines3 policy, deterministic",
                "policy": f"{Path(path).name}, sha256 {policy.digest}",
            },
        )
    import iqmpc

    agent = iqmpc.Agent.load(path, checkpoint=checkpoint, changes=changes, seed=seed)
    found, found_dim = agent.model.observation_spec, agent.model.action_dim
    if (found, found_dim) != (spec, action_dim):
        raise ConfigError(
            f"{path}: the agent has observations {list(found.shape)} and {found_dim} actions, the "
            f"task {list(spec.shape)} and {action_dim}"
        )
    return run_demonstrator(Path(path), agent, agent.config.planner.enabled)
