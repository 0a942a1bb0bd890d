"""The command line: `iqmpc train | eval | table | plot | demos | doctor`."""

from __future__ import annotations

import itertools
import os
import shlex
import signal
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from iqmpc.demos.cli import app as demos_app
from iqmpc.errors import ConfigError, Interrupted, IqmpcError, printable
from iqmpc.progress import RecordingDisplay, TrainingDisplay

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Learn from demonstrations without rewards, act by planning in a latent world model.",
)
app.add_typer(demos_app, name="demos", help="Inspect, check, convert and make demonstrations.")

# Figures for programs go to stdout, everything for people to stderr.
_console = Console(stderr=True)

MinReturn = Annotated[
    float | None, typer.Option(help="Keep only episodes with at least this return.")
]
Device = Annotated[str | None, typer.Option(help="auto, cpu or cuda; the run's own by default.")]
Backend = Annotated[str | None, typer.Option(help="The planner's kernel backend.")]
_OVERRIDES_HELP = "Settings as key=value: task=cheetah-run train.steps=50000 learner.batch=128"


def main() -> None:
    """Entry point: an error that is the input's fault is one message and exit code 2."""
    # torch's threads spin after each operation, by default for milliseconds: on a machine with as
    # many cores as threads, a plan after an update then finds no core for its own. So many spins,
    # some 0.2 ms, still bridge what lies between two operations. Read when torch is loaded.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    warnings.showwarning = _show_warning
    try:
        app()
    except (IqmpcError, OSError) as error:
        _print_error(error)
        sys.exit(2)


@app.command()
def train(
    overrides: Annotated[list[str] | None, typer.Argument(help=_OVERRIDES_HELP)] = None,
) -> None:
    """Train an agent; ends with an evaluation beside the demonstrator's return.

    `resume=RUN` continues a run. What it learns may then not be changed: only train.* (but not
    train.num_envs), where the data lie (demos.path), and how it is computed (threads, device,
    learner.mode, learner.precision, and the planner's backend, precision, mode, capture and
    threads).
    """
    from iqmpc.compose import compose, parse

    words = parse(overrides or [])
    if "resume" in words:
        run = Path(str(words.pop("resume")))
        config, resume = _resumed(run, words), True
    else:
        config, resume = compose(overrides or []), False
        run = None if config.run_dir is None else Path(config.run_dir)
    if config.demos.path is not None:  # the run may be continued from another folder
        config = config.replace({"demos.path": str(Path(config.demos.path).resolve())})
    _print_summary(*_train(config, run, resume=resume))


def _train(config: Any, run: Path | None, *, resume: bool) -> tuple[dict[str, Any], Path]:
    """Train to the end with progress shown; the summary, and the run folder.

    Without `run` a folder of its own is made, when everything fits.
    """
    import iqmpc
    from iqmpc.envs import check_spaces

    make = partial(iqmpc.make_env, config.task, seed=config.seed)
    with TrainingDisplay(config.train.steps, _console) as display:
        env, count = make(), config.train.num_envs
        apart = count > 1 or config.train.workers  # `env` is then for evaluation alone
        if config.demos.path is not None:
            display.message(f"reading {config.demos.path}")
        demonstrations = _demonstrations(config, *check_spaces(env, config.task.name))
        named = run or _unused(config, claim=False)
        trainer = iqmpc.Trainer(
            config,
            [make] * count if apart else env,
            demonstrations,
            run=named,
            eval_env=env if apart else None,
            resume=resume,
            on_progress=display.update,
            on_message=display.message,
        )
        if run is None:
            trainer.run = run = _unused(config, claim=True)
        parameters = sum(p.numel() for p in trainer.learner.model.parameters())
        display.message(
            f"{config.task.name}: {parameters:,} parameters on {trainer.device}, planner "
            f"{trainer.agent.planner.backend}, run folder {run}"
        )
        hint = _busy_hint(config)
        if hint is not None:
            display.message(hint)
        try:
            return trainer.train(), run
        except KeyboardInterrupt as error:
            display.message(
                f"interrupted; continue with: iqmpc train {shlex.quote(f'resume={run}')}"
            )
            number = error.signal if isinstance(error, Interrupted) else signal.SIGINT
            raise SystemExit(128 + number) from None


