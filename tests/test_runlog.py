import pytest

from iqmpc.runlog import RunLog, last_evaluations


def write_rows(run, rows):
    log = RunLog(run)
    for step, values in rows:
        log.write({"env_steps": step, **values})
    log.close()


def evaluation(value, success=None):
    return {"eval_return_mean": value, "eval_success_rate": success}


def test_the_last_five_evaluations_on_the_way(tmp_path):
    """Not those before them, not the training episodes, not the one that ended the run."""
    write_rows(tmp_path, [
        *((10 * i, evaluation(float(i), i / 10)) for i in range(1, 8)), (75, {"return": 1e6}),
        (80, evaluation(1000.0, 1.0))])
    assert last_evaluations(tmp_path, before=80) == {
        "last5_return_mean": 5.0, "last5_return_min": 3.0,
        "last5_success_mean": pytest.approx(0.5), "last5_success_min": 0.3}
    with open(tmp_path / "metrics.csv", "a") as file:
        file.write("76,6")  # which a crash left incomplete
    assert last_evaluations(tmp_path, before=80)["last5_return_mean"] == 5.0


def test_fewer_evaluations_and_none(tmp_path):
    nothing = {"last5_return_mean": None, "last5_return_min": None,
               "last5_success_mean": None, "last5_success_min": None}
    assert last_evaluations(tmp_path, before=10) == nothing
    write_rows(tmp_path, [(10, evaluation(4.0)), (20, evaluation(2.0)), (30, evaluation(9.0))])
    assert last_evaluations(tmp_path, before=10) == nothing
    assert last_evaluations(tmp_path, before=30) == {
        **nothing, "last5_return_mean": 3.0, "last5_return_min": 2.0}


def test_what_is_not_finite_is_no_figure(tmp_path):
    write_rows(tmp_path, [(10, evaluation(float("nan"), 1.0)), (20, evaluation(2.0, 1.0))])
    found = last_evaluations(tmp_path, before=30)
    assert found["last5_return_mean"] is None and found["last5_return_min"] is None
    assert found["last5_success_mean"] == found["last5_success_min"] == 1.0
