"""The names of the package: each comes when it is asked for, from the module that has it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

import iqmpc


@pytest.mark.parametrize("name", iqmpc.__all__)
def test_every_name_is_there_and_no_module_is_in_its_place(name: str) -> None:
    assert getattr(iqmpc, name).__module__.startswith("iqmpc.")
    assert importlib.util.find_spec(f"iqmpc.{name}") is None
    assert name in dir(iqmpc)


def test_a_name_that_is_not_there_is_an_error() -> None:
    with pytest.raises(AttributeError, match="'iqmpc' has no attribute 'Traner'"):
        iqmpc.Traner  # noqa: B018


def test_the_package_alone_imports_nothing_heavy() -> None:
    code = "import sys, iqmpc; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stdout + result.stderr
