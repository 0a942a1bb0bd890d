"""Learning curves: one run as it is, several seeds as one."""

import numpy as np
import pytest
from typer.testing import CliRunner

from iqmpc import compose
from iqmpc import plot as module
from iqmpc.cli import app
from iqmpc.errors import CheckpointError, IqmpcError
from iqmpc.plot import bootstrap_band, over_seeds, plot, read_curve
from iqmpc.run_folder import RunFolder
from iqmpc.runlog import RunLog


@pytest.fixture
def make_run(tmp_path):
    def make(seed=0, words=(), steps=(10, 20, 30), scale=1.0, demonstrator=90.0):
        run = tmp_path / f"seed{seed}{'-'.join(words)}"
        run.mkdir()
        RunFolder(run).save_config(compose([f"seed={seed}", *words]), new=True)
        log = RunLog(RunFolder(run))
        for step in steps:
            at = {"env_steps": step, "updates": step, "episodes": 1, "wall_s": 6.0 * step}
            log.write({**at, "return": 5.0})
            log.write({**at, "eval_return_mean": scale * step})
        log.close()
        if demonstrator is not None:
            RunFolder(run).save_summary({"demonstrator_return": demonstrator})
        return run

    return make


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Plots runs and returns the axes along environment steps and along minutes."""
    figures = []
    original = module.save_figure
    monkeypatch.setattr(
        module, "save_figure", lambda figure, out: (figures.append(figure), original(figure, out))
    )

    def draw(*runs, **options):
        plot(runs, tmp_path / "curves.png", **options)
        assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
        return figures[-1].axes

    return draw


def labels(axis):
    return [text.get_text() for text in axis.get_legend().get_texts()]


def test_agents_are_curves_of_their_own(make_run, drawn):
    steps, _ = drawn(make_run(0), make_run(1, ["agent=bc"]))
    assert labels(steps) == ["walker-walk, seed 0", "walker-walk, agent=bc, seed 1"]


def test_seeds_of_the_same_settings_are_one_curve(make_run, drawn):
    steps, minutes = drawn(make_run(0), make_run(1, scale=3.0), make_run(2, ["model.critics=3"]))
    assert labels(steps) == ["walker-walk, 2 seeds", "walker-walk, model.critics=3, seed 2"]
    mean = next(line for line in steps.lines if line.get_label() == "walker-walk, 2 seeds")
    assert mean.get_xydata().tolist() == [[10, 20], [20, 40], [30, 60]]
    (band,) = steps.collections
    assert (band.get_datalim(steps.transData).min, band.get_datalim(steps.transData).max) == (
        pytest.approx((10, 10)),
        pytest.approx((30, 90)),
    )
    dots = [line for line in steps.lines if line.get_marker() == "o"]
    assert len(dots) == 3  # every seed's evaluations
    dashed = [line for line in steps.lines if line.get_linestyle() == "--"]
    assert [line.get_ydata()[0] for line in dashed] == [90, 90]  # one for each curve
    along_minutes = next(x for x in minutes.lines if x.get_label() == "walker-walk, 2 seeds")
    assert along_minutes.get_xdata().tolist() == [1, 2, 3]


def test_a_single_run_shows_its_training_and_no_band(make_run, drawn):
    steps, _ = drawn(make_run(demonstrator=None))
    assert labels(steps) == ["walker-walk, seed 0"] and not steps.collections
    assert [line.get_ydata().tolist() for line in steps.lines] == [[5, 5, 5], [10, 20, 30]]


def test_runs_that_have_not_evaluated_yet(make_run, drawn):
    steps, _ = drawn(make_run(0, steps=()), make_run(1, steps=()))
    assert labels(steps) == ["walker-walk, 2 seeds"]
    steps, _ = drawn(make_run(2, steps=(10, 20)), make_run(3, steps=()))
    assert labels(steps) == ["walker-walk, 2 seeds"]


def test_over_seeds_is_over_what_all_have():
    one = np.array([0.0, 10, 20]), np.array([0.0, 10, 20])
    two = np.array([5.0, 10, 30]), np.array([15.0, 20, 40])
    grid, mean, least, greatest = over_seeds([one, two])
    assert grid.tolist() == [5, 10, 20]
    assert mean.tolist() == [10, 15, 25]
    assert least.tolist() == [5, 10, 20] and greatest.tolist() == [15, 20, 30]
    apart = over_seeds([one, (np.array([50.0]), np.array([1.0]))])
    assert [x.tolist() for x in apart] == [[]] * 4


def test_the_csv_has_every_point(make_run, drawn, tmp_path):
    drawn(make_run(0, steps=(10,)), make_run(1, steps=(20,)))
    assert (tmp_path / "curves.csv").read_text().splitlines() == [
        "task,seed,env_steps,minutes,kind,return",
        "walker-walk,0,10,1.0,training,5.0",
        "walker-walk,0,10,1.0,evaluation,10.0",
        "walker-walk,1,20,2.0,training,5.0",
        "walker-walk,1,20,2.0,evaluation,20.0",
    ]


def test_what_cannot_be_drawn_is_named(make_run, tmp_path):
    with pytest.raises(IqmpcError, match="must be a .png, .pdf or .svg file"):
        plot([make_run()], tmp_path / "curves.doc")
    (tmp_path / "seed0" / "metrics.csv").unlink()
    with pytest.raises(CheckpointError, match="seed0 has no metrics.csv"):
        read_curve(tmp_path / "seed0")


def test_a_band_of_bootstrapped_means():
    x = np.array([0.0, 10.0])
    curves = [(x, np.array([float(seed), 5.0])) for seed in range(8)]
    grid, mean, low, high = bootstrap_band(curves)
    assert grid.tolist() == [0, 10] and mean.tolist() == [3.5, 5]
    spread = 1.96 * np.std(range(8)) / np.sqrt(8)  # of the mean of eight, where it is normal
    assert low == pytest.approx([3.5 - spread, 5], abs=0.2)
    assert high == pytest.approx([3.5 + spread, 5], abs=0.2)


def test_groups_are_means_with_a_band_and_a_title(make_run, drawn):
    runs = [make_run(seed, scale=1.0 + seed) for seed in range(3)]
    steps, _ = drawn(*runs, group=True, title="three seeds")
    assert steps.figure.get_suptitle() == "three seeds"
    assert labels(steps) == ["walker-walk, 3 seeds"]
    (mean,) = (line for line in steps.lines if line.get_linestyle() == "-")
    assert mean.get_xydata().tolist() == [[10, 20], [20, 40], [30, 60]]
    (band,) = steps.collections
    assert band.get_datalim(steps.transData).max == pytest.approx((30, 90))
    assert "bootstrapped" in steps.get_legend().get_title().get_text()


def test_the_command_takes_globs(make_run, tmp_path):
    make_run(0), make_run(1)
    words = ["plot", str(tmp_path / "seed*"), "--out", str(tmp_path / "c.svg"), "--group"]
    result = CliRunner().invoke(app, [*words, "--title", "both seeds"])
    assert result.exit_code == 0, result.output
    rows = (tmp_path / "c.csv").read_text().splitlines()
    assert {row.split(",")[1] for row in rows[1:]} == {"0", "1"}
