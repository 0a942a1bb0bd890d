"""Many runs by one command, on Hydra's launchers."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from iqmpc.commands import sweep as command
from iqmpc.commands import train as train_command
from iqmpc.commands.sweep import sweep
from iqmpc.composition import parse
from iqmpc.errors import ConfigError, IqmpcError
from iqmpc.plot import read_curve
from iqmpc.run_folder import RunFolder
from iqmpc.table import find_runs
from iqmpc.trainer import Trainer
from tests.runs import TINY_SIZES, interrupted_at, rows_of

SIGTERM = 15
POINT = [
    "task=gym",
    "task.env_id=tests.conftest:PointEnv",
    "learner.objective=td",
    "task.episode_length=20",
    *TINY_SIZES,
    "learner.mode=eager",
    "train.steps=80",
    "train.random_steps=20",
    "train.initial_updates=2",
    "train.eval_every=20",
    "train.checkpoint_every=20",
    "train.final_episodes=1",
    "train.loggers=[csv]",
    "threads=1",
]
PLUGINS = {"joblib": "joblib", "submitit_local": "submitit", "ray": "ray"}


def into(folder, *words):
    return [f"hydra.sweep.dir={folder}", *POINT, *words]


def names(folder):
    return [str(run.relative_to(folder)) for run in find_runs([str(folder)])]


@pytest.fixture
def trained(monkeypatch):
    """In place of training: what it is called with; returns the seed."""
    calls = []

    def train_run(config, run, *, resume, name):
        calls.append((name, config, run, resume))
        if config.seed == 13:
            raise ConfigError("thirteen")
        if config.seed == 14:
            raise ZeroDivisionError
        RunFolder(run).save_config(config, new=not resume)
        summary = {"return_mean": float(config.seed)}
        RunFolder(run).save_summary(summary)
        return summary, run

    monkeypatch.setattr(command, "train_run", train_run)
    return calls


def test_each_combination_is_a_run_in_a_folder_of_its_own(tmp_path, trained):
    folder = tmp_path / "a sweep's"
    sweep(into(f'"{folder}"', "seed=1,2", "learner.lr=1e-3,1e-4", "env_id=tests.runs:Marked"))
    made = {(name, c.seed, c.learner.lr, run, resume) for name, c, run, resume in trained}
    assert made == {
        (f"{text},seed={s}", s, lr, folder / f"{text},seed={s}", False)
        for s in (1, 2)
        for lr, text in ((1e-3, "learner.lr=0.001"), (1e-4, "learner.lr=0.0001"))
    }
    configs = [c for _, c, _, _ in trained]
    assert {c.task.env_id for c in configs} == {"tests.runs:Marked"}
    assert {c.learner.objective for c in configs} == {"td"}
    assert names(folder) == sorted({name for name, *_ in trained})


def test_files_are_those_of_the_folder_where_the_sweep_was_begun(tmp_path, monkeypatch, trained):
    monkeypatch.chdir(tmp_path)
    sweep(into("sweep", "seed=1,2", "init=mine.iqmpc", "demos.path=mine.h5"))
    assert [c.init.path for _, c, _, _ in trained] == [str(tmp_path / "mine.iqmpc")] * 2
    assert [c.demos.path for _, c, _, _ in trained] == [str(tmp_path / "mine.h5")] * 2


def test_ended_runs_are_kept_and_new_ones_join(tmp_path, trained):
    sweep(into(tmp_path, "seed=1,2"))
    sweep(into(tmp_path, "seed=2,1,3"))
    assert [name for name, *_ in trained] == ["seed=1", "seed=2", "seed=3"]
    sweep(into(tmp_path, "seed=1,3", "train.steps=100"))
    assert [(name, resume) for name, _, _, resume in trained[3:]] == [
        ("seed=1", True), ("seed=3", True),
    ]  # fmt: skip


def test_a_failing_run_costs_no_other(tmp_path, trained):
    with pytest.raises(IqmpcError, match="2 runs have failed.*: seed=13; seed=14\ngo on with them"):
        sweep(into(tmp_path, "seed=13,14,1"))
    assert names(tmp_path) == ["seed=1"]
    assert (tmp_path / "seed=13" / "error.txt").read_text() == "thirteen\n"
    assert "ZeroDivisionError" in (tmp_path / "seed=14" / "error.txt").read_text()
    sweep(into(tmp_path, "seed=1,2"))  # does not speak of them any more
    assert names(tmp_path) == ["seed=1", "seed=2"]


def test_a_foreign_run_is_named_and_left_alone(tmp_path, trained):
    sweep(into(tmp_path, "seed=1,2"))
    before = (tmp_path / "seed=1" / "config.yaml").read_bytes()
    with pytest.raises(IqmpcError, match="2 runs have failed"):
        sweep(into(tmp_path, "seed=1,2", "learner.lr=0.5"))
    assert (tmp_path / "seed=1" / "error.txt").read_text() == (
        f"{tmp_path}/seed=1 holds another run (learner.lr is 0.5, was 0.0003): move it away, or "
        "give another hydra.sweep.dir\n"
    )
    assert (tmp_path / "seed=1" / "config.yaml").read_bytes() == before and len(trained) == 2


def test_an_interrupted_sweep_goes_on(tmp_path, monkeypatch, capsys):
    """The first run ended, the second in the middle, the third not begun: as never interrupted."""
    words = "seed=1,2,3"
    sweep(into(tmp_path / "whole", words))
    init = Trainer.__init__

    def interrupting(self, config, *args, **options):
        init(self, config, *args, **options)
        if config.seed == 2:
            interrupted_at(self, 50, SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "__init__", interrupting)
        with pytest.raises(SystemExit):
            sweep(into(tmp_path / "cut", words))
    said = capsys.readouterr().err
    assert re.search(rf"continue with: iqmpc train -m task=gym .*{words} hydra.sweep.dir=", said)
    assert names(tmp_path / "cut") == ["seed=1", "seed=2"]
    ended = (tmp_path / "cut" / "seed=1" / "summary.json").stat().st_mtime_ns
    sweep(into(tmp_path / "cut", words))
    said = capsys.readouterr().err
    assert "seed=1: has ended, and is kept" in said
    assert "seed=2: continuing from step_000000040.safetensors" in said
    assert (tmp_path / "cut" / "seed=1" / "summary.json").stat().st_mtime_ns == ended
    for run in find_runs([str(tmp_path / "cut")]):
        assert rows_of(run) == rows_of(tmp_path / "whole" / run.name)
        assert read_curve(run).seed == int(run.name[-1])


@pytest.mark.slow
@pytest.mark.parametrize("launcher", PLUGINS)
def test_launchers(tmp_path, launcher):
    """Each of Hydra's own, as a user calls it."""
    if importlib.util.find_spec("hydra_plugins") is None or (
        importlib.util.find_spec(f"hydra_plugins.hydra_{PLUGINS[launcher]}_launcher") is None
    ):
        pytest.skip(f"no launcher {launcher} here")
    local = ["+hydra.launcher.ray.init.num_cpus=2"] if launcher == "ray" else []
    done = subprocess.run(
        [sys.executable, "-m", "iqmpc.cli", "train", "-m", f"hydra/launcher={launcher}"]
        + [*local, *into(tmp_path / "sweep", "seed=1,2")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    if launcher == "ray" and "the sweep could not be made" in done.stderr:
        pytest.skip("no local cluster of Ray starts here")
    assert done.returncode == 0, done.stderr
    assert names(tmp_path / "sweep") == ["seed=1", "seed=2"]
    assert all(rows_of(run)[-1]["env_steps"] == "80" for run in (tmp_path / "sweep").glob("seed*"))
    assert done.stdout == "" or launcher == "ray"  # whose workers' lines come so


@pytest.mark.parametrize(
    "words, said",
    [
        (["seed=1"], "a sweep needs several values of something, such as seed=1,2,3"),
        (["sed=1,2"], "unknown setting 'sed'"),
        (["seed=1,-2"], r"seed must lie in \[0, 2\*\*32\), got -2"),
        (["seed=1,2", "learner.bach=3"], "did you mean 'learner.batch'"),
        (["task=walker-walk,walker-wakl"], "did you mean 'walker-walk'"),
        (["seed=1,2", "run_dir=a"], "run_dir is of a single run: hydra.sweep.dir=FOLDER names"),
        (["seed=1,2", "resume=a"], "resume is of a single run"),
        (["seed=1,2", "seed"], r"cannot read 'seed': expected key=value"),
        (["seed=1,2", "~seed"], "expected key=value, got '~seed'"),
        (["seed=1,2", "hydra.sweep.dir=a/${now:%Y}"], "hydra.sweep.dir must be a plain path"),
        (["seed=1,2", "hydra/launcher=jobs"], "Could not find 'hydra/launcher/jobs'"),
        (["seed=1,2", "hydra.launcher.none=3"], "hydra.launcher.none"),
    ],
)
def test_bad_words_are_told_before_anything_is_made(tmp_path, monkeypatch, trained, words, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=said):
        sweep(words)
    assert not trained and not list(tmp_path.rglob("config.yaml"))


@pytest.mark.parametrize(
    "word, extra",
    [
        ("hydra/launcher=joblib", "joblib"),
        ("hydra/launcher=submitit_slurm", "submitit"),
        ("hydra/launcher=ray", "ray"),
        ("hydra/sweeper=optuna", "optuna"),
    ],
)
def test_what_is_not_installed_is_an_extra(monkeypatch, word, extra):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=re.escape(f"pip install 'iqmpc[{extra}]'")):
        sweep(["seed=1,2", word])


def test_a_launcher_that_fails_is_one_message(tmp_path, monkeypatch, trained):
    def unreachable(*_, **__):
        raise ConnectionError("no such host")

    monkeypatch.setattr("hydra.main", lambda **_: lambda task: unreachable)
    with pytest.raises(IqmpcError, match="the sweep could not be made: ConnectionError: no such"):
        sweep(into(tmp_path, "seed=1,2"))


def test_a_runs_folder_is_no_sweeps(tmp_path, trained):
    RunFolder(tmp_path).config.write_text("")
    with pytest.raises(ConfigError, match=f"{tmp_path} is the folder of a run, not of a sweep"):
        sweep(into(tmp_path, "seed=1,2"))


def test_several_values_ask_for_a_sweep(monkeypatch):
    with pytest.raises(ConfigError, match="one value; several need -m"):
        parse(["seed=1,2"])
    asked = []
    monkeypatch.setattr(command, "sweep", asked.append)
    train_command.train(["seed=1,2"], multirun=True)
    assert asked == [["seed=1,2"]]
