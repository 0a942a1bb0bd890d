"""The command line: `iqmpc train | eval | plot | demos | doctor`."""

from __future__ import annotations

import json
import sys
import time
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from iqmpc.demos.cli import app as demos_app
from iqmpc.errors import ConfigError, IqmpcError

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Learn from demonstrations without rewards, act by planning in a latent world model.")
app.add_typer(demos_app, name="demos", help="Inspect, check, convert and record demonstrations.")

# Figures for programs go to stdout, everything for people to stderr.
_console = Console(stderr=True)

_OVERRIDES_HELP = "Settings as key=value: task=cheetah-run train.steps=50000 learner.batch=128"


def main() -> None:
    """Entry point: an error that is the input's fault is one message and exit code 2."""
    warnings.showwarning = _show_warning
    try:
        app()
    except (IqmpcError, OSError) as error:
        _console.print(f"iqmpc: {error}", style="bold red", markup=False, highlight=False,
                       soft_wrap=True)
        sys.exit(2)


@app.command()
def train(
    overrides: Annotated[list[str] | None, typer.Argument(help=_OVERRIDES_HELP)] = None,
) -> None:
    """Train an agent; ends with an evaluation beside the demonstrator's return.

    `resume=RUN` continues a run; only train.* (but not train.num_envs) and threads may then be
    changed.
    """
    from iqmpc.compose import compose, parse
    from iqmpc.progress import TrainingDisplay

    words = parse(overrides or [])
    if "resume" in words:
        run = Path(str(words.pop("resume")))
        config, resume = _resumed(run, words), True
    else:
        config, resume = compose(overrides or []), False
        stamp = time.strftime("%Y%m%d-%H%M%S")
        run = Path(config.run_dir or f"runs/{config.task.name}/{stamp}-seed{config.seed}")
        if config.demos.path is not None:  # the run may be continued from another folder
            config = config.replace({"demos.path": str(Path(config.demos.path).resolve())})
    _prepare_torch(config)

    import iqmpc
    from iqmpc.envs import check_spaces

    count = config.train.num_envs
    envs = [iqmpc.make_env(config.task, seed=config.seed) for _ in range(count)]
    eval_env = iqmpc.make_env(config.task, seed=config.seed) if count > 1 else None
    demonstrations = _demonstrations(config, *check_spaces(envs[0], config.task.name))
    with TrainingDisplay(config.train.steps, _console) as display:
        trainer = iqmpc.Trainer(
            config, envs, demonstrations, run=run, eval_env=eval_env, resume=resume,
            on_progress=display.update, on_message=display.message)
        parameters = sum(p.numel() for p in trainer.learner.model.parameters())
        display.message(
            f"{config.task.name}: {parameters:,} parameters on {trainer.device}, planner "
            f"{trainer.agent.planner.backend}, run folder {run}")
        try:
            summary = trainer.train()
        except KeyboardInterrupt:
            display.message(f"interrupted; continue with: iqmpc train resume={run}")
            raise
    _print_summary(summary, run)


@app.command("eval")
def evaluate_run(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    episodes: Annotated[int, typer.Option(min=1)] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
    planner: Annotated[
        bool, typer.Option(help="--no-planner acts with the policy prior.")] = True,
    video: Annotated[Path | None, typer.Option(help="Write the first episode as MP4.")] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of the episodes; the run's own by default.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    backend: Annotated[str | None, typer.Option(help="The planner's kernel backend.")] = None,
) -> None:
    """Evaluate a trained run."""
    changes = {"planner.enabled": planner, "device": device, "planner.backend": backend}
    changes = {k: v for k, v in changes.items() if v is not None and v is not True}
    recorder = None
    if video is not None:
        from iqmpc.video import Recorder

        recorder = Recorder(video)
    agent, env = _load(run, changes, seed=seed, render=video is not None)
    from iqmpc.evaluation import evaluate, ratio, reward_correlation

    seed = agent.config.seed if seed is None else seed
    with _console.status("evaluating") as status:
        result = evaluate(
            agent, env, episodes=episodes, seed=seed, on_step=recorder,
            progress=lambda n, g: status.update(f"episode {n}/{episodes}: return {g:.1f}"))
    summary = {
        "task": agent.config.task.name, "seed": seed, **agent.facts, "episodes": episodes,
        "return_mean": result.return_mean, "return_std": result.return_std,
        "success_rate": result.success_rate,
        "success_any_rate": result.success_any_rate,
        "ratio": ratio(result.return_mean, agent.facts["demonstrator_return"]),
        "reward_correlation": reward_correlation(agent, result.episodes),
        "planner": planner, "backend": agent.planner.backend,
        "nonfinite_plans": agent.planner.nonfinite_plans,
        "missed_plans": agent.planner.missed_plans,
    }
    if as_json:
        print(json.dumps(summary, indent=2))
    else:
        _print_summary(summary, run)
    if recorder is not None:
        recorder.save()
        _console.print(f"wrote {video}")


