"""`iqmpc config`: every setting with its value and meaning."""

import json

from typer.testing import CliRunner

from iqmpc.cli import app
from iqmpc.config import all_keys, meanings


def shown(*words):
    result = CliRunner().invoke(app, ["config", *words])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_every_setting_has_a_meaning():
    assert list(meanings()) == all_keys()
    assert [key for key, meaning in meanings().items() if not meaning] == []
    assert meanings()["train.env_timeout_s"].endswith("(two minutes more to start)")  # two lines
    assert "horizon" not in meanings()["model.critics"]


def test_values_are_those_that_train_would_take():
    found = json.loads(shown("task=cheetah-run", "learner.batch=7", "--json"))
    assert list(found) == all_keys()
    assert found["task.name"]["value"] == "cheetah-run" and found["learner.batch"]["value"] == 7
    assert found["train.stop_at"]["value"] is None
    assert found["seed"] == {"value": 0, "meaning": meanings()["seed"]}


def test_the_table_has_a_line_each():
    lines = shown("seed=31").splitlines()
    assert lines[0].split() == ["key", "value", "meaning"]
    assert any(line.split()[:2] == ["seed", "31"] and "random" in line for line in lines)
    assert any(line.split()[:2] == ["train.stop_at", "null"] for line in lines)
