"""docs/results/run.py: many runs, unattended, whatever stops them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from iqmpc import run_list as module
from iqmpc.composition import compose
from iqmpc.errors import ConfigError

RESULTS = Path(__file__).parents[3] / "docs" / "results"
PROGRAM = RESULTS / "run.py"
if not PROGRAM.exists():
    pytest.skip("docs/ is not beside the tests", allow_module_level=True)

TINY = (
    "model=tiny model.encoder_dim=16 model.hidden_dim=16 model.latent_dim=16 planner.samples=16 "
    "planner.elites=4 planner.policy_trajectories=4 planner.iterations=1 learner.mode=eager "
    "learner.batch=8 task.episode_length=10 train.random_steps=20 train.initial_updates=2 "
    "train.eval_every=100 train.eval_episodes=1 train.final_episodes=2 train.checkpoint_every=20 "
    "threads=1"
)

# Stands in for `iqmpc train`: writes what a run folder has, and fails or waits as it is told.
FAKE = """
import pathlib, sys, time
given = dict(word.split("=", 1) for word in sys.argv[2:])
run = pathlib.Path(given.get("run_dir") or given["resume"])
print("resumed" if "resume" in given else "new", flush=True)
(run / "config.yaml").write_text(given.get("do", ""))
do = given.get("do") or "finish"
if do == "sleep" and "resume" not in given:
    time.sleep(60)
if do == "fail":
    sys.exit(3)
(run / "summary.json").write_text("{}")
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    path = tmp_path / "fake.py"
    path.write_text(FAKE)
    monkeypatch.setattr(module, "IQMPC", [sys.executable, str(path)])


def log(folder):
    return (folder / "log.txt").read_text().split()


def wait_for(condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "took too long"
        time.sleep(0.05)


def test_finished_runs_are_left_cut_off_ones_continued_and_failures_named(fake, tmp_path):
    for name in ("finished", "cut"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").touch()
    (tmp_path / "finished" / "summary.json").write_text("{}")
    runs = {"finished": [], "cut": ["seed=1"], "failing": ["do=fail"], "new": ["seed=2"]}
    wrong = module.make(runs, tmp_path, jobs=2)
    assert wrong == [f"failing failed: see {tmp_path / 'failing' / 'log.txt'}"]
    assert not (tmp_path / "finished" / "log.txt").exists()
    assert log(tmp_path / "cut") == ["resumed"] and log(tmp_path / "new") == ["new"]


def test_no_more_runs_at_a_time_than_jobs(fake, tmp_path, monkeypatch):
    at_once = []
    original = module.start

    def start(folder, words):
        at_once.append(
            sum(
                (tmp_path / n / "log.txt").exists() and not (tmp_path / n / "summary.json").exists()
                for n in "abcd"
            )
        )
        return original(folder, words)

    monkeypatch.setattr(module, "start", start)
    assert module.make(dict.fromkeys("abcd", ["seed=1"]), tmp_path, jobs=2) == []
    assert len(at_once) == 4 and max(at_once) <= 1  # before each, at most one other


def test_a_run_that_another_process_makes_is_let_be(fake, tmp_path):
    left = module.start(tmp_path / "run", ["do=sleep"])
    try:
        wait_for((tmp_path / "run" / "config.yaml").exists)
        assert module.make({"run": []}, tmp_path, jobs=1) == [
            "run is being made already: a process holds its log.txt"
        ]
    finally:
        left.kill()
        left.wait()
    assert module.make({"run": []}, tmp_path, jobs=1) == []
    assert log(tmp_path / "run") == ["new", "resumed"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- {name: a}", "a run has a name and overrides"),
        ("- {name: ../a, overrides: ''}", "no name for a folder"),
        ("- {name: a, overrides: ''}\n- {name: a, overrides: ''}", "there twice"),
        ("- {name: a, overrides: run_dir=b}", "must leave run_dir and resume"),
    ],
)
def test_a_wrong_list_is_refused(tmp_path, text, message):
    path = tmp_path / "runs.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        module.read(path)


def test_the_committed_list_is_of_runs_with_two_seeds_each():
    runs = module.read(RESULTS / "runs.yaml")
    seeds = {}
    for name, words in runs.items():
        config = compose(words)
        assert name == f"{config.task.name}-seed{config.seed}"
        assert config.train.final_episodes >= 20
        seeds.setdefault(config.task.name, set()).add(config.seed)
    assert all(len(found) >= 2 for found in seeds.values())


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_stopped_in_the_middle_it_goes_on_and_ends_with_the_table(tmp_path, how):
    (tmp_path / "runs.yaml").write_text(
        f"- {{name: one, overrides: 'seed=1 train.steps=300 {TINY}'}}\n"
        f"- {{name: two, overrides: 'seed=2 train.steps=300 {TINY}'}}\n"
    )
    words = [
        sys.executable,
        PROGRAM,
        "--runs",
        "runs.yaml",
        "--into",
        "made",
        "--jobs",
        "2",
        "--table",
        "table.json",
        "--episodes",
        "2",
    ]
    made = tmp_path / "made"
    process = subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: list(made.glob("*/checkpoints/step_*")) or process.poll() is not None)
    process.send_signal(how)
    _, said = process.communicate(timeout=60)
    assert process.returncode == (143 if how == signal.SIGTERM else 1), said
    assert not (tmp_path / "table.json").exists()
    unfinished = [name for name in ("one", "two") if not (made / name / "summary.json").exists()]
    assert unfinished
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    records = json.loads((tmp_path / "table.json").read_text())
    assert [(r["seed"], r["steps"], r["episodes"]) for r in records] == [(1, 300, 2), (2, 300, 2)]
    assert all(r["correlation"] is not None for r in records) and "mean of 2" in done.stdout
    assert any("continuing from step_" in (made / n / "log.txt").read_text() for n in unfinished)
    # Nothing is left to be made, and what was measured is kept.
    before = {p: os.stat(p).st_mtime for p in made.rglob("*") if p.is_file()}
    assert subprocess.run(words, cwd=tmp_path, capture_output=True).returncode == 0
    assert before == {p: os.stat(p).st_mtime for p in made.rglob("*") if p.is_file()}
    assert json.loads((tmp_path / "table.json").read_text()) == records
