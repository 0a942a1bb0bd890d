"""What a run writes, what is read of it, and what damage to metrics.csv costs."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from iqmpc.files import strict_json
from iqmpc.run_folder import RunFolder
from iqmpc.runlog import COLUMNS, RunLog, last_evaluations, read_rows


def row(step, **values):
    return {"env_steps": step, "updates": step, "episodes": step // 10, "wall_s": 1.0, **values}


@pytest.fixture
def run(tmp_path):
    log = RunLog(RunFolder(tmp_path))
    for step in (10, 20, 30, 40):
        log.write(row(step, **{"return": float(step)}))
    log.close()
    return tmp_path


def lines_of(run):
    return (run / "metrics.csv").read_bytes().splitlines(keepends=True)


@pytest.mark.parametrize("byte", [b"\xff", b"\0", b'"', b"x", b",", b"\r"])
def test_damaged_lines_are_set_aside(run, byte):
    lines = lines_of(run)
    lines[2] = lines[2][:1] + byte + lines[2][1:]
    (run / "metrics.csv").write_bytes(b"".join(lines))
    with pytest.warns(RuntimeWarning, match=r"csv: [12] damaged lines, now in metrics.csv.dam"):
        RunLog(RunFolder(run), since=30).close()
    rows, damaged = read_rows(run / "metrics.csv")
    assert [r["env_steps"] for r in rows] == ["10", "30"] and not damaged
    assert (run / "metrics.csv.damaged").stat().st_size


@pytest.mark.parametrize("place", range(0, 300, 23))
@pytest.mark.parametrize("byte", [0, 10, 34, 44, 200])
def test_any_byte_may_be_damaged(run, place, byte):
    data = bytearray((run / "metrics.csv").read_bytes())
    data[place % len(data)] = byte
    (run / "metrics.csv").write_bytes(data)
    rows, _ = read_rows(run / "metrics.csv")
    assert len(rows) >= 2 and all(list(r) == list(COLUMNS) for r in rows)


def test_a_header_in_the_middle_is_damage(run):
    """As where two files were joined."""
    lines = lines_of(run)
    (run / "metrics.csv").write_bytes(b"".join([*lines[:3], lines[0], *lines[3:]]))
    rows, damaged = read_rows(run / "metrics.csv")
    assert len(rows) == 4 and damaged == [lines[0].rstrip()]


def test_an_evaluation_that_the_checkpoint_does_not_know_is_made_again(tmp_path):
    """Of step 40, after that step's checkpoint was written: its row would stand there twice."""
    log = RunLog(RunFolder(tmp_path))
    for step in (20, 40):
        log.write(row(step, **{"return": 1.0}))
        log.write(row(step, eval_return_mean=2.0))
    log.close()
    RunLog(RunFolder(tmp_path), since=40, evaluated=20).close()
    rows, _ = read_rows(tmp_path / "metrics.csv")
    assert [(r["env_steps"], r["eval_return_mean"]) for r in rows] == [
        ("20", ""), ("20", "2"), ("40", ""),
    ]  # fmt: skip


def test_an_older_runs_columns_are_completed(tmp_path):
    (tmp_path / "metrics.csv").write_text(
        "env_steps,updates,episodes,wall_s,return\n10,1,1,2.0,3.5\n20,1,1,2.0,4.5\n30,1,"
    )
    rows, damaged = read_rows(tmp_path / "metrics.csv")
    assert [r["return"] for r in rows] == ["3.5", "4.5"] and not damaged
    assert set(rows[0]) == set(COLUMNS)


def test_summaries_are_strict_json(tmp_path):
    RunFolder(tmp_path).save_summary(
        {"a": float("nan"), "b": [np.float64("inf"), 1.5], "c": None, "d": "x"}
    )
    text = (tmp_path / "summary.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "a": None,
        "b": [None, 1.5],
        "c": None,
        "d": "x",
    }
    assert strict_json({"shape": (3, 2)}).split() == ["{", '"shape":', "[", "3,", "2", "]", "}"]


def write_rows(run, rows):
    log = RunLog(RunFolder(run))
    for step, values in rows:
        log.write(row(step, **values))
    log.close()


def evaluation(value, success=None):
    return {"eval_return_mean": value, "eval_success_rate": success}


def test_the_last_five_evaluations_on_the_way(tmp_path):
    """Not those before them, not the training episodes, not the one that ended the run."""
    write_rows(
        tmp_path,
        [
            *((10 * i, evaluation(float(i), i / 10)) for i in range(1, 8)),
            (75, {"return": 1e6}),
            (80, evaluation(1000.0, 1.0)),
        ],
    )
    assert last_evaluations(RunFolder(tmp_path), before=80) == {
        "last5_return_mean": 5.0,
        "last5_return_min": 3.0,
        "last5_success_mean": pytest.approx(0.5),
        "last5_success_min": 0.3,
    }
    with open(tmp_path / "metrics.csv", "a") as file:
        file.write("76,6")  # which a crash left incomplete
    assert last_evaluations(RunFolder(tmp_path), before=80)["last5_return_mean"] == 5.0


def test_fewer_evaluations_and_none(tmp_path):
    nothing = {
        "last5_return_mean": None,
        "last5_return_min": None,
        "last5_success_mean": None,
        "last5_success_min": None,
    }
    assert last_evaluations(RunFolder(tmp_path), before=10) == nothing
    write_rows(tmp_path, [(10, evaluation(4.0)), (20, evaluation(2.0)), (30, evaluation(9.0))])
    assert last_evaluations(RunFolder(tmp_path), before=10) == nothing
    assert last_evaluations(RunFolder(tmp_path), before=30) == {
        **nothing,
        "last5_return_mean": 3.0,
        "last5_return_min": 2.0,
    }


def test_what_is_not_finite_is_no_figure(tmp_path):
    write_rows(tmp_path, [(10, evaluation(float("nan"), 1.0)), (20, evaluation(2.0, 1.0))])
    found = last_evaluations(RunFolder(tmp_path), before=30)
    assert found["last5_return_mean"] is None and found["last5_return_min"] is None
    assert found["last5_success_mean"] == found["last5_success_min"] == 1.0


def test_the_glossary_has_every_metric():
    page = Path(__file__).parents[1] / "docs" / "watching.md"
    if not page.exists():
        pytest.skip("the documentation is not beside the tests")
    assert re.findall(r"^\| `(\w+)` \|", page.read_text(), re.MULTILINE) == list(COLUMNS)
