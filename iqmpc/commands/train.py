"""`iqmpc train`: train an agent, or go on with a run."""

from __future__ import annotations

import os
import shlex
import signal
from pathlib import Path
from typing import Annotated, Any

import typer

from iqmpc.config import Config
from iqmpc.console import console, print_summary
from iqmpc.errors import Interrupted
from iqmpc.progress import TrainingDisplay

_OVERRIDES_HELP = "Settings as key=value: task=cheetah-run train.steps=50000 learner.batch=128"


def train(
    overrides: Annotated[list[str] | None, typer.Argument(help=_OVERRIDES_HELP)] = None,
    multirun: Annotated[
        bool,
        typer.Option("--multirun", "-m", help="A run for each combination: -m seed=1,2,3"),
    ] = False,
) -> None:
    """Train an agent; ends with an evaluation beside the demonstrator's return.

    `resume=RUN` continues a run. What it learns may then not be changed: only train.* (but not
    train.num_envs), where the data lie (demos.path), which are added to them (demos.add), and how
    it is computed (threads, device, learner.mode, learner.precision, learner.matmul, and the
    planner's backend, precision, mode, capture and threads). `init=RUN` starts a new run from
    another's agent.

    With -m, settings have several values and `hydra/launcher=joblib|submitit_local|submitit_slurm|
    ray` says where the runs are made; the same command with `hydra.sweep.dir=SWEEP` continues them.
    """
    if multirun:
        from iqmpc.commands.sweep import sweep

        sweep(overrides or [])
        return
    from iqmpc.composition import compose, parse, resumed
    from iqmpc.run_folder import RunFolder

    words = parse(overrides or [])
    if resume := "resume" in words:
        folder = RunFolder(str(words.pop("resume")))
        config, run = resumed(folder.load_config(), words), folder.path
    else:
        config, run = compose(overrides or []), None
    config = anywhere(config, Path())
    print_summary(*train_run(config, run, resume=resume))


def anywhere(config: Config, base: Path) -> Config:
    """The settings with whole paths, from the folder `base`: a run may be continued elsewhere."""
    from iqmpc.agent_file import is_packaged

    given = {
        "demos.path": [config.demos.path],
        "demos.add": (config.demos.add or "").split(","),
        "init.path": [] if is_packaged(config.init.path or "") else [config.init.path],
    }
    return config.replace(
        {
            key: ",".join(str(Path(base, path).resolve()) for path in paths if path)
            for key, paths in given.items()
            if any(paths)
        }
    )


def train_run(
    config: Config, run: Path | None, *, resume: bool, name: str | None = None
) -> tuple[dict[str, Any], Path]:
    """Train to the end with progress shown. Returns the summary and the run folder.

    Without `run` it is the settings' own, or a new one that is made when everything fits. `name` is
    the run's among others beside it: it begins every line, and there is no bar.
    """
    from iqmpc.trainer import Trainer

    with TrainingDisplay(config.train.steps, console, name=name) as display:
        trainer = Trainer(
            config,
            run=run,
            resume=resume,
            on_progress=display.update,
            on_message=display.message,
        )
        run = trainer.claim_folder()
        parameters = sum(p.numel() for p in trainer.learner.model.parameters())
        acting = (
            f"agent {config.agent.name}"
            if config.is_baseline
            else f"planner {trainer.agent.planner.backend}"
        )
        display.message(
            f"{config.task.name}: {parameters:,} parameters on {trainer.device}, {acting}, run "
            f"folder {run}"
        )
        hint = _busy_hint(config, trainer.learner.mode)
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


def _busy_hint(config: Config, mode: str) -> str | None:
    """What to say where others leave fewer cores than the default number of threads wants.

    `mode` is the learner's. Torch gives each thread its part of an update beforehand, and all wait
    for the one without a core; the fused update was measured to be no slower than on one thread.
    Only said: a number of threads that followed the load would make results depend on it.
    """
    from iqmpc.threads import threads

    count = threads()
    try:
        cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    except (AttributeError, OSError):  # not Linux
        return None
    if mode not in ("compile", "eager") or config.threads is not None or count == 1:
        return None
    if cores - load > count - 0.5:
        return None
    return (
        f"the machine is busy (load {load:.1f} on {cores} cores): with learner.mode={mode}, "
        f"threads=1 may be faster here than the default of {count}"
    )
