"""Records of runs, their file and the tables made from them."""

import json
import os

import pytest
import torch

from iqmpc import compose, table
from iqmpc.errors import CheckpointError, IqmpcError, TaskError
from iqmpc.run_folder import RunFolder
from iqmpc.runlog import RunLog

SUMMARY = {
    "env_steps": 100,
    "wall_s": 600.0,
    "episodes": 20,
    "return_mean": 900.0,
    "return_std": 10.0,
    "success_rate": None,
    "demonstrator_return": 1000.0,
    "machine": "a CPU, avx2",
    "threads": 1,
    "commit": "abc",
}
MEASURED = {
    "env_steps": 100,
    "updates": 90,
    "wall_s": 601.0,
    "demonstrator_return": 1000.0,
    "return_mean": 800.0,
    "return_std": 20.0,
    "success_rate": None,
    "reward_correlation": 0.9,
}


@pytest.fixture
def make_run(tmp_path):
    def make(
        name="run",
        words=(),
        summary=SUMMARY,
        evaluations=((40, 1.0, None), (80, 3.0, None)),
        checkpoints=True,
    ):
        run = tmp_path / name
        run.mkdir()
        RunFolder(run).save_config(compose(["task=walker-walk", *words]), new=True)
        if checkpoints:
            RunFolder(run).save(100, {"a": torch.zeros(1)}, {})
        if summary is not None:
            RunFolder(run).save_summary(summary)
        log = RunLog(RunFolder(run))
        for step, mean, success in [*evaluations, (100, 1e6, None)]:
            log.write(
                {
                    "env_steps": step,
                    "updates": step,
                    "episodes": 1,
                    "wall_s": 6.0,
                    "eval_return_mean": mean,
                    "eval_success_rate": success,
                }
            )
        log.close()
        return run

    return make


@pytest.fixture
def measuring(monkeypatch):
    """What `measure` was asked for, in place of a process that does it; `figures` is its answer."""

    class Measuring:
        figures, asked = MEASURED, []

        def __call__(self, run, episodes, planner):
            self.asked = [*self.asked, (episodes, planner)]
            if isinstance(self.figures, Exception):
                raise self.figures
            return {**self.figures, "episodes": episodes, "seed": 10_000}

    stub = Measuring()
    monkeypatch.setattr(table, "_in_own_process", stub)
    return stub


def test_a_record(make_run, measuring):
    run = make_run(words=["seed=3", "learner.batch=128", "threads=1"])
    assert table.record(run) == {
        "task": "walker-walk",
        "agent": "planner",
        "seed": 3,
        "ablation": "learner.batch=128",
        "preset": "cpu",
        "steps": 100,
        "minutes": 10.0,
        "episodes": 20,
        "return_mean": 900.0,
        "return_std": 10.0,
        "demonstrator_return": 1000.0,
        "ratio": 0.9,
        "success_rate": None,
        "last5_of": "return",
        "last5_mean": 2.0,
        "last5_min": 1.0,
        "correlation": 0.9,
        "machine": "a CPU, avx2",
        "threads": 1,
        "commit": "abc",
    }
    assert measuring.asked == [(0, True)]  # the summary has the episodes


def test_too_few_episodes_are_evaluated_anew_and_kept(make_run, measuring):
    run = make_run(summary={**SUMMARY, "episodes": 10})
    first = table.record(run)
    assert (first["episodes"], first["return_mean"], first["minutes"]) == (20, 800.0, 10.0)
    assert table.record(run) == first and table.record(run, episodes=15) == first
    assert measuring.asked == [(20, True)]
    assert table.record(run, episodes=10)["return_mean"] == 900.0
    table.record(run, episodes=30)
    table.record(run, planner=False)
    assert measuring.asked == [(20, True), (30, True), (20, False)]
    RunFolder(run).save_summary({**SUMMARY, "env_steps": 200})  # the run has gone on
    measuring.figures = {**MEASURED, "env_steps": 200}
    table.record(run)
    assert measuring.asked[3:] == [(0, True)]


def test_the_prior_is_another_agent(make_run, measuring):
    """Of a run with the planner it is evaluated anew; of one without, it is the run's own agent."""
    record = table.record(make_run(), planner=False)
    assert (record["agent"], record["return_mean"]) == ("prior", 800.0)
    run = make_run("without", ["planner.enabled=false"])
    for planner in (True, False):
        record = table.record(run, planner=planner)
        assert (record["agent"], record["return_mean"]) == ("prior", 900.0)
        assert record["ablation"] == "planner.enabled=false"
    assert measuring.asked == [(20, False), (0, False)]


