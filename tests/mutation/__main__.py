"""`python -m tests.mutation`: do the tests notice a slip of the hand? (docs/reliability.md)

Each mutant is made in a copy of the tree and given to the tests that should notice it; it is
killed where one of them fails or hangs. Those of C++ are compiled, a minute or more each.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NoReturn

# Loaded once, before all tests: no part of the program among it.
import gymnasium  # noqa: F401
import h5py  # noqa: F401
import hydra  # noqa: F401
import hypothesis  # noqa: F401
import pytest
import torch  # noqa: F401
import torch.utils.tensorboard  # noqa: F401

from tests.mutation.mutants import MUTANTS, Mutant
from tests.mutation.tree import ROOT, Place, copied, find, tests_of

_LONGEST_S = 900.0
_NO_TESTS = 5  # pytest's exit status where an expression chooses none


def main() -> int:
    groups = list(dict.fromkeys(mutant.group for mutant in MUTANTS))
    arguments = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    arguments.add_argument("groups", nargs="*", metavar="GROUP", help=", ".join(groups))
    arguments.add_argument("-k", metavar="TEXT", default="", help="mutants whose name has this")
    arguments.add_argument("--minutes", type=float, help="stop after so many")
    arguments.add_argument("--out", type=Path, help="a JSON file for what became of each")
    arguments.add_argument("--again", type=Path, help="leave out what this file says was killed")
    given = arguments.parse_args()
    chosen = [m for m in MUTANTS if m.group in (given.groups or groups) and given.k in m.name]
    before = (
        {} if given.again is None else {r["name"]: r for r in json.loads(given.again.read_text())}
    )
    until = None if given.minutes is None else time.monotonic() + 60 * given.minutes
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="iqmpc-mutants-") as folder:
        tree = copied(Path(folder))
        run = _Tests(tree)
        for mutant in chosen:
            if before.get(mutant.name, {}).get("result") == "killed":
                results.append(before[mutant.name])
                continue
            if until is not None and time.monotonic() > until:
                break
            results.append(_tried(mutant, tree, run))
            print(
                f"{results[-1]['result']:14} {results[-1]['seconds']:5.0f} s  {mutant.name}",
                flush=True,
            )
            if given.out is not None:
                given.out.write_text(json.dumps(results, indent=1) + "\n")
    return _summed(results)


def _summed(results: list[dict[str, Any]]) -> int:
    count = {kind: [r for r in results if r["result"] == kind]
             for kind in ("killed", "survived", "not applicable", "not built")}  # fmt: skip
    tried = len(count["killed"]) + len(count["survived"])
    share = len(count["killed"]) / tried if tried else 0.0
    print(
        ", ".join(f"{len(found)} {kind}" for kind, found in count.items()), f"({100 * share:.1f} %)"
    )
    for kind in ("survived", "not applicable", "not built"):
        for r in count[kind]:
            print(f"{kind}: {r['name']}" + (f"\n    {r['why']}" if r["why"] else ""))
    return int(share < 0.95)


def _tried(mutant: Mutant, tree: Path, run: _Tests) -> dict[str, Any]:
    started = time.monotonic()
    places = find(mutant, tree)
    result = {"name": mutant.name, "group": mutant.group, "why": mutant.why, "by": ""}
    calls = tests_of(mutant, tree)
    if len(places) != 1 or not calls:
        found = f"{len(places)} places, {len(calls)} calls of tests"
        return {**result, "result": "not applicable", "why": found, "seconds": 0.0}
    place = places[0]
    whole = place.path.read_text()
    place.path.write_text(whole[: place.start] + mutant.new + whole[place.end :])
    try:
        kind, by = run(mutant, calls)
    finally:
        place.path.write_text(whole)
    where = f"{place.path.relative_to(tree.resolve())}:{_line(whole, place)}"
    return {
        **result,
        "result": kind,
        "by": by,
        "where": where,
        "seconds": time.monotonic() - started,
    }


def _line(text: str, place: Place) -> int:
    return text[: place.start].count("\n") + 1


class _Tests:
    """Runs tests in the copy; for mutants of C++ a build of its own is made first."""

    def __init__(self, tree: Path):
        self._tree, self._build = tree, tree / "build-mutants"
        self._original: dict[Path, bytes] = {}

    def __call__(self, mutant: Mutant, calls: list[list[str]]) -> tuple[str, str]:
        """(killed, survived or not built; the first test that failed)."""
        if mutant.cpp and not self._built():
            return "not built", ""
        try:
            for call in calls:
                failed = self._failed(call)
                if failed is not None:
                    return "killed", failed
            return "survived", ""
        finally:
            for path, content in self._original.items():
                path.write_bytes(content)

    def _failed(self, call: list[str]) -> str | None:
        """The first test that fails, in a process forked from this one, which has loaded all that
        the tests import but the program itself."""
        log = self._tree.parent / "log.txt"
        child = os.fork()
        if not child:
            _run_tests(self._tree, call, log)
        code, deadline = None, time.monotonic() + _LONGEST_S
        while code is None and time.monotonic() < deadline:
            pid, status = os.waitpid(child, os.WNOHANG)
            code = os.waitstatus_to_exitcode(status) if pid else time.sleep(0.05)
        if code is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return f"no end within {_LONGEST_S:.0f} s"
        if code in (0, _NO_TESTS):
            return None
        said = log.read_text(errors="replace")
        match = re.search(r"^(?:FAILED|ERROR) (\S+)", said, re.MULTILINE)
        return match[1] if match else f"exit status {code}: {said[-200:]}"

    def _built(self) -> bool:
        """Compile the extension of the copy, of which ninja makes what has changed."""
        if not self._build.exists():
            import pybind11

            subprocess.run(
                ["cmake", "-S", self._tree, "-B", self._build, "-G", "Ninja", "-DIQMPC_CUDA=OFF",
                    "-DIQMPC_BUILD_PYTHON=ON",
                 "-DCMAKE_BUILD_TYPE=Release", f"-DPython_EXECUTABLE={sys.executable}",
                 f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"],
                check=True, capture_output=True,
            )  # fmt: skip
        built = subprocess.run(
            ["cmake", "--build", self._build, "--target", "_C", "--parallel", "1"],
            capture_output=True,
        )
        if built.returncode:
            return False
        for made in self._build.glob("_C*.so"):
            target = self._tree / "iqmpc" / made.name
            self._original.setdefault(target, target.read_bytes())
            target.write_bytes(made.read_bytes())
        return True


def _run_tests(tree: Path, call: list[str], log: Path) -> NoReturn:
    """What the forked process does: pytest, in the copy."""
    code = 70
    try:
        opened = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(opened, 1)
        os.dup2(opened, 2)
        os.chdir(tree)
        os.environ |= {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
        sys.dont_write_bytecode = True
        sys.path[:] = [str(tree), *(p for p in sys.path if Path(p or ".").resolve() != ROOT)]
        for name in [m for m in sys.modules if m.split(".")[0] == "tests"]:
            del sys.modules[name]
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--timeout", "300", *call])
    finally:
        sys.stdout.flush()
        os._exit(int(code))


if __name__ == "__main__":
    sys.exit(main())
