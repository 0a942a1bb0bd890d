import errno
import fcntl
import os

import pytest
import torch

from iqmpc import checkpoint
from iqmpc.errors import CheckpointError, ConfigError
from iqmpc.files import write_atomically
from iqmpc.run_folder import RunFolder


def tensors(step):
    return {
        "a": torch.full((5,), float(step)),
        "b": torch.tensor(step),
        "state": torch.arange(9, dtype=torch.uint8),
    }


def test_round_trip_keeps_the_last_two(tmp_path):
    for step in (10, 20, 30):
        RunFolder(tmp_path).save(step, tensors(step), {"step": step, "wall_s": 1.5})
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["step_000000020.safetensors", "step_000000030.safetensors"]
    path, loaded, meta = RunFolder(tmp_path).newest()
    assert path.name == names[1] and meta == {"step": 30, "wall_s": 1.5}
    assert all(
        torch.equal(v, loaded[k]) and v.dtype == loaded[k].dtype for k, v in tensors(30).items()
    )


def flip(data):
    return data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]


def rewritten(old, new):
    """A header that still parses but says something else."""

    def damage(data):
        assert old in data and len(old) == len(new)
        return data.replace(old, new)

    return damage


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: data[:-4], "cannot be read"),
        (flip, "does not match its digest"),
        (rewritten(b"wall_s", b"wall_x"), "does not match its digest"),
        (rewritten(b'{\\"wall_s', b'[\\"wall_s'), "does not match its digest"),
        (lambda data: b"", "cannot be read"),
        (lambda data: b"\xff" * 100, "cannot be read"),
    ],
)
def test_a_damaged_newest_is_named_and_the_one_before_used(tmp_path, damage, reason):
    RunFolder(tmp_path).save(10, tensors(10), {})
    bad = RunFolder(tmp_path).save(20, tensors(20), {"wall_s": 3})
    bad.write_bytes(damage(bad.read_bytes()))
    with pytest.warns(RuntimeWarning, match=f"step_000000020.*{reason}"):
        path, loaded, _ = RunFolder(tmp_path).newest()
    assert path.name == "step_000000010.safetensors" and loaded["b"] == 10


def test_without_a_whole_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="there is none"):
        RunFolder(tmp_path).newest()
    RunFolder(tmp_path).save(10, tensors(10), {}).write_bytes(b"x")
    with (
        pytest.warns(RuntimeWarning),
        pytest.raises(CheckpointError, match="none of 1 can be used"),
    ):
        RunFolder(tmp_path).newest()


def test_other_safetensors_files_are_refused(tmp_path):
    import safetensors.torch

    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="is no iqmpc-checkpoint file"):
        checkpoint.load(path)


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, broken):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(OSError, match="no space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_exclusive_writes_do_not_replace(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, b"old", exclusive=True)
    with pytest.raises(FileExistsError):
        write_atomically(path, b"new", exclusive=True)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_config_errors_name_the_run(tmp_path, small_config):
    with pytest.raises(CheckpointError, match="is no run folder: it has no config.yaml"):
        RunFolder(tmp_path).load_config()
    RunFolder(tmp_path).save_config(small_config, new=True)
    assert RunFolder(tmp_path).load_config() == small_config
    path = tmp_path / "config.yaml"
    path.write_text(path.read_text().replace("batch:", "bach:"))
    with pytest.raises(CheckpointError, match="config.yaml: unknown setting 'learner.bach'"):
        RunFolder(tmp_path).load_config()
    path.write_text("a: [")
    with pytest.raises(CheckpointError, match="config.yaml cannot be read"):
        RunFolder(tmp_path).load_config()


def test_checkpoints_are_told_by_their_numbers(tmp_path):
    """A copy under another name is left alone, and does not count; numbers are no text."""
    folder = tmp_path / "checkpoints"
    RunFolder(tmp_path).save(999_999_990, tensors(1), {"step": 1})
    for name in ("step_best.safetensors", "step_zzz.safetensors", "step_10 (copy).safetensors"):
        (folder / name).write_bytes(b"mine")
    for step in (10**9, 10**9 + 10):
        RunFolder(tmp_path).save(step, tensors(2), {"step": step})
    assert RunFolder(tmp_path).newest()[2] == {"step": 10**9 + 10}
    assert sorted(p.name for p in folder.iterdir()) == [
        "step_10 (copy).safetensors",
        "step_1000000000.safetensors",
        "step_1000000010.safetensors",
        "step_best.safetensors",
        "step_zzz.safetensors",
    ]
    for step in (2 * 10**9, 3 * 10**9):  # from elsewhere: what is written is kept nevertheless
        (folder / f"step_{step}.safetensors").write_bytes(b"mine")
    assert RunFolder(tmp_path).save(10**9 + 20, tensors(3), {}).exists()


def test_the_newest_beside_a_run_that_goes_on(tmp_path, monkeypatch):
    """Between the listing and the reading both are replaced by newer ones."""
    RunFolder(tmp_path).save(10, tensors(10), {})
    load, lost = checkpoint.load, []

    def losing(path):
        if not lost:
            lost.append(path)
            path.unlink()
            RunFolder(tmp_path).save(20, tensors(20), {})
        return load(path)

    monkeypatch.setattr(checkpoint, "load", losing)
    path, loaded, _ = RunFolder(tmp_path).newest()
    assert path.name == "step_000000020.safetensors" and loaded["b"] == 20

    def opened(*_, **__):
        raise RuntimeError("unable to open file")  # torch, of a file that went meanwhile

    monkeypatch.setattr(checkpoint, "load", load)
    monkeypatch.setattr("safetensors.safe_open", opened)
    with (
        pytest.warns(RuntimeWarning, match="unable to open file"),
        pytest.raises(CheckpointError, match="none of 1 can be used"),
    ):
        RunFolder(tmp_path).newest()


def test_a_checkpoint_that_is_not_finite_replaces_none(tmp_path):
    RunFolder(tmp_path).save(10, {"learner.a": torch.zeros(3)}, {})
    with pytest.raises(
        CheckpointError,
        match=r"step_000000020.safetensors: 1 tensors of the learner are not finite "
        r"\(the first is learner.b\)",
    ):
        RunFolder(tmp_path).save(
            20,
            {"learner.a": torch.zeros(3), "learner.b": torch.tensor([0, torch.inf])},
            {},
        )
    assert RunFolder(tmp_path).newest()[0].name == "step_000000010.safetensors"


BOMB = "a0: &a0 [x, x]\n" + "".join(
    f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(12)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BOMB, "cannot be read: aliases are not read in settings"),
        ("seed: &a [*a]", "aliases are not read"),
        ("seed: " + "[" * 20000, "cannot be read: "),
        ("seed: 2020-13-45", "cannot be read: "),
        ("seed: 2020-10-10", "seed must be int, got datetime.date"),
        ("seed: " + "9" * 5000, "cannot be read: "),
        ("seed: " + "9" * 4000, r"seed must lie in \[0, 2\*\*32\), got 9+\.\.\.9+$"),
        ("learner: {lr: 1" + "0" * 400 + "}", "learner.lr must be finite, got inf"),
        ("x" * 70000, "has over 65536 bytes"),
        ("k" * 1000 + ": 1", r"unknown setting 'k+\.\.\.k+'"),
        ("seed: '" + "k" * 60000 + "'", r"seed must be int, got 'k+\.\.\.k+' \(str\)$"),
        ("? [a, b]\n: 1", "cannot be read"),
        ("2020-10-10: 1", "unknown setting '2020-10-10'"),
        ("learner: {mode: [1]}", r"learner.mode must be one of .*, got \[1\]"),
    ],
)
@pytest.mark.timeout(30)
def test_hostile_settings_are_refused_in_one_line(tmp_path, text, said):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(CheckpointError, match=said) as caught:
        RunFolder(tmp_path).load_config()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600 + len(str(tmp_path))


