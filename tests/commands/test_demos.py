"""`iqmpc demos` as a user types it."""

import json
import pickle
import sys

import numpy as np
import pytest

from iqmpc.cli import main
from iqmpc.demos import Demonstrations, demonstrations
from iqmpc.demos.checks import find_defects
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


def test_a_set_is_checked_once_by_each_command(iqmpc, demos, monkeypatch):
    checks = []
    monkeypatch.setattr(
        demonstrations,
        "find_defects",
        lambda *args, **how: checks.append(args) or find_defects(*args, **how),
    )
    demos.save("set.h5")
    for words in (
        ("info", "set.h5"),
        ("check", "set.h5"),
        ("convert", "set.h5", "new.h5", "--episodes", 2, "--task", "other", "--provenance", "a=b"),
    ):
        checks.clear()
        assert iqmpc(*words)[0] == 0
        assert len(checks) == 1, words


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
        "obs_shape": [3],
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
    assert lines[0] == (
        "set.npz, task: found 'walker-walk', expected 'walker-run' (iqmpc demos "
        "convert --task renames it, a run's own is task.name)"
    )
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


def test_info_draws_the_distributions(iqmpc, tmp_path, demos, make_episode):
    pytest.importorskip("matplotlib")
    demos.save("set.h5")
    code, out, _ = iqmpc("info", "set.h5", "--out", "info.png")
    assert code == 0 and "walker-walk" in out  # the table stays
    assert (tmp_path / "info.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    solved = [make_episode(5 + i, success=i > 0, rewards=None, seed=i) for i in range(4)]
    Demonstrations("lift", tuple(solved)).save("lift.h5")
    assert iqmpc("info", "lift.h5", "--out", "lift.svg")[0] == 0
    svg = (tmp_path / "lift.svg").read_text()
    for text in ("lift: 4 episodes, 26 steps", "not recorded", "not solved", "share of steps"):
        assert f"<!-- {text} -->" in svg
    code, _, err = iqmpc("info", "set.h5", "--out", "info.doc")
    assert code == 2 and "must be a .png, .pdf or .svg file, got info.doc" in err


@pytest.mark.parametrize("name", ["minari", "d4rl", "robomimic", "maniskill", "lerobot"])
def test_other_formats_are_shown_checked_and_converted(iqmpc, tmp_path, demos, write_format, name):
    path = write_format(name, tmp_path, demos)
    assert iqmpc("info", path, "--task", demos.task)[0] == 0
    code, out, _ = iqmpc("check", path, "--task", demos.task)
    assert code == 0 and "ok, 3 episodes" in out
    assert iqmpc("convert", path, "set.h5", "--task", "renamed", "--format", name)[0] == 0
    found = Demonstrations.load("set.h5", task="renamed")
    assert found.provenance["source_format"] == name and found.provenance["source"] == path.name


def test_facts_are_given_as_options(iqmpc, tmp_path, demos, write_format):
    path = write_format("robomimic", tmp_path, demos)
    code, out, _ = iqmpc(
        *("info", path, "--json", "--mask", "train", "--obs-keys", "object,eef"),
        *("--action-low", "-2", "--action-high", "2,2"),
    )
    shown = json.loads(out)
    assert code == 0 and shown["episodes"] == 2
    assert shown["provenance"]["actions_rescaled_from"] == "[-2] to [2]"
    code, _, err = iqmpc("check", path, "--action-low", "a")
    assert code == 2 and "--action-low a: needs N or N,N," in err
    code, _, err = iqmpc("check", path, "--episode-length", 5)
    assert code == 2 and "--episode-length means nothing in the format robomimic" in err
    code, _, err = iqmpc("check", path, "--format", "csv")
    assert code == 2 and "unknown format 'csv'" in err


def test_legacy_pickles_are_converted_when_asked(iqmpc, tmp_path, demos):
    held = {
        "states": [e.observations for e in demos.episodes],
        "actions": [e.actions for e in demos.episodes],
    }
    (tmp_path / "expert.pkl").write_bytes(pickle.dumps(held))
    code, _, err = iqmpc("convert", "expert.pkl", "set.h5", "--task", "t")
    assert code == 2 and "--legacy-pickle" in err
    code, _, err = iqmpc("convert", "--legacy-pickle", "expert.pkl", "set.h5")
    assert code == 2 and "task: found nothing, expected the task's name" in err
    assert iqmpc("convert", "--legacy-pickle", "expert.pkl", "set.h5", "--task", "t")[0] == 0
    found = Demonstrations.load("set.h5", task="t")
    np.testing.assert_array_equal(found.episodes[1].actions, demos.episodes[1].actions)
    (tmp_path / "bad.pkl").write_bytes(b"cos\nsystem\n(Vtouch pwned\ntR.")
    code, _, err = iqmpc("convert", "--legacy-pickle", "bad.pkl", "b.h5", "--task", "t")
    assert code == 2 and "found 'os.system', expected a pickle of NumPy arrays" in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.pkl", "expert.pkl", "set.h5"]


def test_make_records_an_sb3_policy(iqmpc, tmp_path):
    sb3 = pytest.importorskip("stable_baselines3")
    sb3.SAC("MlpPolicy", "Pendulum-v1", device="cpu", seed=0).save(tmp_path / "sac.zip")
    words = ["make", "task=gym", "env_id=Pendulum-v1", "--policy", "sb3:sac.zip"]
    code, _, err = iqmpc(*words, "--episodes", 2, "--out", "set.h5", "--seed", 3, "--noise", 0.1)
    assert code == 0, err
    found = Demonstrations.load("set.h5", task="gym-pendulum-v1", obs_dim=3, action_dim=1)
    assert [len(e.actions) for e in found.episodes] == [200, 200]
    assert found.provenance["policy"].startswith("sac.zip, sha256 ")
    assert (found.provenance["seed"], found.provenance["action_noise"]) == ("3", "0.1")
    code, _, err = iqmpc(*words, "--out", "set.h5")
    assert code == 2 and "set.h5 exists; --force overwrites it" in err
    code, _, err = iqmpc(
        *words, "--episodes", 1, "--max-tries", 2, "--min-return", 0, "--out", "none.h5"
    )
    assert code == 2 and "0 of 1 episodes were kept after 2 tries: 0 reached a return of 0" in err
    assert not (tmp_path / "none.h5").exists()


TINY = [
    "model.encoder_dim=16", "model.hidden_dim=16", "model.latent_dim=16", "planner.samples=16",
    "planner.elites=4", "planner.policy_trajectories=4", "planner.iterations=1",
    "learner.mode=eager", "learner.batch=8", "train.random_steps=20", "train.initial_updates=2",
    "train.eval_every=20", "train.eval_episodes=1", "train.final_episodes=1", "threads=1",
    "task.episode_length=10",
]  # fmt: skip


def test_make_trains_a_demonstrator_where_there_is_none(iqmpc, tmp_path):
    words = ["make", "task=gym", "env_id=Pendulum-v1", *TINY, "--run-dir", "run", "--episodes", 2]
    code, _, err = iqmpc(*words, "--train-steps", 30, "--out", "a.h5")
    assert code == 0, err
    found = Demonstrations.load("a.h5", task="gym-pendulum-v1")
    assert found.provenance["objective"] == "td" and found.provenance["trained_steps"] == "30"
    # The same run, not trained again, then trained on.
    code, _, err = iqmpc(*words, "--train-steps", 30, "--out", "b.h5", "--policy", "run:run")
    assert code == 0, err
    code, _, err = iqmpc(*words, "--train-steps", 30, "--out", "c.h5")
    assert code == 0 and "continuing" not in err
    sets = [(tmp_path / name).read_bytes() for name in ("a.h5", "b.h5", "c.h5")]
    assert sets[0] == sets[1] == sets[2]
    code, _, err = iqmpc(*words, "--train-steps", 40, "--out", "d.h5")
    assert code == 0 and "continuing from step_000000030" in err
    assert Demonstrations.load("d.h5").provenance["trained_steps"] == "40"
    code, _, err = iqmpc("make", "walker-walk", "--run-dir", "run", "--out", "e.h5")
    assert code == 2 and "run holds a run of gym-pendulum-v1" in err and "another --run-dir" in err
    code, _, err = iqmpc("make", "walker-walk", "--policy", "run:run", "--out", "e.h5")
    assert code == 2 and "has observations [3] and 1 actions, the task [24] and 6" in err


def test_a_task_with_its_own_demonstrator(iqmpc, monkeypatch):
    from iqmpc import demonstrators

    class Still:
        def reset(self, env):
            assert env.unwrapped.spec.id == "Pendulum-v1"

        def __call__(self, obs):
            return np.zeros(1)

    asked = []

    def still(env, seed):
        asked.append(seed)
        return demonstrators.Demonstrator(Still(), provenance={"demonstrator": "stands still"})

    monkeypatch.setitem(demonstrators.DEMONSTRATORS, "gym-pendulum-v1", still)
    code, _, err = iqmpc(
        "make", "task=gym", "env_id=Pendulum-v1", "--episodes", 1, "--seed", 7, "--out", "set.h5"
    )
    assert code == 0, err
    found = Demonstrations.load("set.h5")
    assert asked == [7] and not found.episodes[0].actions.any()
    assert found.provenance["demonstrator"] == "stands still"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["walker-wlak", "--out", "a.h5"], "did you mean 'walker-walk'?"),
        (["walker-walk", "--out", "a.npz"], "a.npz must be an .h5 file in a folder that exists"),
        (["walker-walk", "--out", "nowhere/a.h5"], "in a folder that exists"),
        (["walker-walk", "--out", "a.h5", "--policy", "zip"], "--policy must be sb3:ZIP, run:RUN"),
        (["walker-walk", "--out", "a.h5", "--policy", "sb3:x.zip"], "x.zip: cannot be read"),
        (["walker-walk", "--out", "a.h5", "--policy", "run:x"], "x is no run folder"),
    ],
)
def test_make_refuses_what_it_cannot_do(iqmpc, tmp_path, words, message):
    code, out, err = iqmpc("make", *words)
    assert (code, out) == (2, "") and message in err
    assert not list(tmp_path.iterdir())


