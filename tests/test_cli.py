"""The command line as a user types it."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from iqmpc import Config, Demonstrations, __version__
from iqmpc.cli import main
from iqmpc.commands import train as train_command
from iqmpc.console import print_summary
from iqmpc.run_folder import RunFolder
from tests.runs import TINY_SIZES

TINY = [
    *TINY_SIZES,
    "planner.mode=eager",
    "learner.mode=eager",
    "task.episode_length=10",
    "train.steps=40",
    "train.random_steps=20",
    "train.initial_updates=2",
    "train.eval_every=20",
    "train.eval_episodes=1",
    "train.final_episodes=2",
    "train.checkpoint_every=20",
    "demos.episodes=3",
    "threads=1",
]


def iqmpc(*words, cwd=None, env=None):
    """The installed console script, in a process of its own."""
    program = Path(sys.executable).with_name("iqmpc")
    # Without what dm_control was told in this process.
    outside = {k: v for k, v in os.environ.items() if k != "MUJOCO_GL"}
    return subprocess.run(
        [str(program), *map(str, words)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**outside, **(env or {})},
    )


def run_main(monkeypatch, *words):
    """The same in this process, for errors: returns the exit code."""
    monkeypatch.setattr(sys, "argv", ["iqmpc", *map(str, words)])
    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "walker"
    done = iqmpc("train", "task=walker-walk", *TINY, f"run_dir={path}")
    assert done.returncode == 0, done.stderr
    return path, done


def test_train_ends_with_the_return_beside_the_demonstrators(run):
    path, done = run
    summary = json.loads((path / "summary.json").read_text())
    assert summary["task"] == "walker-walk" and summary["env_steps"] == 40
    expected = (
        f"return {summary['return_mean']:.1f} beside the demonstrator's "
        f"{summary['demonstrator_return']:.1f}"
    )
    assert expected in done.stderr.replace("\n", " ") and done.stdout == ""
    three = Demonstrations.packaged("walker-walk").select(3)
    assert summary["demonstrator_return"] == pytest.approx(three.return_mean)


def test_eval_prints_the_same_figures(run):
    path, _ = run
    done = iqmpc("eval", path, "--episodes", 2, "--json")
    assert done.returncode == 0, done.stderr
    figures, summary = json.loads(done.stdout), json.loads((path / "summary.json").read_text())
    of_training = {
        "wall_s",
        "env_restarts",
        "skipped_updates",
        "threads",
        "machine",
        "commit",
        *(k for k in summary if k.startswith("last5_")),
    }
    assert {k: figures[k] for k in summary if k not in of_training} == {
        k: v for k, v in summary.items() if k not in of_training
    }
    assert figures["wall_s"] == pytest.approx(summary["wall_s"], abs=5)
    assert figures["env_steps"] == 40 and figures["planner"] is True
    assert figures["reward_correlation"] is None
    prior = json.loads(
        iqmpc("eval", path, "--episodes", 2, "--json", "--no-planner", "--correlation").stdout
    )
    assert -1 <= prior["reward_correlation"] <= 1
    assert prior["planner"] is False and prior["return_mean"] != figures["return_mean"]


def test_table_measures_what_is_there_and_names_what_is_not(run, tmp_path):
    shutil.copytree(run[0], tmp_path / "runs" / "one")
    (tmp_path / "runs" / "none").mkdir()
    out = tmp_path / "table.json"
    words = ["table", "runs/*", "--out", out, "--markdown", "--episodes", 3]
    done = iqmpc(*words, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.count("runs/none is no run folder") == 1
    (record,) = json.loads(out.read_text())
    assert (record["task"], record["agent"], record["seed"]) == ("walker-walk", "planner", 0)
    assert (record["steps"], record["episodes"], record["threads"]) == (40, 3, 1)
    assert "train.initial_updates=2" in record["ablation"].split()
    assert -1 <= record["correlation"] <= 1 and record["commit"] and record["machine"]
    assert f"| {record['return_mean']:.1f} |" in done.stdout
    again = iqmpc(
        "eval",
        tmp_path / "runs" / "one",
        "--episodes",
        3,
        "--seed",
        10_000,
        "--correlation",
        "--json",
    )
    figures = json.loads(again.stdout)
    assert figures["return_mean"] == pytest.approx(record["return_mean"], abs=1e-4)
    assert figures["reward_correlation"] == pytest.approx(record["correlation"], abs=1e-4)
    # The same settings once more would be two records under one name.
    shutil.copytree(tmp_path / "runs" / "one", tmp_path / "runs" / "two")
    done = iqmpc("table", "runs/one", "runs/two", "--episodes", 3, cwd=tmp_path)
    assert done.returncode == 2 and "runs/two is left out: runs/one has the same" in done.stderr
    assert "walker-walk" in done.stdout and record["commit"] in done.stderr


@pytest.mark.parametrize(
    ("mode", "threads", "load", "said"),
    [
        ("compile", None, 0.2, False),
        ("compile", None, 0.6, True),
        ("eager", None, 3.0, True),
        ("eager", 2, 3.0, False),
        ("fused", None, 3.0, False),
    ],
)
def test_a_busy_machine_is_said_where_torch_learns(monkeypatch, mode, threads, load, said):
    monkeypatch.setattr("iqmpc.threads.threads", lambda: 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 9.0, 9.0), raising=False)
    hint = train_command._busy_hint(Config(threads=threads), mode)
    assert hint == (
        f"the machine is busy (load {load} on 2 cores): with learner.mode={mode}, threads=1 may be "
        "faster here than the default of 2"
        if said
        else None
    )


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, "20000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "passive"}, None)],
)
def test_torchs_threads_do_not_keep_the_cores(monkeypatch, given, spins):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that what follows is undone
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    run_main(monkeypatch, "--help")
    assert os.environ.get("GOMP_SPINCOUNT") == spins


def test_the_version():
    assert iqmpc("--version").stdout == f"iqmpc {__version__}\n"


@pytest.mark.parametrize(
    ("typed", "offered"),
    [("iqmpc d", {"demos", "doctor"}), ("iqmpc eval runs --ba", {"--backend"})],
)
def test_a_shell_completes_commands_and_options(typed, offered):
    words = typed.split()
    asked = {"COMP_WORDS": typed, "COMP_CWORD": str(len(words) - 1)}
    done = iqmpc(env={"_IQMPC_COMPLETE": "complete_bash", **asked})
    assert set(done.stdout.split()) == offered


def test_the_command_line_loads_torch_after_that():
    done = subprocess.run(
        [sys.executable, "-c", "import iqmpc.cli, sys; assert 'torch' not in sys.modules"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_resume_continues(run, tmp_path):
    path = tmp_path / "walker"
    shutil.copytree(run[0], path)
    straight = tmp_path / "straight"
    assert iqmpc("train", *TINY, "train.steps=60", f"run_dir={straight}").returncode == 0
    done = iqmpc("train", f"resume={path}", "train.steps=60")
    assert done.returncode == 0 and "continuing from step_000000040" in done.stderr
    summaries = [json.loads((p / "summary.json").read_text()) for p in (path, straight)]
    for summary in summaries:
        del summary["wall_s"]
        # The shorter run ended at step 40 where the longer one evaluated on the way.
        assert summary.pop("last5_return_mean") and summary.pop("last5_return_min")
    assert summaries[0] == summaries[1] and summaries[0]["env_steps"] == 60


def test_a_run_starts_from_another_wherever_it_lies(run, tmp_path):
    shutil.copytree(run[0], tmp_path / "old")
    Demonstrations.packaged("walker-walk").select(1).save(tmp_path / "more.h5")
    words = ["init=old", "init.checkpoint=40", "init.replay=true", "demos.add=more.h5,more.h5"]
    done = iqmpc("train", *TINY, *words, "run_dir=new", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = done.stderr.replace("\n", " ")
    assert "(step_000000040.safetensors: walker-walk, 40 steps) with 40 steps of behav" in said
    config = RunFolder(tmp_path / "new").load_config()
    assert config.init.path == str(tmp_path / "old")
    assert config.demos.add == ",".join([str(tmp_path / "more.h5")] * 2)
    done = iqmpc("train", f"resume={tmp_path / 'new'}", "train.steps=50")
    assert done.returncode == 0 and "starting from" not in done.stderr
    done = iqmpc("train", f"resume={tmp_path / 'new'}", "init=old", cwd=tmp_path)
    assert done.returncode == 2 and "init cannot change when a run is resumed" in done.stderr


def test_several_environments_train_and_continue(tmp_path):
    path = tmp_path / "run"
    done = iqmpc("train", *TINY, "train.num_envs=3", f"run_dir={path}")
    assert done.returncode == 0, done.stderr
    serial = tmp_path / "serial"
    done = iqmpc("train", *TINY, "train.num_envs=3", "train.env_workers=false", f"run_dir={serial}")
    assert done.returncode == 0, done.stderr
    summaries = [json.loads((p / "summary.json").read_text()) for p in (path, serial)]
    assert summaries[0] == {**summaries[1], "wall_s": summaries[0]["wall_s"]}
    assert summaries[0]["env_steps"] == 40 and summaries[0]["env_restarts"] == 0
    done = iqmpc("train", f"resume={path}", "train.steps=50", "train.num_envs=2")
    assert done.returncode == 2 and "num_envs cannot change when a run is resumed" in done.stderr
    done = iqmpc("train", f"resume={path}", "train.steps=50")
    assert done.returncode == 0, done.stderr
    assert iqmpc("eval", path, "--episodes", 1).returncode == 0


def test_record_makes_demonstrations_that_train_reads(run, tmp_path):
    path, _ = run
    out = tmp_path / "mine.h5"
    done = iqmpc("demos", "record", path, out, "--episodes", 2)
    assert done.returncode == 0, done.stderr
    recorded = Demonstrations.load(out, task="walker-walk", obs_dim=24, action_dim=6)
    assert len(recorded) == 2 and recorded.episodes[0].actions.shape == (10, 6)
    assert recorded.provenance["run"] == "walker" and np.isfinite(recorded.return_mean)
    again = iqmpc("demos", "record", path, out)
    assert again.returncode == 2 and "exists; --force overwrites it" in again.stderr
    none = iqmpc(
        "demos", "record", path, tmp_path / "none.h5", "--episodes", 1, "--min-return", 1e6
    )
    assert (
        none.returncode == 2 and "0 of 1 episodes were kept after 1 tries: 0 reached" in none.stderr
    )
    assert not (tmp_path / "none.h5").exists()
    trained = iqmpc(
        "train",
        *TINY[:-2],
        "threads=1",
        "train.steps=20",
        f"demos.path={out}",
        f"run_dir={tmp_path / 'second'}",
    )
    assert trained.returncode == 0, trained.stderr


def test_plot_draws_a_curve_and_writes_its_points(run, tmp_path):
    path, _ = run
    out = tmp_path / "curve.png"
    done = iqmpc("plot", path, "--out", out)
    assert done.returncode == 0, done.stderr
    assert out.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    lines = (tmp_path / "curve.csv").read_text().splitlines()
    assert lines[0] == "task,seed,env_steps,minutes,kind,return"
    rows = [line.split(",") for line in lines[1:]]
    assert {r[4] for r in rows} == {"training", "evaluation"} and rows[0][:3] == [
        "walker-walk",
        "0",
        "10",
    ]
    bad = iqmpc("plot", path, "--out", "curve.doc")
    assert bad.returncode == 2 and "must be a .png, .pdf or .svg file" in bad.stderr


def test_video_is_written_or_says_what_is_missing(run, tmp_path):
    path, _ = run
    out = tmp_path / "walk.mp4"
    done = iqmpc("eval", path, "--episodes", 1, "--video", out)
    if done.returncode == 0:
        import imageio.v3 as imageio

        frames = imageio.imread(out)
        assert frames.shape == (10, 256, 256, 3) and frames.std() > 5
    else:  # a machine without any GL library
        assert done.returncode == 2 and "rendering needs EGL or OSMesa" in done.stderr
        assert "apt-get install" in done.stderr and not out.exists()


def test_doctor_names_backends_and_reasons():
    done = iqmpc("doctor", env={"COLUMNS": "200"})
    assert done.returncode == 0, done.stderr
    for word in ("torch", "reference", "cpu", "triton", "cuda", "avx", "fused", "graph"):
        assert word in done.stdout
    assert "not implemented" in done.stdout  # not every operation has every backend
    assert "sees no CUDA device" in " ".join(done.stdout.split()) or "sm_" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "task=walker-wlak"], "did you mean 'walker-walk'?"),
        (["train", "learner.bach=3"], "did you mean 'learner.batch'?"),
        (["train", "task=hopper-hop"], "walker-walk"),  # nothing packaged: says what is
        (["train", "demos.path=nowhere.h5"], "nowhere.h5"),
        (["train", "demos.path=demos.pkl"], "pickle"),
        (["train", "demos.episodes=5000"], "5000"),
        (["train", "task=walker-run", "demos.path=@walker-walk"], "walker-run"),
        (["train", "threads=0"], "threads must lie in [1, 1024], got 0"),
        pytest.param(
            ["train", "device=cuda"],
            "torch sees no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU"),
        ),
        (
            ["train", "planner.backend=cuda"],
            "planner.backend must be one of auto, reference, cpu, triton, got 'cuda'",
        ),
        (
            ["train", "planner.backend=cpu", "planner.mode=compile"],
            "planner.backend=cpu compiles nothing, got planner.mode=compile",
        ),
        (["train", "resume=nowhere"], "nowhere is no run folder"),
        (["train", "seed=-1"], "seed must lie in [0, 2**32), got -1"),
        (["train", "task.episode_length=0"], "task.episode_length must be at least 1, got 0"),
        (["train", "task.episode_length=2"], "learner.horizon must be at most task.episode_length"),
        (["train", "train.capacity=300"], "train.capacity must be above task.episode_length"),
        (["train", "run_dir=/proc/nowhere"], "/proc/nowhere"),
        (["plot", "nowhere", "--out", "a.doc"], "must be a .png, .pdf or .svg file"),
        (["table", "nowhere"], "nowhere is no run folder"),
        (
            ["table", "nowhere", "--out", "nowhere/a.json"],
            "nowhere/a.json is in no folder that exists",
        ),
        (["demos", "record", "nowhere", "nowhere/a.h5"], "in a folder that exists"),
        (["eval", "nowhere"], "nowhere is no run folder"),
        (["eval", "nowhere", "--video", "a.gif"], "--video must name an .mp4 file, got a.gif"),
        (["demos", "record", "nowhere", "a.h5"], "nowhere is no run folder"),
    ],
)
def test_errors_are_one_message_and_exit_code_2(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    from iqmpc.demos.demonstrations import packaged_path

    words = [w.replace("@walker-walk", str(packaged_path("walker-walk"))) for w in words]
    assert run_main(monkeypatch, *words) == 2
    said = capsys.readouterr().err
    assert message in said.replace("\n", " ") and "Traceback" not in said
    assert not (tmp_path / "runs").exists()


def test_relative_demonstrations_are_found_from_anywhere(run, tmp_path):
    Demonstrations.packaged("walker-walk").select(2).save(tmp_path / "mine.h5")
    words = ["train", *TINY, "demos.path=mine.h5", "demos.episodes=null", "train.steps=20"]
    assert iqmpc(*words, "run_dir=mine", cwd=tmp_path).returncode == 0
    done = iqmpc("train", "resume=mine/../mine", "train.steps=30", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    elsewhere = iqmpc("train", f"resume={tmp_path / 'mine'}", "train.steps=40", cwd="/")
    assert elsewhere.returncode == 0, elsewhere.stderr


def test_resume_refuses_what_would_change_the_method(run, monkeypatch, capsys):
    assert run_main(monkeypatch, "train", f"resume={run[0]}", "learner.batch=3") == 2
    assert "learner.batch cannot change when a run is resumed" in capsys.readouterr().err


def test_pixels_from_the_state_agent_to_an_agent_on_pixels(run, tmp_path):
    path, out = run[0], tmp_path / "pixels.h5"
    done = iqmpc("demos", "record", path, out, "--episodes", 3, "--obs", "pixels", "--fast-render")
    if done.returncode == 2 and "rendering needs EGL or OSMesa" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    recorded = Demonstrations.load(out, task="walker-walk")
    assert recorded.episodes[0].observations.shape == (11, 3, 64, 64)
    assert recorded.provenance["render"] == "fast"
    info = iqmpc("demos", "info", out, "--json")
    assert json.loads(info.stdout)["obs_shape"] == [9, 64, 64]

    settings = ["preset=pixels", *TINY, f"demos.path={out}"]
    other = iqmpc("train", *settings, f"run_dir={tmp_path / 'other'}")
    assert other.returncode == 2
    assert "holds fast renderings, task.fast_render=false asks for full ones" in other.stderr
    second = tmp_path / "second"
    done = iqmpc("train", *settings, "task.fast_render=true", f"run_dir={second}")
    assert done.returncode == 0, done.stderr
    assert "fast_render: true" in (second / "config.yaml").read_text()
    done = iqmpc("eval", second, "--episodes", 1, "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["env_steps"] == 40
    done = iqmpc("demos", "record", second, tmp_path / "again.h5", "--episodes", 1)
    assert done.returncode == 0, done.stderr
    again = Demonstrations.load(tmp_path / "again.h5")
    assert again.obs_shape == (9, 64, 64) and again.provenance["render"] == "fast"
    twice = iqmpc("demos", "record", second, tmp_path / "no.h5", "--obs", "pixels")
    assert twice.returncode == 2 and "is for runs on the state of a DMControl task" in twice.stderr


def test_pixels_without_their_demonstrations(run, tmp_path):
    done = iqmpc("train", "preset=pixels", *TINY, f"run_dir={tmp_path / 'run'}")
    assert done.returncode == 2
    if "rendering needs EGL or OSMesa" not in done.stderr:
        assert "no demonstrations of images ship" in done.stderr
    bad = iqmpc("demos", "record", run[0], tmp_path / "no.h5", "--fast-render")
    assert bad.returncode == 2 and "--fast-render needs --obs pixels" in bad.stderr
    bad = iqmpc("demos", "record", run[0], tmp_path / "no.h5", "--obs", "depth")
    assert bad.returncode == 2 and "--obs must be pixels, got 'depth'" in bad.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_prints_the_command_that_continues(number, tmp_path):
    """In one line that can be pasted, however narrow the terminal and odd the path."""
    path = tmp_path / "a folder, with (a long) name that does not fit into the width of a terminal"
    program = Path(sys.executable).with_name("iqmpc")
    never = [f"train.{key}=100000" for key in ("steps", "checkpoint_every", "eval_every")]
    words = [*TINY, *never, f"run_dir={path}"]
    process = subprocess.Popen(
        [str(program), "train", *words],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "80", "MUJOCO_GL": "disabled"},
    )
    metrics, deadline = path / "metrics.csv", time.monotonic() + 60
    while time.monotonic() < deadline:
        if metrics.exists() and len(metrics.read_text().splitlines()) > 4:
            break
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number, said
    (line,) = (x for x in said.splitlines() if x.startswith("interrupted; continue with: "))
    command = shlex.split(line.removeprefix("interrupted; continue with: "))
    assert command == ["iqmpc", "train", f"resume={path}"]
    done = iqmpc(*command[1:], "train.steps=60")
    assert done.returncode in (0, 2), done.stderr
    assert "continuing from step_" in done.stderr or "train.steps must be at least" in done.stderr


def test_runs_that_start_in_the_same_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda _: "20260101-120000")
    first = RunFolder.unused(Config()).path
    assert not first.exists()
    claimed = [RunFolder.unused(Config(), claim=True).path for _ in range(3)]
    assert [p.name for p in claimed] == [f"20260101-120000-seed0{end}" for end in ("", "-2", "-3")]
    assert claimed[0] == first and all(p.is_dir() for p in claimed)
    assert RunFolder.unused(Config()).path.name.endswith("-4")


def test_a_run_is_resumed_where_its_data_have_moved(run, tmp_path):
    path = tmp_path / "walker"
    shutil.copytree(run[0], path)
    Demonstrations.packaged("walker-walk").save(tmp_path / "moved.h5")
    done = iqmpc(
        "train",
        f"resume={path}",
        "train.steps=50",
        "demos.path=moved.h5",
        "device=cpu",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "moved.h5") in (path / "config.yaml").read_text()
    other = iqmpc("train", f"resume={path}", "train.steps=60", "demos.episodes=2")
    assert other.returncode == 2 and "demos.episodes cannot change" in other.stderr


def test_a_run_is_recorded_on_another_device_and_backend(run, tmp_path):
    out = tmp_path / "a.h5"
    for words in (
        ["record", run[0], out],
        [
            "make",
            "walker-walk",
            "--policy",
            f"run:{run[0]}",
            "--out",
            tmp_path / "b.h5",
            "task.episode_length=10",
        ],
    ):
        done = iqmpc("demos", *words, "--episodes", 1, "--device", "cpu", "--backend", "reference")
        assert done.returncode == 0, done.stderr


def test_a_summary_of_costs_has_no_percentage(capsys):
    print_summary(
        {"task": "pendulum", "return_mean": -200.0, "demonstrator_return": -150.0, "ratio": None},
        Path("runs/x"),
    )
    assert "return -200.0 beside the demonstrator's -150.0\n" in capsys.readouterr().err


def test_a_damaged_line_of_metrics_costs_no_run(run, tmp_path):
    path = tmp_path / "walker"
    shutil.copytree(run[0], path)
    metrics = path / "metrics.csv"
    metrics.write_bytes(metrics.read_bytes().replace(b"20,2,2", b"\xff0,2,2", 1))
    drawn = iqmpc("plot", path, "--out", tmp_path / "a.png")
    assert drawn.returncode == 0 and "damaged lines are left out" in drawn.stderr, drawn.stderr
    done = iqmpc("train", f"resume={path}", "train.steps=50")
    assert done.returncode == 0 and "damaged lines, now in" in done.stderr, done.stderr