def test_a_folder_is_held_by_one(tmp_path, monkeypatch):
    with RunFolder(tmp_path).locked(), pytest.raises(ConfigError, match="is being trained by"):
        with RunFolder(tmp_path).locked():
            pass
    with RunFolder(tmp_path).locked():
        pass
    assert not list(tmp_path.iterdir())

    def refuse(*_):
        raise OSError(errno.EBADF, "no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with RunFolder(tmp_path).locked():
        pass


META = {
    "obs_shape": [2],
    "action_dim": 2,
    "env_steps": 40,
    "updates": 5,
    "episodes": 2,
    "wall_s": 1.5,
    "evaluated_at": 40,
    "demonstrator_return": None,
    "demonstrations": None,
}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"env_steps": None}, "env_steps is None, expected a count"),
        ({"env_steps": -1}, "env_steps is -1, expected a count"),
        ({"action_dim": "1e999"}, "action_dim is '1e999', expected a count"),
        ({"obs_shape": "[2]"}, r"obs_shape is '\[2\]', expected counts"),
        ({"obs_shape": [True]}, r"obs_shape is \[True\], expected counts"),
        ({"wall_s": "a while"}, "wall_s is 'a while', expected seconds"),
        ({"demonstrator_return": [1]}, r"demonstrator_return is \[1\], expected a number or null"),
        ({"settings": 3}, "settings is 3, expected settings by name"),
        ({"started": 1.5}, "started is 1.5, expected a count"),
    ],
)
def test_a_description_that_no_run_has_written(tmp_path, change, said):
    """Its digest is right: whoever makes a checkpoint can make one of any description."""
    checkpoint.check_description(tmp_path, META)
    with pytest.raises(CheckpointError, match=f"does not describe itself: {said}"):
        checkpoint.check_description(tmp_path, {**META, **change})
    for key in META:
        with pytest.raises(CheckpointError, match=f"does not describe itself: .*{key}"):
            rest = {k: v for k, v in META.items() if k != key}
            checkpoint.check_description(tmp_path, rest)
    with pytest.raises(CheckpointError, match="does not describe itself"):
        checkpoint.check_description(tmp_path, [META])


def test_a_header_of_a_page_is_not_repeated(tmp_path):
    header = b'{"__metadata__": "' + b"a" * 9000 + b'"}'
    path = tmp_path / "step_000000001.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match="cannot be read") as caught:
        checkpoint.load(path)
    assert len(str(caught.value)) < 300 + len(str(path))


def test_a_digest_tells_names_types_and_shapes_apart():
    zeros = torch.zeros(2, 3)
    held = [
        {"a": zeros, "b": zeros + 1},
        {"a": zeros + 1, "b": zeros},
        {"a": zeros, "c": zeros + 1},
        {"a": zeros.to(torch.int32), "b": zeros + 1},
        {"a": zeros.reshape(3, 2), "b": zeros + 1},
        {"a": zeros.reshape(6), "b": zeros + 1},
    ]
    assert len({checkpoint.digest(tensors) for tensors in held}) == len(held)
    assert checkpoint.digest(held[0], "text") != checkpoint.digest(held[0], "other")


def test_a_checkpoint_of_another_version_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "step_000000001.safetensors"
    monkeypatch.setattr(checkpoint, "VERSION", 2)
    checkpoint.save(path, tensors(1), {})
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="has version '2', this program reads 1"):
        checkpoint.load(path)
