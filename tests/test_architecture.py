"""Who may import whom: the floors of the house, and no circles."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import iqmpc

ROOT = Path(iqmpc.__file__).parent
# A floor: what is on it (modules and packages of iqmpc), and the floors that it may import from
# beside itself. A new module goes on the lowest floor that lets it import what it needs.
FLOORS = {
    "ground": (
        "callbacks console episode errors files interrupts latency observation paths progress "
        "seeding timing __init__ _C",
        "",
    ),
    "settings": ("capture compiler composition config configs threads", "ground"),
    "kernels": ("kernels losses", "ground settings"),
    "records": (
        "agent_file checkpoint plot provenance reporting run_folder runlog task_interface trackers",
        "ground settings",
    ),
    "data": ("demos envs", "ground settings records"),
    "method": (
        "agent baselines controller learner methods model onnx_model optimisation plan_statistics "
        "planner replay scaling stored_agent update_backends",
        "ground settings kernels records",
    ),
    "runs": (
        "bench demonstrators evaluation expert_data export initial realtime reproduce run_list "
        "run_state table trainer updates video",
        "ground settings records data method",
    ),
    "shell": ("cli commands doctor", "ground settings kernels records data method runs"),
}
FLOOR = {name: floor for floor, (names, _) in FLOORS.items() for name in names.split()}
FILES = [path for folder in (".", "kernels", "configs") for path in (ROOT / folder).rglob("*.py")]
NAMES = [".".join(("iqmpc", *path.relative_to(ROOT).with_suffix("").parts)) for path in FILES]
MODULES = {n.removesuffix(".__init__"): path for n, path in zip(NAMES, FILES, strict=True)}


def imported(body: list[ast.stmt], inside: bool) -> Iterator[str]:
    """Modules of iqmpc that code imports, without what is for type checkers alone.

    inside: also what functions import when they are called.
    """
    for node in body:
        if isinstance(node, ast.ImportFrom) and node.module:
            for name in node.names:
                full = f"{node.module}.{name.name}"
                yield full if full in (*MODULES, "iqmpc._C") else node.module
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        elif inside or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for part in ("body", "orelse", "finalbody", "handlers"):
                yield from imported(getattr(node, part, []), inside)


def graph(inside: bool) -> dict[str, set[str]]:
    return {
        name: {
            other
            for other in imported(ast.parse(path.read_text(encoding="utf-8")).body, inside)
            if other.partition(".")[0] == "iqmpc" and other != name
        }
        for name, path in MODULES.items()
    }


def floor(module: str) -> str | None:
    return FLOOR.get((module.split(".") + ["__init__"])[1])


def test_every_module_is_on_a_floor():
    assert [name for name in MODULES if floor(name) is None] == []


def test_no_floor_imports_from_one_that_it_may_not():
    allowed = {name: {name, *below.split()} for name, (_, below) in FLOORS.items()}
    assert [
        f"{name} ({floor(name)}) imports {other} ({floor(other)})"
        for name, others in graph(inside=True).items()
        for other in sorted(others)
        if floor(other) not in allowed[floor(name)]
    ] == []


def test_no_circle_is_imported():
    TopologicalSorter(graph(inside=False)).prepare()  # CycleError names it
