"""The paper's tables and figures: which runs they are, and what is shown of them."""

import csv
import io

import pytest
from typer.testing import CliRunner

from iqmpc import reproduce, run_list, table
from iqmpc.cli import app
from iqmpc.errors import ConfigError
from iqmpc.reproduce import PlannedRun, StepTimes
from iqmpc.run_folder import RunFolder


@pytest.fixture
def demos(tmp_path):
    """A folder that has demonstrations of every task, as far as a plan looks at them."""
    folder = tmp_path / "demos"
    folder.mkdir()
    for name in reproduce.names():
        for task in reproduce.experiment(name).tasks:
            (folder / f"{task}.h5").touch()
    return folder


@pytest.fixture
def ended(tmp_path):
    """Makes a run folder as it is at the end of a run of these settings."""

    def make(name, config, **summary):
        folder = RunFolder(tmp_path / "runs" / name)
        folder.path.mkdir(parents=True)
        folder.save_config(config, new=True)
        folder.save_summary({"env_steps": config.train.steps, **summary})
        return folder.path

    return make


@pytest.mark.parametrize("name", reproduce.names())
def test_every_experiment_is_of_runs_that_can_be_made(name, demos):
    what = reproduce.experiment(name)
    runs = reproduce.planned(what, "cpu", 1, demos)
    assert len({run.name for run in runs}) == len(runs) == len(what.tasks) * len(what.variants)
    of_first = [run for run in runs if run.task == what.tasks[0]]
    assert len({reproduce.fingerprint(run.config) for run in of_first}) == len(of_first)
    for reported in what.paper.values():
        assert all(len(figures) in (1, 2) for figures in reported.values())
    assert set(what.paper) <= set(what.tasks)


def test_the_words_of_a_run(demos):
    what = reproduce.experiment("table1")
    runs = reproduce.planned(what, "paper", 2, demos, ["learner.precision=bf16"])
    ours, baseline = (
        next(r for r in runs if (r.task, r.variant, r.seed) == ("myo-key-turn", variant, 1))
        for variant in ("iq_mpc", "bc")
    )
    assert ours.config.preset == "paper" and ours.config.seed == 1
    assert ours.config.train.steps == 500_000 and ours.config.learner.precision == "bf16"
    assert ours.config.demos.path == str(demos / "myo-key-turn.h5")
    assert baseline.config.agent.name == "bc" and baseline.config.learner.precision == "float32"
    assert ours.name == "myo-key-turn-iq_mpc-seed1"
    (demos / "myo-key-turn.h5").unlink()
    without = reproduce.planned(what, "paper", 1, demos)
    assert [r.words for r in without if r.task == "myo-key-turn"] == [()] * 5
    some = what.only(["myo-obj-hold"], ["hype", "bc"])
    found = reproduce.planned(some, "cpu", 1, demos)
    assert [(r.task, r.variant) for r in found] == [("myo-obj-hold", v) for v in ("hype", "bc")]
    with pytest.raises(ConfigError, match="table1 has no 'pick-cube'"):
        what.only(["pick-cube"], ())
    with pytest.raises(ConfigError, match="no scale 'gpu'"):
        reproduce.planned(what, "gpu", 1, demos)
    with pytest.raises(ConfigError, match="no experiment 'tabel1'; did you mean 'table1'"):
        reproduce.experiment("tabel1")


def test_a_run_under_the_same_settings_is_taken(tmp_path, demos, ended):
    run = reproduce.planned(reproduce.experiment("table7"), "cpu", 1, demos)[2]
    config = run.config
    same = ended("same", config.replace({"learner.mode": "eager", "train.eval_every": 7}))
    ended("longer", config.replace({"train.steps": 50_000}))
    ended("other", config.replace({"learner.alpha": 1}))
    (tmp_path / "runs" / "none").mkdir()
    found = reproduce.finished([str(tmp_path / "runs" / "*")])
    assert len(found) == 3 and found[reproduce.fingerprint(config)] == same
    (same / "summary.json").unlink()  # it has not ended
    assert reproduce.fingerprint(config) not in reproduce.finished([str(tmp_path / "runs" / "*")])


