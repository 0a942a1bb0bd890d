"""When rows of metrics are written."""

import csv

import numpy as np
import pytest

from iqmpc import Trainer
from iqmpc.errors import ConfigError
from tests.runs import interrupted_at, rows_of

SIGTERM = 15


@pytest.fixture
def config(small_config):
    return small_config.replace({"train.loggers": ["csv"], "train.eval_every": 1000})


def training_rows(run):
    rows = csv.DictReader(open(run / "metrics.csv", newline=""))
    return [row for row in rows if not row["eval_return_mean"]]


def trained(config, env, demonstrations, run, **options):
    trainer = Trainer(config, env, demonstrations, run=run, **options)
    trainer.train()
    return trainer


def test_a_row_for_each_episode(tmp_path, config, point_env, point_demonstrations):
    trained(config, point_env, point_demonstrations, tmp_path / "run")
    rows = training_rows(tmp_path / "run")
    assert [row["env_steps"] for row in rows] == ["20", "40", "60", "80", "100"]
    assert all(row["return"] for row in rows)


@pytest.mark.parametrize("every", [8, 50])
def test_rows_have_steps_of_their_own(tmp_path, config, point_env, point_demonstrations, every):
    """More often than episodes end, and less often: each episode is in one row, by its mean."""
    trained(config, point_env, point_demonstrations, tmp_path / "episodes")
    returns = [float(row["return"]) for row in training_rows(tmp_path / "episodes")]
    trained(
        config.replace({"train.log_every": every}),
        point_env,
        point_demonstrations,
        tmp_path / "run",
    )
    rows = training_rows(tmp_path / "run")
    steps = [*range(every, 101, every)]
    assert [int(row["env_steps"]) for row in rows] == steps + [100] * (steps[-1] != 100)
    ends = np.array([20, 40, 60, 80, 100])
    for row, before in zip(rows, [0, *steps], strict=False):
        inside = [
            r for r, e in zip(returns, ends, strict=True) if before < e <= int(row["env_steps"])
        ]
        expected = pytest.approx(np.mean(inside), rel=1e-4) if inside else None
        assert (float(row["return"]) if row["return"] else None) == expected
    learning = [row for row in rows if int(row["env_steps"]) > 40]
    assert all(row["critic_loss"] for row in learning)


def test_a_continued_run_has_the_same_rows(tmp_path, config, point_env, point_demonstrations):
    config = config.replace({"train.log_every": 50})
    given = config, point_env, point_demonstrations
    trained(*given, tmp_path / "whole")
    trainer = interrupted_at(Trainer(*given, run=tmp_path / "cut"), 65, SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trained(*given, tmp_path / "cut", resume=True)
    assert rows_of(tmp_path / "cut") == rows_of(tmp_path / "whole")


def test_a_robots_ticks_write_no_rows(config):
    with pytest.raises(ConfigError, match="train.log_every must be left alone with train.control_"):
        config.replace({"train.log_every": 10, "train.control_hz": 50})
