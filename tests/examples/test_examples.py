"""The examples run, and the pages that show their code show what runs."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

from tests.runs import TINY_SIZES

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / "examples" / "python"
if not PYTHON.exists():
    pytest.skip("the examples are not beside the tests", allow_module_level=True)
TINY = [
    *TINY_SIZES,
    "train.random_steps=60",
    "train.initial_updates=2",
    "train.final_episodes=1",
    "threads=1",
]


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs an example in an empty folder as its program; returns what it printed."""

    def ran(name, *words):
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(PYTHON)
        monkeypatch.setattr(sys, "argv", [name, *words])
        runpy.run_path(str(PYTHON / name), run_name="__main__")
        return capsys.readouterr().out

    return ran


def test_own_environment(run):
    said = run("own_environment.py", "--steps", "180", *TINY)
    assert re.search(r"return \d+\.\d, demonstrator 45\.0\nsuccess [01]\.\d\d\nimplied", said)


def test_from_log_to_robot(run, tmp_path):
    said = run("from_log_to_robot.py", "--steps", "120", *TINY)
    assert re.search(r"last force \[.*\] N, \d\.\d\d from the goal", said)
    assert (tmp_path / "runs" / "robot" / "agent.iqmpc").stat().st_size > 1000


def test_take_over(run):
    said = run("take_over.py", "--steps", "120", *TINY)
    assert "starting from runs/reach-person-before" in said
    assert "20 steps of the person are demonstrations now" in said  # ten in each episode


def test_many_environments(run):
    pytest.importorskip("dm_control")
    said = run("many_environments.py", "--steps", "5")
    assert len(re.findall(r"\d+\.\d", said)) == 4


def test_the_notebook(monkeypatch, capsys):
    """Its cells one after the other, which is all that a notebook's server would add here."""
    pytest.importorskip("dm_control")
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    notebook = json.loads((ROOT / "examples" / "decoded_reward.ipynb").read_text())
    cells = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    assert "steps = 300" in cells[0]
    names = {}
    for number, code in enumerate(cells):
        code = code.replace("steps = 300", "steps = 30")
        exec(compile(code, f"cell {number}", "exec"), names)
    assert re.search(r"true rewards: -?[01]\.\d\d", capsys.readouterr().out)
    assert len(names["decoded"]) == 30 and names["axes"].lines


@pytest.mark.parametrize("page", ["own-data.md", "robot.md"])
def test_the_pages_show_what_the_examples_run(page):
    def plain(code):  # however it is laid out
        return re.sub(r"\s|,(?=\s*[)\]])", "", code)

    examples = plain("".join(path.read_text() for path in PYTHON.glob("*.py")))
    shown = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.S)
    assert shown and [code for code in shown if plain(code) not in examples] == []
