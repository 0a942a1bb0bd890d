"""Makes the runs of a list unattended, some at a time, and ends with their table.

    python docs/results/run.py [--runs docs/results/runs.yaml] [--into runs/results] [--jobs 2]

Each run is `iqmpc train` with the words that the list gives it, its output in log.txt in its
folder. Started again after whatever stopped it, this goes on: a run with a summary.json is left as
it is, one that was cut off is continued from its last checkpoint. A run that fails is named at the
end and does not stop the others.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

HERE = Path(__file__).parent
IQMPC = [sys.executable, "-m", "iqmpc.cli"]


def read(path: Path) -> dict[str, list[str]]:
    """The runs of a list: name -> words for `iqmpc train`. Ends the program where it is wrong."""
    runs: dict[str, list[str]] = {}
    for item in yaml.safe_load(path.read_text()) or []:
        if not isinstance(item, dict) or set(item) != {"name", "overrides"}:
            sys.exit(f"{path}: a run has a name and overrides, got {item!r}")
        name, words = str(item["name"]), shlex.split(item["overrides"])
        if not re.fullmatch(r"[\w.-]*\w", name) or name in runs:
            sys.exit(f"{path}: {name!r} is no name for a folder, or there twice")
        if any(word.startswith(("run_dir=", "resume=")) for word in words):
            sys.exit(f"{path}: {name} must leave run_dir and resume to this program")
        runs[name] = words
    return runs


def start(folder: Path, words: list[str]) -> subprocess.Popen | None:
    """Start or continue a run. None where a process that was left behind is still at it."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "a") as log:
        try:  # the process inherits the lock with the file, and holds it for as long as it lives
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        begun = (folder / "config.yaml").exists()
        words = [f"resume={folder}"] if begun else [*words, f"run_dir={folder}"]
        # A session of its own: Ctrl-C reaches this program, which then stops its runs.
        return subprocess.Popen(
            [*IQMPC, "train", *words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def make(runs: dict[str, list[str]], into: Path, jobs: int) -> list[str]:
    """Make those that are not there yet. Returns what went wrong, a line for each."""
    waiting = [name for name in runs if not (into / name / "summary.json").exists()]
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
                print(f"{time.strftime('%H:%M')} {name}: started", flush=True)
            for name, process in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    done = "done" if process.returncode == 0 else f"exit {process.returncode}"
                    print(f"{time.strftime('%H:%M')} {name}: {done}", flush=True)
                    if process.returncode:
                        wrong.append(f"{name} failed: see {into / name / 'log.txt'}")
            time.sleep(0.2)
    finally:  # checkpoints are written whole or not at all
        for process in running.values():
            os.killpg(process.pid, signal.SIGTERM)  # with its environments' processes
        for process in running.values():
            process.wait()
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=Path, default=HERE / "runs.yaml")
    parser.add_argument("--into", type=Path, default=Path("runs/results"))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--table", type=Path, default=HERE / "table.json")
    parser.add_argument("--episodes", type=int, default=20)
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    runs = read(given.runs)
    wrong = make(runs, given.into, given.jobs)
    made = [str(given.into / n) for n in runs if (given.into / n / "summary.json").exists()]
    code = (
        subprocess.call(
            [*IQMPC, "table", *made, "--out", str(given.table), "--episodes", str(given.episodes)]
        )
        if made
        else 0
    )
    sys.exit("\n".join(wrong) or code)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped; start it again to go on")
