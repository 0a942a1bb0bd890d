"""What is shown while something runs: on a terminal and without one."""

import io
import time

import pytest
from rich.console import Console

from iqmpc import Trainer
from iqmpc.progress import RecordingDisplay, TrainingDisplay


def console(terminal):
    return Console(file=io.StringIO(), force_terminal=terminal, width=200)


def values(steps=0, updates=0, **more):
    return {"env_steps": steps, "updates": updates, "wall_s": 12.3, "return": None, **more}


def test_without_a_terminal_there_are_lines():
    out = console(False)
    with TrainingDisplay(1000, out, every_s=0) as display:
        display.message("500 initial updates on the first 500 steps")
        for made in (0, 25, 500):
            display.update(values(500, made, phase=("initial updates", made, 500)))
        display.update(values(525, 525, **{"return": 7.0}, q_difference=0.5, consistency=1e-3))
    lines = [line for line in out.file.getvalue().splitlines() if "(for" not in line]
    assert lines[0] == "500 initial updates on the first 500 steps"
    assert lines[1] == "initial updates: 0/500, 12 s  "
    assert lines[2].startswith("initial updates: 25/500, 12 s  ") and "updates/s" in lines[2]
    assert lines[3].startswith("initial updates: 500/500")
    assert lines[4].startswith("525/1000 steps, 525 updates, 12 s  last return 7")
    assert "Q expert-behaviour 0.50  consistency 1.0e-03" in lines[4]


def test_a_method_without_a_world_model_shows_what_it_has():
    out = console(False)
    with TrainingDisplay(1000, out, every_s=0) as display:
        display.update(values(525, 525, **{"return": 7.0}, q_difference=0.5))
    line = out.file.getvalue().splitlines()[0]
    assert "Q expert-behaviour 0.50" in line and "consistency" not in line


@pytest.mark.parametrize(
    "display",
    [lambda out: TrainingDisplay(1000, out, every_s=0.05), lambda out: TrainingDisplay(1000, out)],
)
def test_silence_is_broken(display):
    """Where nothing reports, as while an update is compiled, what is under way is said again."""
    out = console(False)
    with display(out) as shown:
        shown.message("5 initial updates on the first 9 steps")
        deadline = time.monotonic() + 60 * (shown._every_s < 1)
        while "(for" not in out.file.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
    said = out.file.getvalue().splitlines()
    if shown._every_s < 1:
        assert said[1] == "5 initial updates on the first 9 steps (for 0 s)"
    else:  # quick ones are left alone
        assert said == ["5 initial updates on the first 9 steps"]
    assert not shown._alive.is_alive()


def test_on_a_terminal_each_phase_has_a_bar_with_an_end():
    out = console(True)
    with TrainingDisplay(1000, out) as display:
        bars = lambda: [(t.description, t.completed, t.total) for t in display._bar.tasks]  # noqa: E731
        display.update(values(9))
        assert bars() == [("steps", 9, 1000)]
        display.update(values(10, 3, phase=("demo updates", 3, 8)))
        assert bars() == [("steps", 9, 1000), ("demo updates", 3, 8)]
        display.update(values(10, 8, phase=("initial updates", 0, 50)))
        assert bars() == [("steps", 9, 1000), ("initial updates", 0, 50)]
        display.update(values(11, 58))
        assert bars() == [("steps", 11, 1000)]
    assert not display._alive.is_alive() and "11/1000" in out.file.getvalue()


def test_a_short_recording_prints_no_line():
    out = console(False)
    with RecordingDisplay(2, out) as display:
        display.update(1, 1, 3.0)
    assert out.file.getvalue() == ""


@pytest.mark.parametrize("schedule", ["off", "sync", "async"])
def test_a_run_reports_its_phases(
    tmp_path, small_config, point_env, point_demonstrations, schedule
):
    """Each from none to all of it, announced with its number, and steps in between."""
    config = small_config.replace({"train.overlap": schedule, "train.demo_updates": 30})
    seen = []
    Trainer(
        config,
        point_env,
        point_demonstrations,
        run=tmp_path / "run",
        on_progress=lambda v: seen.append(v.get("phase", ("steps", v["env_steps"], 100))),
        on_message=seen.append,
    ).train()
    phases = [s for s in seen if isinstance(s, tuple)]
    for name, total in (("demo updates", 30), ("initial updates", 5), ("evaluation", 2)):
        done = [d for n, d, t in phases if n == name and t == total]
        assert done[0] == 0 and total in done and set(done) <= set(range(total + 1))
    assert ("demo updates", 25, 30) in phases and ("steps", 50, 100) in phases
    for message, phase in (
        ("30 demo updates on the demonstrations alone", ("demo updates", 0, 30)),
        ("5 initial updates on the first 40 steps", ("initial updates", 0, 5)),
    ):
        assert seen[seen.index(message) + 1] == phase