def test_what_a_file_says_does_not_steer_the_terminal(iqmpc, demos):
    from dataclasses import replace

    replace(demos, provenance={"by": "\x1b[2J\x1b]0;owned\x07"}).save("set.h5")
    code, out, err = iqmpc("info", "set.h5")
    assert code == 0 and "\x1b[2J" not in out and "\\x1b[2J" in out
    replace(demos, task="\x1b[31m").save("odd.h5")
    code, out, err = iqmpc("check", "odd.h5", "--task", "x")
    assert code == 1 and "\x1b" not in out + err
    code, out, err = iqmpc("check", "odd.h5")
    assert code == 0 and "\x1b" not in out + err


def test_actions_that_the_simulator_clips_are_converted(iqmpc, demos, write_npz, tmp_path):
    actions = np.concatenate([e.actions for e in demos.episodes])
    actions[0, 0] = 3.0
    write_npz(tmp_path / "set.npz", demos, actions=actions)
    code, out, err = iqmpc("convert", "set.npz", "a.h5", "--clip-actions", "--episodes", 2)
    assert code == 0, err
    found = Demonstrations.load("a.h5")
    assert len(found) == 2 and found.episodes[0].actions[0, 0] == 1
    assert found.provenance["actions_clipped"] == "1 values to [-1, 1], in 1 steps"
