"""Runs made unattended, some at a time, each in a process of its own: finished ones are left as
they are, those that were cut off are gone on with."""

from __future__ import annotations

import fcntl
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import yaml

from iqmpc.errors import ConfigError
from iqmpc.run_folder import RunFolder

IQMPC = [sys.executable, "-m", "iqmpc.cli"]


def read(path: Path) -> dict[str, list[str]]:
    """The runs of a list: name -> words for `iqmpc train`. `ConfigError` where it is wrong."""
    runs: dict[str, list[str]] = {}
    for item in yaml.safe_load(path.read_text()) or []:
        if not isinstance(item, dict) or set(item) != {"name", "overrides"}:
            raise ConfigError(f"{path}: a run has a name and overrides, got {item!r}")
        name, words = str(item["name"]), shlex.split(item["overrides"])
        if not re.fullmatch(r"[\w.-]*\w", name) or name in runs:
            raise ConfigError(f"{path}: {name!r} is no name for a folder, or there twice")
        if any(word.startswith(("run_dir=", "resume=")) for word in words):
            raise ConfigError(f"{path}: {name} must leave run_dir and resume to this program")
        runs[name] = words
    return runs


def start(folder: Path, words: Sequence[str]) -> subprocess.Popen | None:
    """Start or continue a run. None where a process that was left behind is still at it."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "a") as log:
        try:  # the process inherits the lock with the file, and holds it for as long as it lives
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        begun = RunFolder(folder).holds_run
        words = [f"resume={folder}"] if begun else [*words, f"run_dir={folder}"]
        # A session of its own: Ctrl-C reaches this program, which then stops its runs.
        return subprocess.Popen(
            [*IQMPC, "train", *words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def make(
    runs: Mapping[str, Sequence[str]],
    into: Path,
    jobs: int,
    say: Callable[[str], None] = lambda text: print(text, flush=True),
) -> list[str]:
    """Make those of `runs` (name -> words) that have not ended in `into`/NAME.

    Returns what went wrong, a line for each.
    """
    waiting = [name for name in runs if not RunFolder(into / name).summary.exists()]
    running: dict[str, subprocess.Popen] = {}
    wrong: list[str] = []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                name = waiting.pop(0)
                process = start(into / name, runs[name])
                if process is None:
                    wrong.append(f"{name} is being made already: a process holds its log.txt")
                    continue
                running[name] = process
                say(f"{time.strftime('%H:%M')} {name}: started")
            for name, process in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    done = "done" if process.returncode == 0 else f"exit {process.returncode}"
                    say(f"{time.strftime('%H:%M')} {name}: {done}")
                    if process.returncode:
                        wrong.append(f"{name} failed: see {into / name / 'log.txt'}")
            time.sleep(0.2)
    finally:  # checkpoints are written whole or not at all
        for process in running.values():
            os.killpg(process.pid, signal.SIGTERM)  # with its environments' processes
        for process in running.values():
            process.wait()
    return wrong
