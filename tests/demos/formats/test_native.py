"""Files that are not what they should be are refused whole, with the reason."""

import json

import h5py
import numpy as np
import pytest

from iqmpc.demos import DemonstrationError, Demonstrations
from iqmpc.demos.formats import native


@pytest.fixture
def path(tmp_path, demos):
    """A sound file, for the test to spoil."""
    demos.save(tmp_path / "set.h5")
    return tmp_path / "set.h5"


def defects_of(path):
    with pytest.raises(DemonstrationError) as error:
        Demonstrations.load(path)
    prefix = str(path)
    assert all(str(defect).startswith(prefix) for defect in error.value.defects)
    return [str(defect).removeprefix(prefix) for defect in error.value.defects]


def test_the_layout_is_the_documented_one(path, demos):
    with h5py.File(path) as file:
        assert file.attrs["format"] == b"iqmpc-demonstrations"
        assert file.attrs["version"] == 1
        assert file.attrs["task"] == b"walker-walk"
        assert json.loads(file.attrs["provenance"]) == {"demonstrator": "a test"}
        assert list(file["episodes"]) == ["000000", "000001", "000002"]
        episode = file["episodes/000001"]
        assert set(episode) == {"observations", "actions", "rewards"}
        assert dict(episode.attrs) == {"terminated": False}
        np.testing.assert_array_equal(episode["actions"], demos.episodes[1].actions)
        for dataset in episode.values():
            assert (dataset.compression, dataset.shuffle, dataset.fletcher32) == (
                "gzip",
                True,
                True,
            )


def test_a_plainly_written_file_is_read(tmp_path, demos, assert_same):
    """What the documentation tells other programs to write: no compression, ordinary text."""
    with h5py.File(tmp_path / "plain.h5", "w") as file:
        file.attrs.update(format="iqmpc-demonstrations", version=1, task=demos.task)
        file.attrs["provenance"] = json.dumps(demos.provenance)
        for index, episode in enumerate(demos.episodes):
            group = file.create_group(f"episodes/{index:06d}")
            group.attrs["terminated"] = False
            for key in ("observations", "actions", "rewards"):
                group[key] = getattr(episode, key)
    assert_same(demos, Demonstrations.load(tmp_path / "plain.h5"))


def test_the_same_set_gives_the_same_bytes(demos):
    first = native.encode(demos.task, demos.episodes, demos.provenance)
    assert first == native.encode(demos.task, demos.episodes, demos.provenance)


def test_no_hdf5_file(tmp_path):
    (tmp_path / "set.h5").write_bytes(b"not at all")
    assert defects_of(tmp_path / "set.h5") == [": found no HDF5 signature, expected an HDF5 file"]


def test_an_empty_file(tmp_path):
    (tmp_path / "set.h5").touch()
    assert defects_of(tmp_path / "set.h5") == [": found no HDF5 signature, expected an HDF5 file"]


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file(path, part):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    (defect,) = defects_of(path)
    assert defect.startswith(": found a truncated or corrupt file (")
    assert defect.endswith("), expected a complete HDF5 file")


def test_one_wrong_byte_in_the_data(path, demos):
    with h5py.File(path) as file:
        offset = file["episodes/000001/actions"].id.get_chunk_info(0).byte_offset
    content = bytearray(path.read_bytes())
    content[offset + 3] ^= 1
    path.write_bytes(content)
    (defect,) = defects_of(path)
    assert defect.startswith(", episode 1, actions: found unreadable data (")


def test_a_wrong_byte_anywhere_is_never_learned_from(path, demos, assert_same):
    content = path.read_bytes()
    refused = 0
    for offset in np.random.default_rng(0).integers(len(content), size=200):
        spoilt = bytearray(content)
        spoilt[offset] ^= 0x55
        path.write_bytes(spoilt)
        try:
            loaded = Demonstrations.load(path)
        except DemonstrationError:
            refused += 1
        else:
            assert_same(demos, loaded)
    assert refused > 100


def test_a_newer_version(path):
    with h5py.File(path, "a") as file:
        file.attrs["version"] = 2
    assert defects_of(path) == [
        ", version: found 2, expected at most 1; upgrade iqmpc to read this file"
    ]


@pytest.mark.parametrize("version", ["1", 0, 1.5])
def test_no_version(path, version):
    with h5py.File(path, "a") as file:
        file.attrs["version"] = version
    (defect,) = defects_of(path)
    assert defect.startswith(", version: found ")
    assert defect.endswith(", expected a whole number from 1")


