"""The flat layout: what is refused, and that nothing is ever unpickled."""

import io
import pickle
import zipfile

import numpy as np
import pytest

from iqmpc.demos import DemonstrationError, Demonstrations


@pytest.fixture
def defects_of(tmp_path, demos, write_npz):
    """The defects of the sound set's file with these members changed (None: left out)."""

    def defects(**changes):
        path = write_npz(tmp_path / "set.npz", demos, **changes)
        return load_defects(path)

    return defects


def load_defects(path):
    with pytest.raises(DemonstrationError) as error:
        Demonstrations.load(path)
    return [str(defect).removeprefix(str(path)) for defect in error.value.defects]


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("observations", "float32 [sum of T+1, O]"),
        ("actions", "float32 [sum of T, A]"),
        ("episode_lengths", "a whole number per episode"),
        ("terminated", "true or false per episode"),
        ("task", "the task's name"),
    ],
)
def test_a_missing_member(defects_of, key, expected):
    assert defects_of(**{key: None}) == [f", {key}: found nothing, expected {expected}"]


def test_rewards_and_success_may_be_missing(tmp_path, demos, write_npz):
    loaded = Demonstrations.load(write_npz(tmp_path / "set.npz", demos, rewards=None, success=None))
    assert len(loaded) == 3
    assert loaded.return_mean is None and loaded.success_rate is None


class Bomb:
    """Unpickling one is an assertion failure."""

    def __reduce__(self):
        return _explode, ()


def _explode():
    raise AssertionError("unpickled")


@pytest.mark.parametrize("key", ["observations", "episode_lengths", "task", "success"])
def test_object_arrays_are_refused_unread(defects_of, key):
    (defect,) = defects_of(**{key: np.array([Bomb()], dtype=object)})
    start = f", {key}: found pickled Python objects, which are never loaded, expected "
    assert defect.startswith(start)


def test_a_pickle_by_another_name_is_refused(tmp_path):
    path = tmp_path / "set.npz"
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(DemonstrationError, match="pickled files are refused"):
        Demonstrations.load(path)


def test_a_bare_array_is_no_archive(tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    (tmp_path / "set.npz").write_bytes(buffer.getvalue())
    (defect,) = load_defects(tmp_path / "set.npz")
    assert defect.startswith(": found a truncated archive or another format")


@pytest.mark.parametrize("part", [0.0, 0.3, 0.99])
def test_a_truncated_archive(tmp_path, demos, write_npz, part):
    path = write_npz(tmp_path / "set.npz", demos)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    assert load_defects(path) == [
        ": found a truncated archive or another format, expected a complete .npz archive"
    ]


def test_a_damaged_member(tmp_path, demos, write_npz):
    path = write_npz(tmp_path / "set.npz", demos)
    content = bytearray(path.read_bytes())
    where = content.find(demos.episodes[1].actions.tobytes())
    assert where > 0
    content[where] ^= 1
    path.write_bytes(content)
    (defect,) = load_defects(path)
    assert defect.startswith(", actions: found damage (Bad CRC-32")


def test_a_header_that_ends_in_the_middle(tmp_path, demos, write_npz):
    """NumPy's parser of old headers raises an error of Python's tokenizer."""
    path = write_npz(tmp_path / "set.npz", demos, actions=None)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("actions.npy", b"\x93NUMPY\x01\x00\x10\x00" + b"{'descr': (((((\n")
    (defect,) = load_defects(path)
    assert defect.startswith(", actions: found damage (")


def test_what_a_file_says_of_itself_is_cut(tmp_path, demos, write_npz):
    path = write_npz(tmp_path / "set.npz", demos, task=None)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("task.npy", np.lib.format.MAGIC_PREFIX + b"x" * 9000)
    (defect,) = load_defects(path)
    assert len(defect) < 700


def test_a_member_that_is_no_array(tmp_path, demos, write_npz):
    path = write_npz(tmp_path / "set.npz", demos, task=None)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("task.npy", b"walker-walk")
    assert load_defects(path) == [", task: found b'walker-walk', expected the task's name"]


def test_lengths_that_do_not_add_up(defects_of):
    assert defects_of(episode_lengths=np.array([4, 5, 7])) == [
        ", observations: found 18 rows, expected 19 rows, as episode_lengths says",
        ", actions: found 15 rows, expected 16 rows, as episode_lengths says",
        ", rewards: found 15 rows, expected 16 rows, as episode_lengths says",
    ]


def test_fewer_flags_than_episodes(defects_of):
    assert defects_of(terminated=np.zeros(2, bool)) == [
        ", terminated: found 2 rows, expected 3 rows, as episode_lengths says"
    ]


def test_negative_lengths(defects_of):
    assert defects_of(episode_lengths=np.array([-1, 5, 11]), task=None) == [
        ", task: found nothing, expected the task's name",
        ", episode_lengths: found -1, expected no negative lengths",
    ]


def test_no_episodes(defects_of):
    empty = np.zeros(0, np.float32)
    defects = defects_of(
        observations=empty.reshape(0, 3),
        actions=empty.reshape(0, 2),
        rewards=empty,
        episode_lengths=np.zeros(0, int),
        terminated=np.zeros(0, bool),
        success=empty,
    )
    assert defects == [", episodes: found none, expected at least one"]


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [
        ("observations", np.zeros((18, 3)), "float64 array of shape [18, 3]"),
        ("actions", np.zeros(30, np.float32), "float32 array of shape [30]"),
        ("episode_lengths", np.array([4.0, 5.0, 6.0]), "float64 array of shape [3]"),
        ("terminated", np.zeros(3), "float64 array of shape [3]"),
        ("task", np.array(["walker-walk"]), "<U11 array of shape [1]"),
    ],
)
def test_a_member_of_the_wrong_kind(defects_of, key, value, found):
    (defect,) = defects_of(**{key: value})
    assert defect.startswith(f", {key}: found {found}, expected ")


def test_success_is_one_zero_or_undefined(defects_of):
    assert defects_of(success=np.array([1, 0.5, 0], np.float32)) == [
        ", episode 1, success: found 0.5, expected 1, 0 or NaN"
    ]


def test_values_are_checked_in_the_episode_where_they_lie(defects_of, demos):
    actions = np.concatenate([e.actions for e in demos.episodes])
    actions[4 + 2, 1] = 1.25
    assert defects_of(actions=actions) == [
        ", episode 1, actions: found 1.25 at [2, 1], expected values in [-1, 1]; "
        "--clip-actions where the simulator clipped them, --action-low and --action-high "
        "rescale from another range"
    ]