def _unused(config: Any, *, claim: bool) -> Path:
    """A run folder that is not there yet; with `claim`, made by this process and no other."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    first = Path(f"runs/{config.task.name}/{stamp}-seed{config.seed}")
    for number in itertools.count(2):
        if not claim and not first.exists():
            return first
        if claim:
            try:
                first.mkdir(parents=True)
                return first
            except FileExistsError:
                pass
        first = first.with_name(f"{stamp}-seed{config.seed}-{number}")
    raise AssertionError("unreachable")


@app.command("eval")
def evaluate_run(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
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
    device: Device = None,
    backend: Backend = None,
) -> None:
    """Evaluate a trained run."""
    changes = _acting(planner, device, backend)
    recorder = None
    if video is not None:
        from iqmpc.video import Recorder

        recorder = Recorder(video)
    from iqmpc.evaluation import evaluate, mixed_correlation, open_run, ratio

    agent, env = open_run(run, changes, seed=seed, render=video is not None)
    seed = agent.config.seed if seed is None else seed
    with _console.status("evaluating") as status:
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
        "episodes": episodes,
        "return_mean": result.return_mean,
        "return_std": result.return_std,
        "success_rate": result.success_rate,
        "success_any_rate": result.success_any_rate,
        "ratio": ratio(result.return_mean, agent.facts["demonstrator_return"]),
        "reward_correlation": None,
        "planner": planner,
        "backend": agent.planner.backend,
        "nonfinite_plans": agent.planner.nonfinite_plans,
        "missed_plans": agent.planner.missed_plans,
        "late_plans": agent.planner.late_plans,
    }
    if correlation:
        with _console.status("correlating") as status:
            summary["reward_correlation"] = mixed_correlation(
                agent,
                env,
                seed=seed,
                progress=lambda n, g: status.update(f"correlating, episode {n}: return {g:.1f}"),
            )
    if as_json:
        from iqmpc.runlog import strict_json

        print(strict_json(summary))
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
    device: Device = None,
    backend: Backend = None,
    force: Annotated[bool, typer.Option(help="Overwrite OUT.")] = False,
) -> None:
    """Roll out a trained run and keep the episodes as demonstrations."""
    from iqmpc.demos import DemonstrationError, make
    from iqmpc.envs.pixels import FrameRecorder
    from iqmpc.evaluation import open_run

    _check_target(out, force)
    if obs not in (None, "pixels"):
        raise DemonstrationError(f"--obs must be pixels, got {obs!r}")
    if fast_render and obs is None:
        raise DemonstrationError("--fast-render needs --obs pixels")
    changes = _acting(planner, device, backend)
    if fast_render:
        changes["task.fast_render"] = True
    agent, env = open_run(run, changes, seed=seed, render=obs is not None)
    task = agent.config.task
    if obs is not None:
        if task.suite != "dmcontrol" or task.obs == "pixels":
            raise DemonstrationError(
                f"--obs pixels is for runs on the state of a DMControl task, {run} is one on "
                f"{task.obs} of suite {task.suite!r}"
            )
        env = FrameRecorder(env)
    with RecordingDisplay(episodes, _console) as display:
        demonstrations = make.record(
            _run_demonstrator(run, agent, planner),
            env,
            task=task.name,
            episodes=episodes,
            max_tries=episodes,
            fewer=True,
            seed=seed,
            min_return=min_return,
            episode_length=task.episode_length,
            provenance=_drawn(task, images=obs is not None),
            progress=display.update,
        )
    _save(demonstrations, out)


@demos_app.command("make")
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
    device: Device = None,
    backend: Backend = None,
    force: Annotated[bool, typer.Option(help="Overwrite OUT.")] = False,
) -> None:
    """Make demonstrations of any task: train or load who demonstrates, then record."""
    import iqmpc
    from iqmpc.agent import prepare_torch
    from iqmpc.compose import compose
    from iqmpc.demos import make

    _check_target(out, force)
    words = [word if "=" in word else f"task={word}" for word in words]
    acting = _acting(True, device, backend)
    words += [f"{key}={value}" for key, value in acting.items()]
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
    if policy is None and task not in make.DEMONSTRATORS:
        kind = "td"
    if kind == "td":
        path = run_dir or Path(f"runs/{task}/demonstrator-seed{seed}")
        _train_demonstrator(
            compose([f"train.steps={train_steps}", *words, "learner=td", f"seed={seed}"]), path
        )
    env = iqmpc.make_env(config.task, seed=seed)
    demonstrator = _demonstrator(kind, path, env, config, seed, acting)
    with RecordingDisplay(episodes, _console) as display:
        demonstrations = make.record(
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
            provenance=_drawn(config.task),
            progress=display.update,
        )
    _save(demonstrations, out)


@app.command("table")
def table_of_runs(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run folders, or globs.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Merge the records into this file.")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
    episodes: Annotated[
        int, typer.Option(min=1, help="Evaluate anew where summary.json has fewer.")
    ] = 20,
    planner: Annotated[bool, typer.Option(help="--no-planner acts with the policy prior.")] = True,
) -> None:
    """What runs reached at their last checkpoint: a table, and records in JSON.

    A run that cannot be read is named, and the exit code is then 2; the others are reported.
    """
    from iqmpc import table

    if out is not None:
        table.read_records(out)  # an error now, not after the evaluations
        if not out.resolve().parent.is_dir():
            raise IqmpcError(f"{out} is in no folder that exists")
    records: dict[Path, dict[str, Any]] = {}
    failed = False
    for run in table.find_runs(runs):
        try:
            with _console.status(f"{run}: evaluating"):
                new = table.record(
                    run,
                    episodes=episodes,
                    planner=planner,
                    on_message=partial(_console.print, markup=False),
                )
            same = [other for other, r in records.items() if table.key(r) == table.key(new)]
            if same:
                raise IqmpcError(
                    f"{run} is left out: {same[0]} has the same task, agent, seed and settings"
                )
            records[run] = new
        except (IqmpcError, OSError) as error:
            _print_error(error if str(run) in str(error) else f"{run}: {error}")
            failed = True
    if records:
        found = list(records.values())
        if out is not None:
            table.merge_records(out, found)
        if markdown:
            print(table.to_markdown(found))
        else:
            Console(width=None if sys.stdout.isatty() else 160).print(table.to_rich(found))
        _console.print(table.made_on(found), highlight=False, soft_wrap=True)
    if failed:
        raise typer.Exit(2)


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


def _acting(planner: bool, device: str | None, backend: str | None) -> dict[str, Any]:
    """What the options change in the settings of a run that acts."""
    changes = {
        "planner.enabled": None if planner else False,
        "device": device,
        "planner.backend": backend,
    }
    return {key: value for key, value in changes.items() if value is not None}


def _check_target(out: Path, force: bool) -> None:
    """`DemonstrationError`, before anything is run, where `out` could not be saved."""
    from iqmpc.demos import DemonstrationError

    if out.exists() and not force:
        raise DemonstrationError(f"{out} exists; --force overwrites it")
    if out.suffix not in (".h5", ".hdf5") or not out.resolve().parent.is_dir():
        raise DemonstrationError(f"{out} must be an .h5 file in a folder that exists")


def _save(demonstrations: Any, out: Path) -> None:
    demonstrations.save(out)
    _console.print(
        f"wrote {len(demonstrations)} episodes to {out}, return {demonstrations.return_mean:.1f}"
    )


def _train_demonstrator(config: Any, run: Path) -> None:
    """Train an agent on the task's reward into `run`, or continue or take the one that is there."""
    from iqmpc import checkpoint

    resume = (run / "config.yaml").exists()
    if resume:
        there = checkpoint.load_config(run)
        if (there.task, there.learner.objective) != (config.task, "td"):
            raise ConfigError(
                f"{run} holds a run of {there.task.name} with learner.objective="
                f"{there.learner.objective}, not of {config.task.name} with td; give another "
                "--run-dir"
            )
        done = checkpoint.newest(run)[2]["env_steps"] if checkpoint.exists(run) else 0
        if done >= config.train.steps:
            return
        config = there.replace(
            {
                "train.steps": config.train.steps,
                "device": config.device,
                "planner.backend": config.planner.backend,
            }
        )
    _train(config, run, resume=resume)


