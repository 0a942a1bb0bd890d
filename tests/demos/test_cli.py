"""`iqmpc demos` as a user types it."""

import json
import sys

import numpy as np
import pytest

from iqmpc.cli import main
from iqmpc.demos import Demonstrations
from iqmpc.demos.demonstrations import packaged_path


@pytest.fixture
def iqmpc(monkeypatch, capsys, tmp_path):
    """Run a command in an empty directory; its exit code and both outputs, in one line each."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["iqmpc", "demos", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        return end.value.code, out, err

    return run


def test_info_shows_what_a_set_holds(iqmpc, demos):
    demos.save("set.h5")
    code, out, _ = iqmpc("info", "set.h5")
    rows = dict(
        [cell.strip() for cell in line.split("│")[1:3]] for line in out.splitlines() if "│" in line
    )
    returns = demos.returns()
    assert code == 0
    assert rows == {
        "task": "walker-walk",
        "episodes": "3",
        "steps an episode": "4 to 6",
        "steps in all": "15",
        "observation values": "3",
        "action values": "2",
        "return": f"{returns.mean():.1f} ± {returns.std():.1f}",
        "success": "not defined",
        "terminated": "0 of 3",
        "provenance: demonstrator": "a test",
    }


def test_info_as_json(iqmpc, make_episode):
    episodes = [make_episode(rewards=None, success=i == 0, terminated=True) for i in range(4)]
    Demonstrations("lift", tuple(episodes), {"by": "[bold]me"}).save("set.h5")
    code, out, _ = iqmpc("info", "set.h5", "--json")
    assert code == 0
    assert json.loads(out) == {
        "task": "lift",
        "episodes": 4,
        "transitions": 16,
        "length_min": 4,
        "length_max": 4,
        "obs_dim": 3,
        "action_dim": 2,
        "return_mean": None,
        "return_sd": None,
        "success_rate": 0.25,
        "terminated": 4,
        "provenance": {"by": "[bold]me"},
    }
    code, out, _ = iqmpc("info", "set.h5")
    assert code == 0
    for text in ("not recorded", "25%", "4 of 4", "[bold]me"):
        assert text in out


def test_info_of_a_packaged_task(iqmpc):
    code, out, _ = iqmpc("info", "walker-walk", "--json")
    assert code == 0
    assert json.loads(out)["return_mean"] == Demonstrations.packaged("walker-walk").return_mean


def test_a_directory_of_that_name_does_not_hide_a_packaged_task(iqmpc, tmp_path):
    (tmp_path / "walker-walk").mkdir()
    assert iqmpc("info", "walker-walk")[0] == 0
    assert iqmpc("info", "./walker-walk")[0] == 2


def test_check_of_a_sound_file(iqmpc, demos):
    demos.save("set.h5")
    assert iqmpc("check", "set.h5", "--task", "walker-walk")[:2] == (
        0,
        "set.h5: ok, 3 episodes, 15 steps of walker-walk\n",
    )


def test_check_lists_every_defect(iqmpc, tmp_path, demos, write_npz):
    actions = np.concatenate([np.full_like(e.actions, 1.5) for e in demos.episodes])
    observations = np.concatenate([e.observations * np.nan for e in demos.episodes])
    write_npz(tmp_path / "set.npz", demos, actions=actions, observations=observations)
    code, out, _ = iqmpc("check", "set.npz", "--task", "walker-run")
    lines = out.splitlines()
    assert code == 1
    assert lines[0] == "set.npz, task: found 'walker-walk', expected 'walker-run'"
    assert len(lines) == 1 + 3 + 3 + 1
    assert lines[-1] == "set.npz: 7 defect(s)"


def test_check_of_a_damaged_file(iqmpc, tmp_path, demos):
    demos.save("set.h5")
    (tmp_path / "set.h5").write_bytes((tmp_path / "set.h5").read_bytes()[:-100])
    code, out, _ = iqmpc("check", "set.h5")
    assert code == 1
    assert out.startswith("set.h5: found a truncated or corrupt file (")


@pytest.mark.parametrize("command", [["info"], ["check"], ["convert", "--force"]])
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("absent.h5", "absent.h5: cannot be read: No such file or directory"),
        (
            "dog-run",
            "dog-run: no such file, nor a packaged task (cheetah-run, walker-run, walker-walk)",
        ),
        ("set.pkl", "set.pkl: pickled files are refused"),
    ],
)
def test_an_error_is_one_message_and_code_2(iqmpc, tmp_path, command, source, message):
    (tmp_path / "set.pkl").touch()
    target = ["out.h5"] if command[0] == "convert" else []
    code, out, err = iqmpc(*command, source, *target)
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "out.h5").exists()


def test_info_of_an_unsound_file_is_an_error(iqmpc, tmp_path, demos, write_npz):
    write_npz(tmp_path / "set.npz", demos, terminated=None)
    code, out, err = iqmpc("info", "set.npz")
    assert (code, out) == (2, "")
    assert "set.npz, terminated: found nothing, expected true or false per episode" in err


def test_convert(iqmpc, tmp_path, demos, write_npz, assert_same):
    write_npz(tmp_path / "set.npz", demos)
    code, out, _ = iqmpc(
        *("convert", "set.npz", "set.h5", "--episodes", 2),
        *("--provenance", "demonstrator=a test", "--provenance", "formula=a=b"),
    )
    size = (tmp_path / "set.h5").stat().st_size
    assert (code, out) == (0, f"set.h5: 2 episodes, {size} bytes\n")
    expected = Demonstrations(
        demos.task, demos.episodes[:2], {"demonstrator": "a test", "formula": "a=b"}
    )
    assert_same(expected, Demonstrations.load("set.h5"))


def test_convert_keeps_provenance_and_adds_to_it(iqmpc, demos):
    demos.save("a.h5")
    assert iqmpc("convert", "a.h5", "b.h5", "--provenance", "note=new")[0] == 0
    assert Demonstrations.load("b.h5").provenance == {"demonstrator": "a test", "note": "new"}


def test_converting_a_packaged_task_again_changes_no_byte(iqmpc, tmp_path):
    assert iqmpc("convert", "cheetah-run", "again.h5")[0] == 0
    assert (tmp_path / "again.h5").read_bytes() == packaged_path("cheetah-run").read_bytes()


def test_convert_names_the_task(iqmpc, tmp_path, demos, write_npz):
    write_npz(tmp_path / "set.npz", demos, task=None)
    code, _, err = iqmpc("convert", "set.npz", "set.h5")
    assert code == 2 and "set.npz, task: found nothing" in err
    assert iqmpc("convert", "set.npz", "set.h5", "--task", "my-task")[0] == 0
    assert Demonstrations.load("set.h5").task == "my-task"


def test_convert_overwrites_only_when_forced(iqmpc, tmp_path, demos):
    demos.save("a.h5")
    (tmp_path / "b.h5").write_bytes(b"precious")
    code, _, err = iqmpc("convert", "a.h5", "b.h5")
    assert code == 2 and "b.h5: exists; --force replaces it" in err
    assert (tmp_path / "b.h5").read_bytes() == b"precious"
    assert iqmpc("convert", "a.h5", "b.h5", "--force")[0] == 0
    assert len(Demonstrations.load("b.h5")) == 3


@pytest.mark.parametrize("note", ["note", "=value", "note="])
def test_convert_refuses_unreadable_provenance(iqmpc, tmp_path, demos, note):
    demos.save("a.h5")
    code, _, err = iqmpc("convert", "a.h5", "b.h5", "--provenance", note)
    assert code == 2 and f"--provenance {note}: needs KEY=VALUE" in err
    assert not (tmp_path / "b.h5").exists()


def test_convert_refuses_more_episodes_than_there_are(iqmpc, tmp_path, demos):
    demos.save("a.h5")
    code, _, err = iqmpc("convert", "a.h5", "b.h5", "--episodes", 9)
    assert code == 2 and "9 episodes asked of walker-walk, which has 3" in err
    assert not (tmp_path / "b.h5").exists()
