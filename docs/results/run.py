"""Makes the runs of a list unattended, some at a time, and ends with their table.

    python docs/results/run.py [--runs docs/results/runs.yaml] [--into runs/results] [--jobs 2]

Each run is `iqmpc train` with the words that the list gives it, its output in log.txt in its
folder. Started again after whatever stopped it, this goes on: a run with a summary.json is left as
it is, one that was cut off is continued from its last checkpoint. A run that fails is named at the
end and does not stop the others.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from pathlib import Path

from iqmpc.errors import IqmpcError
from iqmpc.run_list import IQMPC, make, read

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=Path, default=HERE / "runs.yaml")
    parser.add_argument("--into", type=Path, default=Path("runs/results"))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--table", type=Path, default=HERE / "table.json")
    parser.add_argument("--episodes", type=int, default=20)
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        runs = read(given.runs)
    except IqmpcError as error:
        sys.exit(str(error))
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