def _demonstrator(
    kind: str, path: str | Path, env: Any, config: Any, seed: int, acting: dict[str, Any]
) -> Any:
    """Who acts in `env`: kind is sb3, run or td with its path, or "" for the task's own.

    `acting` changes settings of an agent.
    """
    from iqmpc.demos import make
    from iqmpc.envs import check_spaces

    obs_shape, action_dim = check_spaces(env, config.task.name)
    if not kind:
        return make.DEMONSTRATORS[config.task.name](env, seed)
    if kind == "sb3":
        from iqmpc.demos.sb3 import Sb3Policy

        if len(obs_shape) > 1:
            raise ConfigError(
                f"--policy sb3 acts on flat observations, {config.task.name} has images"
            )
        policy = Sb3Policy(path, *obs_shape, action_dim)
        return make.Demonstrator(
            policy,
            provenance={
                "demonstrator": "Stable-Baselines3 policy, deterministic",
                "policy": f"{Path(path).name}, sha256 {policy.digest}",
            },
        )
    import iqmpc

    agent = iqmpc.Agent.load(path, changes=acting, seed=seed)
    found = agent.model.obs_shape, agent.model.action_dim
    if found != (obs_shape, action_dim):
        raise ConfigError(
            f"{path}: the agent has observations {list(found[0])} and {found[1]} actions, the task "
            f"{list(obs_shape)} and {action_dim}"
        )
    return _run_demonstrator(Path(path), agent, agent.config.planner.enabled)


