"""The mutants of `python -m tests.mutation` still have their places and their tests."""

import pytest

from tests.mutation.mutants import MUTANTS, Mutant
from tests.mutation.tree import ROOT, find
from tests.mutation.tree import tests_of as calls_of

if not (ROOT / "csrc").is_dir():
    pytest.skip("the sources are not beside the tests", allow_module_level=True)


def test_enough_mutants_apply():
    """Those of texts that were rewritten do not: they want a new text, or to go."""
    gone = [m.name for m in MUTANTS if len(find(m, ROOT)) != 1 or not calls_of(m, ROOT)]
    assert len(MUTANTS) - len(gone) >= 80 and len(gone) <= len(MUTANTS) // 10, gone
    assert len({m.name for m in MUTANTS}) == len(MUTANTS)
    assert {m.group for m in MUTANTS} >= {
        "losses", "learner", "replay", "plan", "refit", "checkpoint", "environments",
        "evaluation", "readers", "C++",
    }  # fmt: skip


def test_a_text_is_found_however_it_is_laid_out(tmp_path):
    (tmp_path / "iqmpc").mkdir()
    path = tmp_path / "iqmpc/anywhere.py"
    path.write_text(
        "def g():\n    return f(\n        a,\n        b\n    )\n"
        "class C:\n    def g(self):\n        return 1\n"
    )
    (place,) = find(Mutant("x", "g", "f(a, b)", "", ()), tmp_path)
    assert path.read_text()[place.start : place.end].split() == ["f(", "a,", "b", ")"]
    (place,) = find(Mutant("x", "C.g", "return 1", "", ()), tmp_path)
    assert place.line == 8
    # elsewhere than in the function, where it has moved to
    (place,) = find(Mutant("x", "g", "return 1", "", ()), tmp_path)
    assert place.line == 8 and not find(Mutant("x", "g", "return 2", "", ()), tmp_path)
