"""Where a run's time goes: what is measured, and that it stands in the metrics."""

import csv
import time

import pytest

from iqmpc import Trainer
from iqmpc import timing as module
from iqmpc.run_folder import RunFolder
from iqmpc.runlog import COLUMNS, TIMING, RunLog, read_rows
from iqmpc.timing import Timing


@pytest.fixture
def clock(monkeypatch):
    """Seconds of a clock that stands still until the test moves it."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_means_and_rate_since_the_last_take(clock):
    timing = Timing()
    for seconds in (0.25, 0.75):
        with timing.measure("plan"):
            clock[0] += seconds
    with timing.measure("update"):
        clock[0] += 3
    assert timing.take(8) == {"plan_ms": 500, "update_ms": 3000, "steps_per_s": 2}
    assert timing.take(8) == {}  # nothing since: no figure, and no division by no time
    clock[0] += 100  # such as an evaluation, after which a row is written
    assert timing.take(8) == {}
    clock[0] += 2
    with pytest.raises(KeyError), timing.measure("env"):
        raise KeyError
    assert timing.take(9) == {"steps_per_s": 0.5}


class Slow:
    """A callable that takes `seconds` longer."""

    def __init__(self, inner, seconds):
        self.inner, self.seconds = inner, seconds

    def __call__(self, *args, **options):
        time.sleep(self.seconds)
        return self.inner(*args, **options)


@pytest.mark.parametrize("overlap", ["off", "async"])
def test_a_run_tells_where_its_time_goes(
    tmp_path, small_config, point_env, point_demonstrations, overlap
):
    config = small_config.replace({"train.overlap": overlap})
    trainer = Trainer(config, point_env, point_demonstrations, run=tmp_path / "run")
    trainer.agent.act = Slow(trainer.agent.act, 0.004)
    trainer.envs.step = Slow(trainer.envs.step, 0.003)
    trainer.learner.learn = Slow(trainer.learner.learn, 0.005)
    trainer.train()
    rows = list(csv.DictReader(open(tmp_path / "run" / "metrics.csv", newline="")))
    random = [r for r in rows if int(r["env_steps"]) < config.train.random_steps]
    assert random and not any(r["plan_ms"] for r in random)
    for r in (r for r in rows if r["return"]):  # evaluations: neither acting's plans nor steps
        assert float(r["env_ms"]) >= 3
        assert 0 < float(r["steps_per_s"]) <= 1000 / 3
    for r in (r for r in rows if r["return"] and int(r["env_steps"]) > 40):
        assert float(r["plan_ms"]) >= 4 and float(r["update_ms"]) >= 5
    assert not any(r[c] for r in rows if r["eval_return_mean"] for c in TIMING)


def test_a_run_from_before_there_were_times_goes_on(tmp_path):
    before = [c for c in COLUMNS if c not in TIMING]
    values = {"env_steps": 10, "updates": 1, "episodes": 1, "wall_s": 1.0, "return": 5.0}
    with open(tmp_path / "metrics.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, before)
        writer.writeheader()
        writer.writerow(values)
    log = RunLog(RunFolder(tmp_path), since=10)
    log.write({**values, "env_steps": 20, "plan_ms": 3.0})
    log.close()
    rows, damaged = read_rows(tmp_path / "metrics.csv")
    assert [(r["env_steps"], r["return"], r["plan_ms"]) for r in rows] == [
        ("10", "5.0", ""),
        ("20", "5", "3"),
    ]
    assert not damaged