def test_successes_are_what_the_last_five_are_of_where_there_are_any(make_run, measuring):
    run = make_run(
        summary={**SUMMARY, "success_rate": 0.5}, evaluations=[(40, 1.0, 0.0), (80, 3.0, 1.0)]
    )
    record = table.record(run)
    assert (record["last5_of"], record["last5_mean"], record["last5_min"]) == ("success", 0.5, 0)


def test_a_run_that_has_not_ended(make_run, measuring):
    record = table.record(make_run(summary=None, evaluations=[(40, 1.0, None), (101, 9.0, None)]))
    assert record["return_mean"] == 800.0 and record["steps"] == 100
    assert record["machine"] is record["threads"] is record["commit"] is None
    assert record["last5_mean"] == 500000.5  # at step 100 it evaluated on its way


def test_what_is_not_finite_or_not_known_is_null(make_run, measuring):
    measuring.figures = {**MEASURED, "reward_correlation": None}
    run = make_run(
        summary={**SUMMARY, "return_mean": float("nan"), "demonstrator_return": None},
        evaluations=[],
    )
    record = table.record(run)
    for field in ("return_mean", "ratio", "demonstrator_return", "correlation", "last5_mean"):
        assert record[field] is None
    table.merge_records(run / "table.json", [record])
    assert "NaN" not in (run / "table.json").read_text()


def test_a_summary_of_a_return_that_was_not_finite(make_run, measuring):
    """Its figures stand there as null, beside a demonstrator's that is a number."""
    record = table.record(make_run(summary={**SUMMARY, "return_mean": None, "return_std": None}))
    assert record["return_mean"] is None and record["ratio"] is None


def test_without_its_environment_a_run_has_no_correlation(make_run, measuring):
    measuring.figures, messages = TaskError("evaluate your own"), []
    record = table.record(make_run(), on_message=messages.append)
    assert record["correlation"] is None and record["return_mean"] == 900.0
    assert "no correlation: evaluate your own" in messages[0]
    with pytest.raises(TaskError):
        table.record(make_run("few", summary={**SUMMARY, "episodes": 3}))


def test_what_is_no_run_is_named(make_run, measuring, tmp_path):
    with pytest.raises(CheckpointError, match="nowhere is no run folder"):
        table.record(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="empty has no checkpoint"):
        table.record(make_run("empty", checkpoints=False))
    run = make_run("broken")
    for damaged in ("{", "[1]", "[" * 100_000, "\xff\0"):
        (run / "summary.json").write_bytes(damaged.encode("latin-1"))
        with pytest.raises(CheckpointError, match="summary.json cannot be read"):
            table.record(run)
    for index, (change, said) in enumerate(
        (
            ({"env_steps": "x"}, "env_steps is 'x', expected a number"),
            ({"episodes": None}, "episodes is None, expected a number"),
            ({"wall_s": [1]}, r"wall_s is \[1\], expected a number"),
            ({"return_mean": 10**400}, "return_mean is 10+.*, expected a number"),
        )
    ):
        with pytest.raises(CheckpointError, match=f"summary.json cannot be read: {said}"):
            table.record(make_run(f"run {index}", summary={**SUMMARY, **change}))
    (run := make_run("measured")).joinpath("evaluation-planner.json").write_text(
        '{"reward_correlation": 1}'
    )
    with pytest.raises(CheckpointError, match="evaluation-planner.json cannot be read: env_steps"):
        table.record(run)
    measuring.figures = {**MEASURED, "env_steps": 60}
    with pytest.raises(CheckpointError, match="is of step 60, its summary.json of step 100"):
        table.record(make_run("damaged"))


def record(task="walker-walk", seed=0, ablation="", agent="planner", **figures):
    return {
        "task": task,
        "agent": agent,
        "seed": seed,
        "ablation": ablation,
        "steps": 15000,
        "minutes": 12.0,
        "return_mean": 900.0,
        "demonstrator_return": 1000.0,
        "ratio": 0.9,
        "success_rate": None,
        "last5_mean": 800.0,
        "last5_min": 700.0,
        "correlation": 0.8,
        "machine": "a CPU",
        "threads": 1,
        "commit": "abc",
        **figures,
    }


