"""A suite that is missing, and one that is there and broken."""

import sys

import pytest

from iqmpc import make_env
from iqmpc.envs.extras import import_extra
from iqmpc.errors import TaskError


@pytest.mark.parametrize(
    "task, package, extra",
    [
        ("walker-walk", "dm_control", "dmcontrol"),
        ("myo-key-turn", "myosuite", "myosuite"),
        ("pick-cube", "mani_skill2", "maniskill"),
    ],
)
def test_a_missing_suite_says_which_extra_to_install(monkeypatch, task, package, extra):
    for name in [n for n in sys.modules if n.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)

    class Hidden:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == package:
                raise ModuleNotFoundError(f"No module named {name!r}", name=package)

    monkeypatch.setattr(sys, "meta_path", [Hidden(), *sys.meta_path])
    with pytest.raises(TaskError, match=rf"needs the extra '{extra}': pip install 'iqmpc\[{extra}"):
        make_env(task)


@pytest.mark.parametrize(
    "source, message",
    [
        ("import a_package_that_is_not_there", "No module named 'a_package_that_is_not_there'"),
        ("raise ImportError('libgone.so.1: cannot open')", "libgone.so.1: cannot open"),
    ],
)
def test_a_broken_suite_shows_its_own_error(tmp_path, monkeypatch, source, message):
    (tmp_path / "somebodys_suite.py").write_text(f"print('banner')\n{source}\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(TaskError, match=f"Suite is installed but cannot be imported: {message}"):
        import_extra("somebodys_suite", "Suite", "suite")


def test_what_a_suite_prints_is_hidden(tmp_path, monkeypatch, capfd):
    (tmp_path / "somebodys_loud_suite.py").write_text(
        "import logging, warnings\nprint('banner')\nwarnings.warn('x')\nlogging.warning('y')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert import_extra("somebodys_loud_suite", "Suite", "suite").__name__ == "somebodys_loud_suite"
    assert capfd.readouterr() == ("", "")
