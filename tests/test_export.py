"""Agents as files: what they hold, who takes them, and that C++ acts as Python does."""

import dataclasses
import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from typer.testing import CliRunner

from iqmpc import Agent, WorldModel, agent_file, cli, compose, evaluate, paths
from iqmpc.config import Config
from iqmpc.envs import make_env
from iqmpc.envs.description import describe
from iqmpc.errors import CheckpointError, ConfigError
from iqmpc.export import export, export_onnx, exported
from iqmpc.run_folder import RunFolder
from iqmpc.task_interface import TaskInterface
from tests.runs import train

_C = pytest.importorskip("iqmpc._C")

ROOT = Path(__file__).parents[1]
FACTS = dict.fromkeys(agent_file.FACTS)
INTERFACE = TaskInterface(
    tuple("abcde"), ("x", "y", "z"), (-1.0, -2.0, 0.0), (1.0, 2.0, 4.0), 2, 0.04
)


def trained(folder, config, env, demonstrations):
    run = folder / "run"
    train(config, env, demonstrations, run)
    return run


@pytest.fixture
def run(tmp_path, small_config, point_env, point_demonstrations):
    return trained(tmp_path, small_config, point_env, point_demonstrations)


def random_agent(*, termination=False, obs=5, actions=3, **planner) -> Agent:
    """With activations around 1 and nothing trained."""
    torch.manual_seed(5)
    config = Config.from_dict(
        {
            "task": {"name": "arm", "episode_length": 100},
            "model": {"encoder_dim": 24, "hidden_dim": 40, "latent_dim": 32, "critics": 3},
            "planner": {
                "samples": 40,
                "elites": 8,
                "policy_trajectories": 6,
                "iterations": 3,
                "threads": 1,
                **planner,
            },
            "seed": 3,
        }
    )
    model = WorldModel(obs, actions, config.model, termination=termination)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return Agent(model, config, seed=config.seed)


def saved(path, agent, **spoilt) -> Path:
    found = exported(agent, INTERFACE, FACTS)
    agent_file.save(path, found._replace(about={**found.about, **spoilt}))
    return path


# ---- The file -----------------------------------------------------------------------------------


def test_a_file_acts_as_its_run(run, point_env):
    file = run.parent / "agent.iqmpc"
    found = export(run, file)
    assert found.about["task"] == "point" and found.provenance["run"] == "run"
    assert found.provenance["env_steps"] == 100
    summary = json.loads(RunFolder(run).summary.read_text())
    assert found.provenance["evaluation"]["return_mean"] == summary["return_mean"]
    one, two = Agent.load(run), Agent.load(file)
    assert {**one.facts, "checkpoint": "agent.iqmpc"} == two.facts
    for agent in (one, two):
        agent.reset()
    for _ in range(20):
        obs = np.random.default_rng(1).standard_normal(2).astype(np.float32)
        assert np.array_equal(one.act(obs, explore=True), two.act(obs, explore=True))
    episodes = [evaluate(agent, point_env, episodes=1).returns for agent in (one, two)]
    assert episodes[0] == episodes[1]


def test_a_file_is_safetensors_without_what_only_training_needs(tmp_path):
    agent = random_agent(termination=True)
    file = saved(tmp_path / "agent.iqmpc", agent)
    with safetensors.safe_open(file, "pt") as opened:
        names, metadata = set(opened.keys()), opened.metadata()
    assert names == set(agent.model.state_dict())
    assert metadata["format"] == "iqmpc-agent" and metadata["format_version"] == "1"
    about = json.loads(metadata["agent"])
    assert about["observation"]["names"] == list("abcde")
    assert about["action"] == {"names": ["x", "y", "z"], "low": [-1, -2, 0], "high": [1, 2, 4]}
    assert about["action_repeat"] == 2 and about["control_period_s"] == 0.04
    assert about["planner"]["iterations"] == 3 and about["discount"] == agent.config.discount
    assert about["beta"] == agent.entropy_coef
    (length,) = struct.unpack("<Q", file.read_bytes()[:8])
    assert (8 + length) % 64 == 0
    parameters = sum(p.numel() for p in agent.model.parameters())
    assert file.stat().st_size == 8 + length + 4 * parameters
    again = saved(tmp_path / "again.iqmpc", agent)
    assert again.read_bytes() == file.read_bytes()
    assert agent_file.load(file).interface == INTERFACE