@demos_app.command("record")
def record(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    out: Annotated[Path, typer.Argument(metavar="OUT.h5")],
    episodes: Annotated[int, typer.Option(min=1)] = 10,
    planner: Annotated[bool, typer.Option(help="--no-planner acts with the policy prior.")] = True,
    min_return: Annotated[
        float | None, typer.Option(help="Keep only episodes with at least this return.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the episodes.")] = 0,
    force: Annotated[bool, typer.Option(help="Overwrite OUT.")] = False,
) -> None:
    """Roll out a trained run and keep the episodes as demonstrations."""
    from iqmpc.demos import DemonstrationError, Demonstrations

    if out.exists() and not force:
        raise DemonstrationError(f"{out} exists; --force overwrites it")
    if out.suffix not in (".h5", ".hdf5") or not out.resolve().parent.is_dir():
        raise DemonstrationError(f"{out} must be an .h5 file in a folder that exists")
    agent, env = _load(run, {} if planner else {"planner.enabled": False}, seed=seed)
    import iqmpc
    from iqmpc.evaluation import rollout
    from iqmpc.seeding import stream_seed

    kept = []
    with _console.status("recording") as status:
        for index in range(episodes):
            episode = rollout(agent, env, seed=stream_seed(seed, "record", index))
            total = float(episode.rewards.sum())
            if min_return is None or total >= min_return:
                kept.append(episode)
            status.update(f"{index + 1}/{episodes}: return {total:.1f}, {len(kept)} kept")
    if not kept:
        raise DemonstrationError(f"none of {episodes} episodes reached a return of {min_return}")
    provenance = {
        "recorded_by": f"iqmpc {iqmpc.__version__}", "run": run.name,
        "actor": "planner" if planner else "policy prior", "seed": str(seed),
        "kept": f"{len(kept)} of {episodes}"
        + ("" if min_return is None else f" with return >= {min_return:g}"),
        "objective": agent.config.learner.objective,
    }
    demonstrations = Demonstrations(agent.config.task.name, tuple(kept), provenance)
    demonstrations.save(out)
    _console.print(f"wrote {len(kept)} episodes to {out}, return {demonstrations.return_mean:.1f}")


@app.command()
def plot(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")],
    out: Annotated[Path, typer.Option(help="The figure: .png, .pdf or .svg.")] = Path("curves.png"),
) -> None:
    """Draw the learning curves of runs and write their points to a CSV beside the figure."""
    from iqmpc.plot import plot as draw

    draw(runs, out)
    _console.print(f"wrote {out} and {out.with_suffix('.csv')}")


@app.command()
def doctor() -> None:
    """Versions, devices, and which kernel backends can run here and why the others cannot."""
    from iqmpc.doctor import report

    for table in report():
        Console().print(table)


def _prepare_torch(config: Any) -> None:
    import torch

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.set_flush_denormal(True)  # denormal latents cost a CPU dearly and mean nothing


def _demonstrations(config: Any, obs_dim: int, action_dim: int) -> Any:
    from iqmpc.demos import Demonstrations

    task = config.task.name
    if config.demos.path is None:
        if config.learner.objective == "td":
            return None
        found = Demonstrations.packaged(task)
    else:
        found = Demonstrations.load(
            config.demos.path, task=task, obs_dim=obs_dim, action_dim=action_dim)
    return found if config.demos.episodes is None else found.select(config.demos.episodes)


def _resumed(run: Path, changes: dict[str, Any]) -> Any:
    from iqmpc.checkpoint import load_config

    for key in changes:
        if not key.startswith("train.") and key != "threads":
            raise ConfigError(
                f"{key} cannot change when a run is resumed (only train.* and threads)")
    return load_config(run).replace(changes)


def _load(
    run: Path, changes: dict[str, Any], *, seed: int | None, render: bool = False
) -> tuple[Any, Any]:
    import iqmpc
    from iqmpc.checkpoint import load_config

    config = load_config(run)
    _prepare_torch(config)
    env = iqmpc.make_env(config.task, render_mode="rgb_array" if render else None)
    return iqmpc.Agent.load(run, changes=changes, seed=seed), env


def _print_summary(summary: dict[str, Any], run: Path) -> None:
    table = Table(title=f"{summary['task']}  ({run})", show_header=False)
    for key, value in summary.items():
        if value is not None and key != "task":
            text = f"{value:.3g}" if key.endswith(("ratio", "_rate", "_correlation")) else \
                f"{value:.1f}" if isinstance(value, float) else str(value)
            table.add_row(key, text)
    _console.print(table)
    if summary.get("demonstrator_return"):
        _console.print(
            f"return {summary['return_mean']:.1f} beside the demonstrator's "
            f"{summary['demonstrator_return']:.1f} ({100 * summary['ratio']:.0f} %)",
            style="bold", highlight=False)


def _show_warning(message: Any, category: Any, *_: Any, **__: Any) -> None:
    if issubclass(category, (DeprecationWarning, FutureWarning)):
        return
    _console.print(f"warning: {message}", style="yellow", markup=False, highlight=False,
                   soft_wrap=True)


if __name__ == "__main__":
    main()
