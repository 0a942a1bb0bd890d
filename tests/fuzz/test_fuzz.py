"""A short run of the harness: every reader, a few damaged files each (docs/reliability.md)."""

import random

import pytest

from tests.fuzz.damage import bytes_changed, json_changed, tree_changed
from tests.fuzz.parsers import PARSERS
from tests.fuzz.run import GOOD, Job, Report, _after, _count, fuzz

pytestmark = pytest.mark.timeout(600)


def test_damaged_files_load_or_are_refused_in_words():
    reports = fuzz(list(PARSERS), 25)
    assert [r.parser for r in reports] == list(PARSERS) and {r.inputs for r in reports} == {25}
    assert not [fault for r in reports for fault in r.faults]
    assert all(
        0 < r.counts["refused"] + r.counts["contained"] for r in reports if r.parser != "metrics"
    )  # whose damaged lines are set aside


def test_an_input_is_the_same_each_time_and_another_for_each_number(tmp_path):
    parser = PARSERS["legacy"]
    found = parser.samples(tmp_path)

    def made(number):
        return parser.damage(found, random.Random(f"legacy 0 {number}"))

    assert made(1) == made(1) and len({str(made(i)) for i in range(50)}) > 40


def test_damage_changes_what_it_is_given():
    data, rng = bytes(range(256)), random.Random(0)
    changed = [bytes_changed(data, rng) for _ in range(200)]
    assert sum(c != data for c in changed) > 190 and len({len(c) for c in changed}) > 20
    text = b'{"a": [1, 2, {"b": "c"}], "d": null}'
    assert len({json_changed(text, rng) for _ in range(100)}) > 60
    assert any(tree_changed({"a": 1}, rng) != {"a": 1} for _ in range(10))


def test_what_a_reader_must_not_do_is_counted_as_a_fault():
    report, outcome = Report("npz"), {"input": 0, "message": "", "peak": 3, "size": 1, "seconds": 0}
    for kind in (*GOOD, "memory", "crash"):
        _count(report, {**outcome, "kind": kind}, seed=0)
    assert report.inputs == 5 and [f["kind"] for f in report.faults] == ["memory", "crash"]
    assert report.as_dict()["faults"] == 2
    assert _after([Job("a", 0, 2), Job("b", 0, 1)]) == [Job("a", 1, 2), Job("b", 0, 1)]
    assert _after([Job("a", 1, 2), Job("b", 0, 1)]) == [Job("b", 0, 1)]