def test_a_flipped_byte_is_refused(tmp_path):
    file = saved(tmp_path / "agent.iqmpc", random_agent())
    data = file.read_bytes()
    places = [*range(0, 3000, 37), *range(3000, len(data), 997), len(data) - 1]
    for place in places:
        spoilt = bytearray(data)
        spoilt[place] ^= 1 << place % 8
        file.write_bytes(spoilt)
        with pytest.raises(CheckpointError, match=r"agent\.iqmpc"):
            Agent.load(file)
    file.write_bytes(data[:-4])
    with pytest.raises(CheckpointError, match="cannot be read"):
        Agent.load(file)


def test_other_files_and_versions_are_refused_with_a_sentence(tmp_path):
    file = tmp_path / "agent.iqmpc"
    safetensors.torch.save_file({"a": torch.zeros(2)}, file)
    with pytest.raises(CheckpointError, match="is no agent's file"):
        Agent.load(file)
    tensors = random_agent().model.state_dict()
    newer = {"format": "iqmpc-agent", "format_version": "2"}
    file.write_bytes(agent_file.packed(tensors, newer))
    with pytest.raises(CheckpointError, match="has format version 2, this program reads 1"):
        Agent.load(file)
    saved(file, random_agent(), observation={"shape": [4], "names": list("abcd")})
    with pytest.raises(CheckpointError, match="does not fit its settings"):
        Agent.load(file)
    saved(file, random_agent(), observation={"shape": [2**70], "names": list("abcde")})
    with pytest.raises(CheckpointError, match="they describe no model"):
        Agent.load(file)
    saved(file, random_agent(), action={})
    with pytest.raises(CheckpointError, match="does not describe its agent"):
        Agent.load(file)
    saved(file, random_agent())
    with pytest.raises(CheckpointError, match="has no checkpoint 'best'"):
        Agent.load(file, checkpoint="best")
    with pytest.raises(ValueError, match=r"obs must be \[1, 5\], got \[1, 4\]"):
        Agent.load(file).act(np.zeros(4, np.float32))
    bad = random_agent()
    next(bad.model.parameters()).data[0] = torch.nan
    with pytest.raises(CheckpointError, match="1 tensors are not finite, the first is encoder"):
        saved(file, bad)
    with pytest.raises(ConfigError, match="names 5 numbers of an observation, the agent has 6"):
        saved(file, random_agent(obs=6))


def test_settings_change_with_the_export(run):
    file = run.parent / "agent.iqmpc"
    export(run, file, changes={"planner.budget_us": 500.0, "planner.samples": 12})
    assert Agent.load(file).planner.config.budget_us == 500
    assert Agent.load(file, changes={"planner.samples": 13}).planner.config.samples == 13
    assert agent_file.load(file).about["planner"]["samples"] == 12


# ---- The task's interface -----------------------------------------------------------------------


def test_a_run_keeps_what_its_numbers_are(run, point_env, small_config):
    kept = RunFolder(run).load_interface()
    assert kept == describe(point_env, small_config.task)
    assert kept.observation_names == ("obs[0]", "obs[1]") and kept.action_low == (-1.0, -1.0)
    RunFolder(run).interface.unlink()
    with pytest.warns(RuntimeWarning, match="keeps no names and bounds"):
        export(run, run.parent / "agent.iqmpc")
    found = agent_file.load(run.parent / "agent.iqmpc").interface
    assert found == dataclasses.replace(kept, action_repeat=small_config.task.action_repeat)
    RunFolder(run).interface.write_text('{"action_names": []}')
    with pytest.raises(CheckpointError, match=r"interface\.json cannot be read"):
        export(run, run.parent / "agent.iqmpc")


def test_what_gymnasium_says_of_an_environment():
    task = compose(["task=gym", "task.env_id=Pendulum-v1", "task.action_repeat=2"]).task
    found = describe(make_env(task), task)
    assert found == TaskInterface(
        ("obs[0]", "obs[1]", "obs[2]"), ("action[0]",), (-2.0,), (2.0,), 2, 0.1
    )


def test_what_dmcontrol_says_of_a_task():
    pytest.importorskip("dm_control")
    task = compose(["task=walker-walk"]).task
    found = describe(make_env(task), task)
    assert found.observation_names[0] == "orientations[0]"
    assert found.observation_names[14] == "height" and len(found.observation_names) == 24
    assert found.action_names[:2] == ("right_hip", "right_knee")
    assert found.action_high == (1.0,) * 6
    assert found.control_period_s == pytest.approx(0.05) and found.action_repeat == 2


