"""`iqmpc eval`: decoded against true rewards."""

import csv
import json

import numpy as np
import pytest
from typer.testing import CliRunner

from iqmpc import Agent
from iqmpc.cli import app
from tests.runs import train

pytest.importorskip("matplotlib")


def test_the_rewards_behind_the_correlation_are_drawn_and_written(
    tmp_path, small_config, point_env, point_demonstrations, monkeypatch
):
    config = small_config.replace({"agent.name": "iql_sac", "agent.hidden_dim": 16})
    run = tmp_path / "run"
    train(config, point_env, point_demonstrations, run)
    monkeypatch.setattr(
        "iqmpc.evaluation.open_run", lambda run, changes, **k: (Agent.load(run), point_env)
    )
    picture = tmp_path / "rewards.png"
    words = ["eval", str(run), "--episodes", "1", "--json", "--scatter", str(picture)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0 and picture.stat().st_size > 1000
    rows = list(csv.DictReader(open(picture.with_suffix(".csv"), newline="")))
    true, decoded = (np.array([float(r[k]) for r in rows]) for k in ("true", "decoded"))
    assert len(rows) == 18 * 20
    reported = json.loads(done.stdout)["reward_correlation"]
    assert reported == pytest.approx(np.corrcoef(true, decoded)[0, 1], abs=1e-4)
