"""A suite that is missing, and one that is there and broken."""

import sys

import pytest

from iqmpc import make_env
from iqmpc.envs.extras import NEWEST_PYTHON, import_extra
from iqmpc.errors import TaskError


@pytest.fixture(
    params=[
        ("walker-walk", "dm_control", "dmcontrol"),
        ("myo-key-turn", "myosuite", "myosuite"),
        ("pick-cube", "mani_skill2", "maniskill"),
    ],
    ids=lambda param: param[0],
)
def missing(request, monkeypatch):
    """A task whose suite is not installed, and its extra."""
    task, package, extra = request.param
    for name in [n for n in sys.modules if n.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)

    class Hidden:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == package:
                raise ModuleNotFoundError(f"No module named {name!r}", name=package)

    monkeypatch.setattr(sys, "meta_path", [Hidden(), *sys.meta_path])
    return task, extra


def test_a_missing_suite_says_which_extra_to_install(missing, monkeypatch):
    task, extra = missing
    monkeypatch.setitem(NEWEST_PYTHON, extra, sys.version_info[:2])
    with pytest.raises(TaskError, match=rf"needs the extra '{extra}': pip install 'iqmpc\[{extra}"):
        make_env(task)


def test_where_no_install_would_help_it_says_which_python_to_take(missing, monkeypatch):
    task, extra = missing
    monkeypatch.setitem(NEWEST_PYTHON, extra, (3, 9))
    with pytest.raises(TaskError, match=r"needs Python 3\.9 or older, this is 3\.\d+"):
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
