"""A few random ends of training, each continued to the run that nothing ended."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(1200)
def test_a_run_that_is_ended_and_continued_is_the_run_that_was_not(tmp_path):
    """In a process of its own, since it forks before anything is computed."""
    out = tmp_path / "kills.json"
    done = subprocess.run(
        [sys.executable, "-m", "tests.kills", "--kills", "5", "--seed", "3", "--out", out,
         "--cases", "fused, async", "replay that is full"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    found = json.loads(out.read_text())
    assert done.returncode == 0 and not found["faults"], done.stdout + done.stderr
    assert sum(found["counts"].values()) >= 5
