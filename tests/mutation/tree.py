"""A copy of the tree in which mutants are made, and where in it their texts lie."""

from __future__ import annotations

import ast
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.mutation.mutants import Mutant

ROOT = Path(__file__).resolve().parents[2]
_LEFT_OUT = (".venv", ".venv-newest", ".git", "build", "runs", "results", "__pycache__",
             ".pytest_cache", ".ruff_cache", ".hypothesis")  # fmt: skip
_SOURCES = ("iqmpc", "kernels", "csrc")


@dataclass(frozen=True)
class Place:
    """Where a mutant's text lies: a file, and the first and last of its characters."""

    path: Path
    start: int
    end: int

    @property
    def line(self) -> int:
        return self.path.read_text()[: self.start].count("\n") + 1


def copied(folder: Path) -> Path:
    """A copy of the tree in `folder` that Python imports before the installed package."""
    tree = folder / "tree"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*_LEFT_OUT), symlinks=True)
    for name in ("kernels", "configs"):  # as the installation maps them
        link = tree / "iqmpc" / name
        if not os.path.lexists(link):
            link.symlink_to(Path("..") / name)
    return tree


def find(mutant: Mutant, tree: Path) -> list[Place]:
    """Every place of a mutant's text; a mutant that applies has one."""
    pattern = re.compile(r"\s*".join(map(re.escape, re.findall(r"\w+|[^\w\s]", mutant.find))))
    files = {path: path.read_text() for path in _files(tree, mutant)}

    def places(spans: Callable[[str], list[tuple[int, int]]]) -> list[Place]:
        return [
            Place(path, start + match.start(), start + match.end())
            for path, text in files.items()
            for start, end in spans(text)
            for match in pattern.finditer(text[start:end])
        ]

    return places(lambda text: _spans(text, mutant)) or places(lambda text: [(0, len(text))])


def _files(tree: Path, mutant: Mutant) -> list[Path]:
    paths = [path for folder in _SOURCES for path in sorted((tree / folder).rglob("*"))]
    if mutant.cpp:
        sources = [p for p in paths if p.suffix in (".cpp", ".hpp") and "tests" not in p.parts]
        return [p for p in sources if p.name == mutant.inside] or sources
    real = {p.resolve() for p in paths if p.suffix == ".py"}  # not again through a link
    return sorted(real)


def _spans(text: str, mutant: Mutant) -> list[tuple[int, int]]:
    """The parts of a file that are called `inside`."""
    if mutant.cpp:
        return [(0, len(text))]
    name = mutant.inside.rpartition(".")[2]
    if f"def {name}(" not in text:
        return []
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    spans = []

    def visit(node: ast.AST, path: tuple[str, ...]) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)):
                inner = (*path, child.name)
                if ".".join(inner) == mutant.inside and isinstance(child, ast.FunctionDef):
                    spans.append((starts[child.lineno - 1], starts[child.end_lineno]))
                visit(child, inner)

    visit(ast.parse(text), ())
    return spans


def tests_of(mutant: Mutant, tree: Path) -> list[list[str]]:
    """Arguments of pytest, one call after the other, for the tests that are there."""
    calls, whole = [], []
    for test in mutant.tests:
        name, _, expression = test.partition("::")
        folder = tree / "tests"
        if name:
            # test_X.py, or the folder X
            there = [*folder.rglob(name)] or [p for p in folder.rglob(name[5:-3]) if p.is_dir()]
        else:
            such = re.compile(rf"def test_\w*{expression.removeprefix('test_')}")
            there = [p for p in folder.rglob("test_*.py") if such.search(p.read_text())]
        paths = sorted(str(path.relative_to(tree)) for path in there)
        if expression and paths:
            calls.append([*paths, "-k", expression])
        else:
            whole += paths
    return ([whole] if whole else []) + calls
