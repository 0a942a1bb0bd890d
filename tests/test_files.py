"""Files are written whole, on file systems that can do less too; errors name them."""

import errno
import os
import stat

import pytest

from iqmpc.files import remove_temporary, write_atomically


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS])
def test_without_hard_links(tmp_path, monkeypatch, code):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "file"
    write_atomically(path, b"one", exclusive=True)
    with pytest.raises(FileExistsError):
        write_atomically(path, b"two", exclusive=True)
    assert path.read_bytes() == b"one" and [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EBADF])
def test_without_synchronising_folders(tmp_path, monkeypatch, code):
    fsync = os.fsync

    def files_only(number):
        if stat.S_ISDIR(os.fstat(number).st_mode):
            raise OSError(code, os.strerror(code))
        fsync(number)

    monkeypatch.setattr(os, "fsync", files_only)
    write_atomically(tmp_path / "file", b"one")
    assert (tmp_path / "file").read_bytes() == b"one"


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_full_disk_is_told_with_the_path(tmp_path, monkeypatch, broken):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, broken, full)
    with pytest.raises(OSError, match="No space left on device: '.*/file'$"):
        write_atomically(tmp_path / "file", b"one")


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="No such file or directory: '.*/none/file'$"):
        write_atomically(tmp_path / "none" / "file", b"one")


def test_only_what_a_killed_write_leaves_is_removed(tmp_path):
    for name in (".a.safetensors.0123abcd.tmp", ".mine.tmp", "a.01234567.tmp"):
        (tmp_path / name).touch()
    remove_temporary(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".mine.tmp", "a.01234567.tmp"]


def test_what_is_written_lies_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """First all bytes of the file, then, with its name, the folder that lists it."""
    synchronised, path = [], tmp_path / "file"
    fsync = os.fsync

    def recording(number):
        about = os.fstat(number)
        kind = "folder" if stat.S_ISDIR(about.st_mode) else about.st_size
        synchronised.append((kind, path.exists()))
        fsync(number)

    monkeypatch.setattr(os, "fsync", recording)
    write_atomically(path, b"seven..")
    assert synchronised == [(7, False), ("folder", True)]