# ---- The command line ---------------------------------------------------------------------------


def test_the_commands_take_files(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    task = {"name": "pendulum", "suite": "gym", "env_id": "Pendulum-v1", "episode_length": 5}
    agent = random_agent(obs=3, actions=1)
    config = agent.config.replace({f"task.{k}": v for k, v in task.items()})
    agent = Agent(agent.model, config)
    interface = describe(make_env(config.task), config.task)
    file = tmp_path / "agent.iqmpc"
    agent_file.save(file, exported(agent, interface, FACTS))
    done = CliRunner().invoke(cli.app, ["eval", str(file), "--episodes", "1", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["checkpoint"] == "agent.iqmpc" and found["backend"] == "cpu"
    assert found["late_plans"] == found["missed_plans"] == 0


def test_the_export_command(run):
    file = run.parent / "agent.iqmpc"
    words = ["export", str(run), str(file), "planner.budget_us=900"]
    done = CliRunner().invoke(cli.app, words)
    assert done.exit_code == 0, done.output
    assert agent_file.load(file).about["planner"]["budget_us"] == 900
    again = CliRunner().invoke(cli.app, words)
    assert isinstance(again.exception, ConfigError) and "--force" in str(again.exception)
    assert CliRunner().invoke(cli.app, [*words, "--force"]).exit_code == 0


# ---- C++ and C ----------------------------------------------------------------------------------


def built(source: Path, build: Path, *settings: str) -> None:
    """Configure and build a project with CMake, which is on PATH or beside Python."""
    cmake = shutil.which("cmake") or shutil.which("cmake", path=Path(sys.executable).parent)
    if cmake is None:
        pytest.skip("needs cmake")
    for command in (["-S", source, "-B", build, *settings], ["--build", build]):
        done = subprocess.run([cmake, *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> Path:
    """The folder of programs that an external project has built against the installed library."""
    if not (ROOT / "examples").is_dir():
        pytest.skip("the examples are not beside the tests")
    empty = tmp_path_factory.mktemp("robot")
    sources = [
        ROOT / "tests/native/actions.cpp",
        ROOT / "examples/cpp/control_loop.cpp",
        ROOT / "examples/c/control_loop.c",
    ]
    shutil.copy(ROOT / "tests/native/CMakeLists.txt", empty)
    found = f"-Diqmpc_DIR={paths.cmake()}"
    built(empty, empty / "build", found, f"-DSOURCES={';'.join(map(str, sources))}")
    built(ROOT / "examples/ros2_control", empty / "ros", found)
    return empty


@pytest.mark.slow
@pytest.mark.parametrize("level", _C.isa_levels())
@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("termination", [False, True])
def test_cpp_acts_as_python_does_bit_for_bit(
    programs, tmp_path, monkeypatch, level, precision, termination
):
    """1,000 actions: warm-started, with episodes in between, exploring at every third step."""
    monkeypatch.setenv("IQMPC_ISA", level)
    file = saved(
        tmp_path / "agent.iqmpc", random_agent(termination=termination, precision=precision)
    )
    random = np.random.default_rng(0)
    records = random.standard_normal((1000, 7)).astype(np.float32)
    records[:, 0] = np.arange(1000) % 90 == 0
    records[:, 1] = np.arange(1000) % 3 == 0
    done = subprocess.run(
        [programs / "build/actions_cpp", file], input=records.tobytes(), capture_output=True
    )
    assert done.returncode == 0, done.stderr
    actions = np.frombuffer(done.stdout, np.float32).reshape(1000, 3)
    agent = Agent.load(file)
    for (begins, explore, *obs), action in zip(records, actions, strict=True):
        if begins:
            agent.reset()
        expected = agent.act(np.array(obs, np.float32), explore=bool(explore))
        assert np.array_equal(expected, action)
    assert np.ptp(actions, 0).min() > 0.5  # they are not all one


@pytest.mark.slow
@pytest.mark.parametrize("program", ["control_loop_cpp", "control_loop_c"])
def test_control_loops_run(programs, tmp_path, program):
    file = saved(tmp_path / "agent.iqmpc", random_agent())

    def ran(*words):
        command = [programs / "build" / program, *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True)

    done = ran(file, 200, 20)
    assert done.returncode == 0 and done.stdout.startswith("20 plans: p50 "), done.stderr
    file.write_bytes(file.read_bytes()[:-4])
    done = ran(file, 200, 20)
    assert done.returncode == 1 and f"{file} is no agent for this library: " in done.stderr


@pytest.mark.slow
def test_the_ros2_controller_commands_what_the_agent_does(programs, tmp_path):
    file = saved(tmp_path / "agent.iqmpc", random_agent())
    program = programs / "ros/run_controller"
    done = subprocess.run([program, file, "5"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    commands = np.array([list(map(float, line.split())) for line in done.stdout.splitlines()])
    agent = Agent.load(file)
    low, high = np.array(INTERFACE.action_low), np.array(INTERFACE.action_high)
    actions = [agent.act(np.full(5, 0.5, np.float32)).astype(np.float64) for _ in range(5)]
    np.testing.assert_allclose(commands, low + (np.array(actions) + 1) / 2 * (high - low))


@pytest.mark.slow
def test_a_project_with_the_source_inside_it_stays_as_it_is(tmp_path):
    """And gets a shared library that shows its interface alone."""
    if not (ROOT / "CMakeLists.txt").exists():
        pytest.skip("the source is not beside the tests")
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.18)\n"
        "project(robot LANGUAGES CXX)\n"
        f"add_subdirectory({ROOT} iqmpc)\n"
        f"add_executable(actions {ROOT}/tests/native/actions.cpp)\n"
        "target_link_libraries(actions PRIVATE iqmpc::iqmpc)\n"
    )
    build = tmp_path / "build"
    built(tmp_path, build, "-DBUILD_SHARED_LIBS=ON", "-DCMAKE_CXX_FLAGS=-O0")
    cache = (build / "CMakeCache.txt").read_text()
    assert "CMAKE_BUILD_TYPE:STRING=\n" in cache and "CMAKE_CUDA_COMPILER" not in cache
    file = saved(tmp_path / "agent.iqmpc", random_agent())
    record = np.zeros(7, np.float32)
    done = subprocess.run([build / "actions", file], input=record.tobytes(), capture_output=True)
    assert done.returncode == 0 and len(done.stdout) == 12, done.stderr
    (library,) = (path for path in build.rglob("libiqmpc.so*") if not path.is_symlink())
    shown = subprocess.run(["nm", "-DC", "--defined-only", library], capture_output=True, text=True)
    names = [line.split(maxsplit=2)[-1] for line in shown.stdout.splitlines()]
    assert any(name.startswith("iqmpc::Agent::load(") for name in names)
    assert "iqmpc_agent_act" in names
    assert not [name for name in names if name.startswith("iqmpc::detail::")]


def test_paths_are_said():
    done = subprocess.run(
        [sys.executable, "-m", "iqmpc.paths", "--include"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    include = Path(done.stdout.strip())
    assert include == paths.include() and (include / "iqmpc.h").exists()
    assert (include / "iqmpc/agent.hpp").exists()
    assert (paths.library() / "libiqmpc.a").exists()
    assert (paths.cmake() / "iqmpcConfig.cmake").exists()


# ---- ONNX ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", [False, True])
def test_the_onnx_prior_is_torchs(
    tmp_path,
    small_config,
    images,
    point_env,
    point_demonstrations,
    image_point_env,
    image_demonstrations,
):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    if images:
        config = small_config.replace({"task.obs": "pixels", "train.steps": 40})
        run = trained(tmp_path, config, image_point_env, image_demonstrations)
        obs = np.random.default_rng(0).integers(0, 256, (6, 3, 64, 64), dtype=np.uint8)
    else:
        run = trained(tmp_path, small_config, point_env, point_demonstrations)
        obs = np.random.default_rng(0).standard_normal((6, 2)).astype(np.float32)
    export_onnx(run, tmp_path / "prior.onnx")
    session = runtime.InferenceSession(
        (tmp_path / "prior.onnx").read_bytes(), providers=["CPUExecutionProvider"]
    )
    model = Agent.load(run).model
    z = model.encode(torch.from_numpy(obs))
    mean, log_std = model.pi(z)
    expected = {"z": z, "mean": mean, "log_std": log_std, "action": mean.tanh()}
    found = session.run(list(expected), {"obs": obs})
    for (name, tensor), array in zip(expected.items(), found, strict=True):
        np.testing.assert_allclose(array, tensor.detach(), rtol=0, atol=1e-5, err_msg=name)
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["interface"])["action_names"] == ["action[0]", "action[1]"]
