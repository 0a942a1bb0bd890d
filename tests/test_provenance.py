import subprocess

import pytest
import torch

import iqmpc
from iqmpc import provenance


def git(root, *words):
    return subprocess.run(
        ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b", *words],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()


@pytest.fixture
def tree(tmp_path):
    """A source tree of the package as git has it."""
    (tmp_path / "iqmpc").mkdir()
    (tmp_path / "iqmpc" / "__init__.py").write_text("one\n")
    (tmp_path / "README.md").write_text("one\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "one")
    return tmp_path


def test_the_commit_and_whether_code_was_changed(tree):
    head = git(tree, "rev-parse", "HEAD")[:12]
    assert provenance.commit(tree) == head
    (tree / "README.md").write_text("two\n")
    (tree / "iqmpc" / "new.so").write_text("built\n")
    assert provenance.commit(tree) == head
    (tree / "iqmpc" / "__init__.py").write_text("two\n")
    assert provenance.commit(tree) == f"{head}-dirty"


def test_elsewhere_it_is_the_version(tree, tmp_path_factory, monkeypatch):
    installed = tree / "venv"  # in another project's checkout
    (installed / "iqmpc").mkdir(parents=True)
    (installed / "iqmpc" / "__init__.py").write_text("")
    assert provenance.commit(installed) == iqmpc.__version__
    assert provenance.commit(tmp_path_factory.mktemp("bare")) == iqmpc.__version__
    monkeypatch.setenv("PATH", "")
    assert provenance.commit(tree) == iqmpc.__version__


def test_the_machine_is_named_with_its_instruction_set(monkeypatch):
    name, _, level = provenance.machine().rpartition(", ")
    assert name == provenance.processor() != ""
    assert level in (
        "portable",
        "avx2",
        "avx512",
        "avx512bf16",
        torch.backends.cpu.get_cpu_capability().lower(),
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"a GPU ({device})")
    assert provenance.machine("cuda:0") == f"{name}, {level}, a GPU (cuda:0)"