@pytest.mark.parametrize("kind", [None, "robomimic", 3])
def test_another_hdf5_layout(path, kind):
    with h5py.File(path, "a") as file:
        del file.attrs["format"]
        if kind is not None:
            file.attrs["format"] = kind
    found = {None: "nothing", 3: "3"}.get(kind, "'robomimic'")
    (defect,) = defects_of(path)
    assert defect == (
        f", format: found {found}, expected 'iqmpc-demonstrations', "
        "or the layout of Minari, D4RL, robomimic or ManiSkill"
    )


def test_missing_task(path):
    with h5py.File(path, "a") as file:
        del file.attrs["task"]
    assert defects_of(path) == [", task: found nothing, expected the task's name"]


def test_provenance_may_be_missing_but_not_wrong(path):
    with h5py.File(path, "a") as file:
        del file.attrs["provenance"]
    assert Demonstrations.load(path).provenance == {}
    with h5py.File(path, "a") as file:
        file.attrs["provenance"] = "{not json"
    assert defects_of(path) == [", provenance: found '{not json', expected a JSON object"]


def test_no_episodes(path):
    with h5py.File(path, "a") as file:
        del file["episodes"]
    assert defects_of(path) == [", episodes: found none, expected at least one"]


def test_a_gap_in_the_episodes(path):
    with h5py.File(path, "a") as file:
        del file["episodes/000001"]
    assert defects_of(path) == [
        ", episode 1, 000001: found nothing, "
        "expected a group for every episode, numbered from 000000"
    ]


@pytest.mark.parametrize("key", ["observations", "actions"])
def test_a_missing_dataset(path, key):
    with h5py.File(path, "a") as file:
        del file[f"episodes/000002/{key}"]
    (defect,) = defects_of(path)
    assert defect.startswith(f", episode 2, {key}: found nothing, expected a float32 array [T")


def test_a_missing_attribute(path):
    with h5py.File(path, "a") as file:
        del file["episodes/000000"].attrs["terminated"]
    assert defects_of(path) == [", episode 0, terminated: found nothing, expected true or false"]


def test_a_group_where_a_dataset_should_be(path):
    with h5py.File(path, "a") as file:
        del file["episodes/000000/rewards"]
        file.create_group("episodes/000000/rewards")
    assert defects_of(path) == [", episode 0, rewards: found a Group, expected a Dataset"]


def test_text_where_numbers_should_be(path):
    with h5py.File(path, "a") as file:
        del file["episodes/000000/rewards"]
        file["episodes/000000/rewards"] = ["a", "b", "c", "d"]
    assert defects_of(path) == [", episode 0, rewards: found dtype object, expected float32"]


@pytest.mark.parametrize(
    "link", [h5py.ExternalLink("other.h5", "/secret"), h5py.SoftLink("/episodes/000001/rewards")]
)
def test_links_are_refused(path, link):
    with h5py.File(path.with_name("other.h5"), "w") as other:
        other["secret"] = np.zeros(4, np.float32)
    with h5py.File(path, "a") as file:
        del file["episodes/000000/rewards"]
        file["episodes/000000/rewards"] = link
    assert defects_of(path) == [
        f", episode 0, rewards: found a {type(link).__name__}, expected a Dataset"
    ]


def test_data_in_another_file_is_refused(path):
    secret = path.with_name("secret")
    secret.write_bytes(bytes(16))
    with h5py.File(path, "a") as file:
        del file["episodes/000000/rewards"]
        file["episodes/000000"].create_dataset(
            "rewards", (4,), "f4", external=[(str(secret), 0, 16)]
        )
        virtual = h5py.VirtualLayout(shape=(5,), dtype="f4")
        virtual[:] = h5py.VirtualSource("other.h5", "secret", shape=(5,))
        del file["episodes/000001/rewards"]
        file["episodes/000001"].create_virtual_dataset("rewards", virtual)
    assert defects_of(path) == [
        f", episode {i}, rewards: found data kept in another file, expected data in this file"
        for i in (0, 1)
    ]


def test_a_provenance_without_end_is_a_defect(path):
    with h5py.File(path, "a") as file:
        file.attrs["provenance"] = np.bytes_(b"[" * 30000)
    (defect,) = defects_of(path)
    assert defect.startswith(", provenance: ") and defect.endswith("expected a JSON object")