def test_records_replace_those_of_the_same_run_and_no_others(tmp_path):
    path = tmp_path / "table.json"
    foreign = [{"task": "other", "note": "by hand"}, {"task": "other", "note": "as well"}]
    path.write_text(
        json.dumps(
            [
                record(seed=10),
                record(seed=2),
                record(ablation="learner.batch=128"),
                record(agent="prior"),
                *foreign,
                {"task": "third", "return_mean": float("nan")},
            ]
        )
    )
    table.merge_records(path, [record(seed=10, return_mean=1.0), record(seed=1)])
    found = table.read_records(path)
    assert [r["return_mean"] for r in found if r.get("seed") == 10] == [1.0]
    walker = [(r["agent"], r["ablation"], r["seed"]) for r in found if r["task"] == "walker-walk"]
    assert walker == [
        ("planner", "", 1),
        ("planner", "", 2),
        ("planner", "", 10),
        ("planner", "learner.batch=128", 0),
        ("prior", "", 0),
    ]
    assert [r for r in found if r["task"] == "other"] == foreign
    assert found[2] == {"task": "third", "return_mean": None}
    assert len(path.read_text().splitlines()) == len(found) + 2  # a record a line
    assert [p.name for p in tmp_path.iterdir()] == ["table.json"]


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "{}",
        "[1]",
        '[{"seed": [1]}]',
        '[{"minutes": 1e999}]',
        r'[{"task": "\ud800"}]',
        "[" * 10**5,
    ],
)
def test_another_file_is_not_overwritten(tmp_path, text):
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(IqmpcError, match="table.json"):
        table.merge_records(path, [record()])
    assert path.read_text() == text


def test_globs_are_folders_and_what_is_missing_stays(tmp_path):
    for name in ("b", "a", "[1]"):
        (tmp_path / name).mkdir()
    (tmp_path / "ab.txt").touch()
    assert table.find_runs([f"{tmp_path}/[ab]*", f"{tmp_path}/a", f"{tmp_path}/c*"]) == [
        tmp_path / "a",
        tmp_path / "b",
        tmp_path / "c*",
    ]
    assert table.find_runs([f"{tmp_path}/[1]"]) == [tmp_path / "[1]"]


def test_a_sweeps_folder_is_its_runs(tmp_path):
    """Also those below a folder of their own; what is inside a run is none."""
    for name in ("seed=2", "seed=1", "demos=a/b", "seed=1/wandb/files"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.yaml").touch()
    (tmp_path / "multirun.yaml").touch()
    runs = [tmp_path / name for name in ("demos=a/b", "seed=1", "seed=2")]
    assert table.find_runs([str(tmp_path)]) == runs
    assert table.find_runs([f"{tmp_path}/seed=1", str(tmp_path)]) == [runs[1], runs[0], runs[2]]


def test_tables_have_means_over_seeds():
    records = [
        record(seed=0, correlation=None),
        record(seed=1, return_mean=800.0, last5_min=600),
        record("myo-key-turn", success_rate=0.95, demonstrator_return=None, ratio=None),
    ]
    lines = table.to_markdown(records).splitlines()
    assert len(lines) == 2 + 4
    assert lines[2] == (
        "| walker-walk | planner |  | 0 | 15,000 | 12 | 900.0 | 1000.0 | 0.90 | – "
        "| 800.00 | 700.00 | – |"
    )
    assert lines[4] == (
        "| walker-walk | planner |  | mean of 2 | 15,000 | 12 | 850.0 | 1000.0 "
        "| 0.90 | – | 800.00 | 650.00 | – |"
    )
    assert "| 0.95 |" in lines[5] and {line.count("|") for line in lines} == {14}
    assert table.to_rich(records).row_count == 4
    assert table.made_on([record(), record(commit="abd", machine=None)]) == (
        "machine a CPU; threads 1; commit abc, abd"
    )


class Deadly:
    """Ends the process that unpickles it."""

    def __reduce__(self):
        return os._exit, (3,)

    def __str__(self):
        return "runs/deadly"


def test_a_process_that_dies_is_an_error_of_its_run():
    with pytest.raises(IqmpcError, match="runs/deadly: the process that evaluated it died"):
        table._in_own_process(Deadly(), 1, True)