def _run_demonstrator(run: Path, agent: Any, planner: bool) -> Any:
    from iqmpc.demos import make

    return make.Demonstrator(
        make.AgentPolicy(agent),
        provenance={
            "demonstrator": "iqmpc agent",
            "run": run.resolve().name,
            "actor": "planner" if planner else "policy prior",
            "objective": agent.config.learner.objective,
            "trained_steps": str(agent.facts["env_steps"]),
        },
    )


def _busy_hint(config: Any) -> str | None:
    """What to say where others leave fewer cores than the default number of threads wants.

    Only said: a number of threads that followed the load would make results depend on it.
    """
    from iqmpc.threads import threads

    count = threads()
    try:
        cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    except (AttributeError, OSError):  # not Linux
        return None
    if config.threads is not None or count == 1 or cores - load > count - 0.5:
        return None
    return (
        f"the machine is busy (load {load:.1f} on {cores} cores): threads=1 may be faster here "
        f"than the default of {count}"
    )


def _rendering(task: Any) -> str:
    return "fast" if task.fast_render else "full"


def _drawn(task: Any, images: bool = False) -> dict[str, str]:
    """How the images of demonstrations were drawn, for their provenance."""
    return {"render": _rendering(task)} if images or task.obs == "pixels" else {}


def _demonstrations(config: Any, obs_shape: tuple[int, ...], action_dim: int) -> Any:
    from iqmpc.demos import Demonstrations
    from iqmpc.frames import is_image

    task = config.task.name
    images = is_image(obs_shape)
    if config.demos.path is None:
        if config.learner.objective == "td":
            return None
        if images:
            raise ConfigError(
                "no demonstrations of images ship: give some with demos.path=FILE (iqmpc demos "
                "record RUN FILE --obs pixels makes them from a run on the state)"
            )
        found = Demonstrations.packaged(task)
    else:
        found = Demonstrations.load(
            config.demos.path,
            task=task,
            obs_dim=None if images else obs_shape[0],
            action_dim=action_dim,
            facts=_task_facts(config),
        )
    # Images drawn otherwise could be told apart by that alone.
    drawn = found.provenance.get("render")
    if images and drawn not in (None, _rendering(config.task)):
        raise ConfigError(
            f"{config.demos.path} holds {drawn} renderings, task.fast_render="
            f"{str(config.task.fast_render).lower()} asks for {_rendering(config.task)} ones"
        )
    return found if config.demos.episodes is None else found.select(config.demos.episodes)


def _task_facts(config: Any) -> Any:
    """What the task says of the demonstrations' file, where its format can use it."""
    from iqmpc.demos import Facts

    keys = config.task.obs_keys
    return Facts(
        episodes=config.demos.episodes,
        task_obs_keys=None if keys is None else tuple(keys.split(",")),
    )


def _resumed(run: Path, changes: dict[str, Any]) -> Any:
    from iqmpc.checkpoint import load_config
    from iqmpc.compose import GROUPS
    from iqmpc.config import may_change

    for key in changes:
        if key in GROUPS or not may_change(key):
            raise ConfigError(
                f"{key} cannot change when a run is resumed (only train.* and what iqmpc train "
                "--help names)"
            )
    return load_config(run).replace(changes)


def _print_summary(summary: dict[str, Any], run: Path) -> None:
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
    _console.print(table)
    demonstrator = summary.get("demonstrator_return")
    if demonstrator is not None:
        share = "" if summary["ratio"] is None else f" ({100 * summary['ratio']:.0f} %)"
        _console.print(
            f"return {summary['return_mean']:.1f} beside the demonstrator's "
            f"{demonstrator:.1f}{share}",
            style="bold",
            highlight=False,
        )


def _print_error(error: Exception | str) -> None:
    _console.print(
        printable(f"iqmpc: {error}"),
        style="bold red",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _show_warning(message: Any, category: Any, *_: Any, **__: Any) -> None:
    if issubclass(category, (DeprecationWarning, FutureWarning)):
        return
    _console.print(
        printable(f"warning: {message}"),
        style="yellow",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
