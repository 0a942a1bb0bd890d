"""What the README shows a reader is what runs."""

import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from iqmpc import Demonstrations, Episode

README = Path(__file__).parents[1] / "README.md"
if not README.exists():
    pytest.skip("the README is not beside the tests", allow_module_level=True)
TEXT = README.read_text()


def test_the_ten_lines_train_on_ones_own_environment(tmp_path, monkeypatch, capsys):
    code = re.search(r"```python\n(.*?)```", TEXT, re.S).group(1)
    small = [
        "train.random_steps=20",
        "train.initial_updates=1",
        "train.final_episodes=1",
        "model.hidden_dim=16",
        "planner.samples=16",
        "planner.elites=4",
        "planner.policy_trajectories=4",
        "planner.mode=eager",
        "planner.backend=reference",
        "learner.mode=eager",
        "learner.batch=8",
    ]
    assert '"train.steps=20000"]' in code
    code = code.replace('"train.steps=20000"]', f'"train.steps=30", *{small}]')
    code = code.replace("episodes=10", "episodes=1")
    env = gymnasium.wrappers.RescaleAction(gymnasium.make("Pendulum-v1"), -1.0, 1.0)
    obs = [env.reset(seed=0)[0]]
    actions = np.random.default_rng(0).uniform(-1, 1, (30, 1)).astype(np.float32)
    rewards = []
    for action in actions:
        o, reward, *_ = env.step(action)
        obs.append(o)
        rewards.append(reward)
    episode = Episode(
        np.array(obs, np.float32), actions, np.array(rewards, np.float32), False, None
    )
    Demonstrations("pendulum", (episode,), {}).save(tmp_path / "pendulum.h5")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert float(capsys.readouterr().out) < 0  # Pendulum's return
    assert (tmp_path / "runs" / "pendulum" / "summary.json").exists()


def test_every_command_exists():
    """Each `iqmpc …` line of the README: its subcommand, options and settings are known."""
    from typer.testing import CliRunner

    from iqmpc.cli import app
    from iqmpc.composition import compose

    lines = [
        line.split("#")[0].strip()
        for line in TEXT.splitlines()
        if re.match(r"(\.venv/bin/)?iqmpc ", line)
    ]
    assert len(lines) >= 10
    for line in lines:
        words = shlex.split(line)[1:]
        command = words[:2] if words[0] == "demos" else words[:1]
        shown = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "200"})
        assert shown.exit_code == 0, line
        assert all(w in shown.output for w in words if w.startswith("--")), line
        if command == ["train"] and not words[1].startswith("resume="):
            settings = [w for w in words[1:] if w != "-m" and not w.startswith("hydra")]
            compose([w.split(",")[0] if "-m" in words else w for w in settings])


def test_the_public_names_are_those_the_readme_lists():
    import iqmpc

    listed = re.search(r"The public names are (.*?)\.\n", TEXT, re.S).group(1)
    assert set(re.findall(r"`(\w+)`", listed)) == set(iqmpc.__all__) - {"IqmpcError"}


def required(name: str, extras: set[str], found: dict[str, set[str]]) -> None:
    """All distributions that an installation of `name[extras]` brings, with their own extras."""
    new = extras - found.get(name, set())
    if name in found and not new:
        return
    found.setdefault(name, set()).update(extras)
    try:
        requirements = metadata.requires(name) or []
    except metadata.PackageNotFoundError:  # optional, or for another system
        return
    for requirement in map(Requirement, requirements):
        extra = [{"extra": e} for e in (extras or {""})]
        if requirement.marker is None or any(map(requirement.marker.evaluate, extra)):
            required(canonicalize_name(requirement.name), set(requirement.extras), found)


HIDDEN = """
import importlib.abc, sys
class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {hidden!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hidden())
import iqmpc
from iqmpc.config import TaskConfig
env = iqmpc.make_env(TaskConfig(name="gym", suite="gym", env_id="HalfCheetah-v4", episode_length=5))
env.reset(seed=0)
print(env.step(env.action_space.sample())[0].shape, "imageio" in sys.modules)
"""


def test_make_train_installs_what_its_commands_import():
    """gymnasium's MuJoCo tasks, which the README gives it, run with those packages alone."""
    makefile = (README.parent / "Makefile").read_text()
    (extras,) = re.findall(r"^\$\(TRAIN\): EXTRA = (.*)$", makefile, re.MULTILINE)
    held: dict[str, set[str]] = {}
    required("iqmpc", set(extras.split(",")), held)
    hidden = {
        module
        for module, names in metadata.packages_distributions().items()
        if not {canonicalize_name(name) for name in names} & held.keys()
    }
    assert "pytest" in hidden and "mujoco" not in hidden
    done = subprocess.run(
        [sys.executable, "-c", HIDDEN.format(hidden=hidden)], capture_output=True, text=True
    )
    assert done.stdout.split("\n")[0] == "(17,) True", done.stderr[-2000:]
