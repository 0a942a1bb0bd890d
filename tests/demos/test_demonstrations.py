"""Sets in memory and on disk: what is saved is what is loaded, and a save is all or nothing."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iqmpc.demos import DemonstrationError, Demonstrations, demonstrations
from iqmpc.demos.checks import find_defects
from iqmpc.demos.demonstrations import packaged_path, packaged_tasks
from iqmpc.demos.formats import read
from iqmpc.errors import IqmpcError

DOCS = Path(__file__).parents[2] / "docs" / "demonstrations.md"
ANY_TEXT = st.characters(exclude_categories=["Cs"])


@st.composite
def sets(draw, make_episode):
    obs_dim, action_dim = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    no_rewards = {} if draw(st.booleans()) else {"rewards": None}
    defines_success = draw(st.booleans())
    episodes = [
        make_episode(
            steps,
            obs_dim,
            action_dim,
            seed,
            terminated=draw(st.booleans()),
            success=draw(st.booleans()) if defines_success else None,
            **no_rewards,
        )
        for seed, steps in enumerate(draw(st.lists(st.integers(1, 12), min_size=1, max_size=4)))
    ]
    # NumPy's fixed-length text drops trailing NULs; no task is named so.
    task = draw(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=8))
    notes = draw(st.dictionaries(st.text(ANY_TEXT, max_size=8), st.text(ANY_TEXT, max_size=8)))
    return Demonstrations(task, tuple(episodes), notes)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_hdf5_round_trip(tmp_path_factory, make_episode, assert_same, data):
    demos = data.draw(sets(make_episode))
    path = tmp_path_factory.mktemp("h5") / "set.h5"
    demos.save(path)
    assert_same(demos, Demonstrations.load(path))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_npz_is_read_as_documented(tmp_path_factory, make_episode, write_npz, assert_same, data):
    demos = data.draw(sets(make_episode))
    path = write_npz(tmp_path_factory.mktemp("npz") / "set.npz", demos)
    assert_same(replace(demos, provenance={}), Demonstrations.load(path))


def test_an_episode_longer_than_a_chunk(tmp_path, make_episode, assert_same):
    demos = Demonstrations("t", (make_episode(2500),))
    demos.save(tmp_path / "set.HDF5")
    assert_same(demos, Demonstrations.load(tmp_path / "set.HDF5"))


def test_figures_of_a_set(make_episode):
    rewards = np.array([1, 2], "f4"), np.array([1, 1, 3], "f4")
    episodes = (
        make_episode(2, rewards=rewards[0], success=True),
        make_episode(3, rewards=rewards[1], success=False),
    )
    demos = Demonstrations("t", episodes)
    assert (demos.obs_shape, demos.action_dim, len(demos), demos.transitions) == ((3,), 2, 2, 5)
    np.testing.assert_array_equal(demos.returns(), [3.0, 5.0])
    assert (demos.return_mean, demos.success_rate) == (4.0, 0.5)


def test_figures_that_were_not_recorded_are_none(make_episode):
    demos = Demonstrations("t", (make_episode(rewards=None),))
    assert demos.returns() is None
    assert demos.return_mean is None
    assert demos.success_rate is None


def test_select_takes_the_first_episodes(demos):
    assert demos.select(2).episodes == demos.episodes[:2]
    assert demos.select(3).provenance == demos.provenance


@pytest.mark.parametrize("n", [0, -1, 4])
def test_select_refuses_what_is_not_there(demos, n):
    with pytest.raises(DemonstrationError, match=f"^{n} episodes asked of walker-walk.* has 3$"):
        demos.select(n)


def test_best_takes_the_highest_returns_in_order(make_episode):
    values = (1.0, 5.0, 3.0, 5.0)
    episodes = tuple(
        dataclasses.replace(make_episode(4, 2, 2, 0), rewards=np.full(4, v, np.float32))
        for v in values
    )
    demos = Demonstrations("t", episodes, {"by": "me"})
    best = demos.best(3)
    assert best.episodes == (episodes[1], episodes[2], episodes[3])
    assert best.provenance == {"by": "me", "best": "3/4"}
    assert demos.best(1).episodes == (episodes[1],)  # of equal ones the first
    with pytest.raises(DemonstrationError, match="5 episodes asked of t, which has 4"):
        demos.best(5)
    without = tuple(dataclasses.replace(e, rewards=None) for e in episodes)
    with pytest.raises(DemonstrationError, match="of t have no rewards to choose by"):
        Demonstrations("t", without).best(2)


def test_an_unsound_set_cannot_be_built(make_episode):
    actions = np.full((4, 2), 2, np.float32)
    message = r"^t \(in memory\), episode 0, actions: found 2.0 at \[0, 0\] and 7 more, "
    with pytest.raises(DemonstrationError, match=message):
        Demonstrations("t", (make_episode(actions=actions),))


def test_a_set_is_checked_once_on_its_way_in(demos, tmp_path, monkeypatch):
    checks = []
    monkeypatch.setattr(
        demonstrations,
        "find_defects",
        lambda *args, **how: checks.append(args) or find_defects(*args, **how),
    )
    demos.save(tmp_path / "set.h5")
    assert not checks  # it was checked when it was made
    found = Demonstrations.load(tmp_path / "set.h5")
    assert len(checks) == 1
    found.select(2).save(tmp_path / "two.h5")
    assert len(checks) == 1
    Demonstrations.packaged("walker-walk").select(5)
    assert len(checks) == 2


def test_the_error_is_the_users_and_a_value_error():
    assert issubclass(DemonstrationError, IqmpcError) and issubclass(DemonstrationError, ValueError)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("set.pkl", "pickled files are refused, since loading one can run any code in it"),
        ("set.pt", "pickled files are refused"),
        ("set.h5", "pickled files are refused"),
        ("set", "pickled files are refused"),
    ],
)
def test_pickles_are_refused_by_name_and_by_content(tmp_path, name, message):
    path = tmp_path / name
    path.write_bytes(b"\x80\x04.")
    with pytest.raises(DemonstrationError, match=re.escape(f"{path}: {message}")):
        Demonstrations.load(path)


@pytest.mark.parametrize("name", ["set.csv", "set"])
def test_content_of_no_known_format_is_refused(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"1,2,3")
    message = (
        f"{path}: unknown extension {path.suffix!r} and no content of a known format; readable: "
        "hdf5, npz, minari, d4rl, robomimic, maniskill, lerobot"
    )
    with pytest.raises(DemonstrationError, match=f"^{re.escape(message)}$"):
        Demonstrations.load(path)


@pytest.mark.parametrize("name", ["absent.h5", "absent.npz"])
def test_a_missing_file(tmp_path, name):
    message = f"{tmp_path / name}: cannot be read: No such file or directory"
    with pytest.raises(DemonstrationError, match=f"^{re.escape(message)}$"):
        Demonstrations.load(tmp_path / name)


def test_a_folder_of_no_known_format(tmp_path):
    (tmp_path / "set.h5").mkdir()
    with pytest.raises(DemonstrationError, match="a folder that is neither a LeRobot"):
        Demonstrations.load(tmp_path / "set.h5")


def test_save_refuses_other_extensions(tmp_path, demos):
    with pytest.raises(DemonstrationError, match="are saved as .h5 or .hdf5"):
        demos.save(tmp_path / "set.npz")
    assert os.listdir(tmp_path) == []


def test_save_where_there_is_no_directory(tmp_path, demos):
    with pytest.raises(DemonstrationError, match="cannot be written: No such file or directory"):
        demos.save(tmp_path / "absent" / "set.h5")


def test_save_replaces_and_leaves_nothing_else(tmp_path, demos, assert_same):
    path = tmp_path / "set.h5"
    demos.save(path)
    demos.select(1).save(path)
    assert_same(demos.select(1), Demonstrations.load(path))
    assert os.listdir(tmp_path) == ["set.h5"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_an_interrupted_save_leaves_the_old_file(tmp_path, demos, monkeypatch, step):
    path = tmp_path / "set.h5"
    demos.save(path)
    before = path.read_bytes()

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, step, interrupt)
    with pytest.raises(KeyboardInterrupt):
        demos.select(1).save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["set.h5"]


def test_a_full_disk_leaves_the_old_file(tmp_path, demos, monkeypatch):
    path = tmp_path / "set.h5"
    demos.save(path)
    before = path.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DemonstrationError, match="cannot be written: No space left on device"):
        demos.select(1).save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["set.h5"]


def test_a_killed_save_leaves_the_old_file(tmp_path, demos):
    path = tmp_path / "set.h5"
    demos.save(path)
    before = path.read_bytes()
    killed = (
        "import os, signal, sys\n"
        "from iqmpc.demos import Demonstrations\n"
        "os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
        "demos = Demonstrations.load(sys.argv[1])\n"
        "demos.select(1).save(sys.argv[1])\n"
    )
    code = subprocess.run([sys.executable, "-c", killed, str(path)]).returncode
    assert code == -signal.SIGKILL
    assert path.read_bytes() == before


def test_the_tasks_that_ship():
    assert packaged_tasks() == ["cheetah-run", "walker-run", "walker-walk"]


@pytest.mark.parametrize("task", packaged_tasks())
def test_packaged_sets_are_sound_and_as_documented(task):
    assert list(find_defects(read(packaged_path(task)), task=task)) == []
    demos = Demonstrations.packaged(task)
    returns = demos.returns()
    steps = {len(episode.actions) for episode in demos.episodes}
    assert set(demos.provenance) == {
        "demonstrator",
        "demonstrator_steps",
        "action_repeat",
        "versions",
    }
    row = (
        f"| `{task}` | {len(demos)} × {steps.pop()} | {returns.mean():.1f} ± {returns.std():.1f} "
        f"| {returns.min():.1f} | {packaged_path(task).stat().st_size} "
        f"| {demos.provenance['demonstrator_steps']} |"
    )
    assert row in DOCS.read_text().splitlines()
    assert not steps


def test_packaged_sets_stay_small():
    assert sum(packaged_path(task).stat().st_size for task in packaged_tasks()) <= 3 * 2**20


def test_a_task_that_does_not_ship():
    message = "no demonstrations ship for 'dog-run'; they do for cheetah-run, walker-run, walker-"
    with pytest.raises(DemonstrationError, match=message):
        Demonstrations.packaged("dog-run")


def test_a_packaged_name_cannot_leave_the_package():
    with pytest.raises(DemonstrationError, match="no demonstrations ship"):
        Demonstrations.packaged("../data/walker-walk")


def test_packaged_actions_lead_from_one_observation_to_the_next():
    """Row t, action t and row t+1 are one transition of the simulator, rewards included."""
    suite = pytest.importorskip("dm_control.suite")
    env = suite.load("cheetah", "run")
    env.reset()
    physics = env.physics
    episode = Demonstrations.packaged("cheetah-run").episodes[0]
    for t in range(0, 500, 50):
        with physics.reset_context():
            physics.data.qpos[1:] = episode.observations[t, :8]
            physics.data.qvel[:] = episode.observations[t, 8:]
        reward = 0.0
        for _ in range(2):
            physics.set_control(episode.actions[t])
            physics.step()
            reward += env.task.get_reward(physics)
        after = np.concatenate(list(env.task.get_observation(physics).values()))
        np.testing.assert_allclose(after, episode.observations[t + 1], atol=1e-4)
        np.testing.assert_allclose(reward, episode.rewards[t], atol=1e-4)


def test_images_are_saved_and_read_as_they_are(tmp_path, make_episode, assert_same):
    frames = np.random.default_rng(0).integers(0, 256, (121, 3, 64, 64), np.uint8)
    demos = Demonstrations(
        "t", (make_episode(120, observations=frames), make_episode(2, observations=frames[:3]))
    )
    assert demos.obs_shape == (9, 64, 64)
    demos.save(tmp_path / "set.h5")
    assert_same(demos, Demonstrations.load(tmp_path / "set.h5"))