def test_rows_are_mean_and_standard_error_beside_the_papers():
    what = reproduce.experiment("table5")
    what = what.only((), ["iq_mpc", "bc"])
    values = {("pick-cube", "iq_mpc"): [0.5, 0.9, 0.7], ("pick-cube", "bc"): [0.25]}
    rows = reproduce.rows(what, values)
    ours = rows[0]
    assert (ours.task, ours.variant, ours.seeds) == ("pick-cube", "iq_mpc", 3)
    assert ours.mean == pytest.approx(0.7)
    assert ours.error == pytest.approx(0.2 / 3**0.5) and (ours.paper, ours.paper_error) == (
        0.79,
        0.05,
    )
    text = reproduce.to_markdown(what, rows)
    assert "| pick-cube | iq_mpc | 0.70 ± 0.12 | 3 | 0.79 ± 0.05 |" in text
    assert "| pick-cube | bc | 0.25 | 1 | – |" in text
    assert "| pick-cube | cfil_sac | – | – | 0.00 ± 0.00 |" in text  # the paper's alone
    (first, *_) = csv.DictReader(io.StringIO(reproduce.to_csv(rows)))
    assert float(first["error"]) == ours.error


def test_what_a_run_costs(small_config, monkeypatch, point_env):
    config = small_config.replace(
        {"train.steps": 100, "train.random_steps": 40, "train.updates_per_step": 0.5}
    )
    assert StepTimes(1.0, 10.0, 100.0).run_s(config) == 100 + 60 * 10 + (5 + 30) * 100
    monkeypatch.setattr(reproduce, "make_env", lambda task, seed: point_env)
    for changes in ({}, {"agent.name": "iql_sac", "learner.horizon": 1}):
        assert all(0 < t < 60 for t in reproduce.step_times(config.replace(changes)))


def test_the_command_makes_what_is_missing_and_shows_it(
    tmp_path, demos, ended, monkeypatch, capsys
):
    what = reproduce.experiment("table6")
    there, missing = reproduce.planned(what, "cpu", 1, demos)
    folder = ended("elsewhere", there.config)
    asked = {}

    def make(runs, into, jobs):
        asked.update(runs)
        for name in runs:
            (into / name).mkdir(parents=True)
            (into / name / "summary.json").write_text("{}")
        return ["one failed: see its log"]

    reached = {folder: 0.8, tmp_path / "into" / missing.name: 0.4}
    monkeypatch.setattr(run_list, "make", make)
    monkeypatch.setattr(table, "record", lambda run, episodes: {"success_rate": reached[run]})
    monkeypatch.setattr("iqmpc.commands.reproduce._draw", lambda *_: None)
    monkeypatch.setattr(reproduce, "step_times", lambda config: StepTimes(0.36, 0, 0))
    words = ["reproduce", "table6", "--seeds", "1", "--demos", str(demos)]
    words += ["--into", str(tmp_path / "into"), "--runs", str(folder)]
    dry = CliRunner().invoke(app, [*words, "--dry-run"])
    assert dry.exit_code == 0 and not asked
    done = CliRunner().invoke(app, words)
    assert list(asked) == [missing.name] and asked[missing.name] == missing.words
    assert "failed" in str(done.exception)
    text = (tmp_path / "into" / "table6.md").read_text()
    assert "| pick-cube | penalty | 0.80 | 1 | 0.79 ± 0.05 |" in text
    assert "| pick-cube | none | 0.40 | 1 | 0.51 ± 0.11 |" in text


def test_a_name_is_a_folders():
    assert PlannedRun("dog-run", "value difference", 3, ()).name == "dog-run-value-difference-seed3"
