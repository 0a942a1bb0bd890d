"""`python -m tests.fuzz`: damaged and hostile files for every reader (docs/reliability.md)."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from tests.fuzz.parsers import PARSERS
from tests.fuzz.run import as_json, fuzz, keep, line


def main() -> int:
    arguments = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    arguments.add_argument("parsers", nargs="*", metavar="PARSER", help=", ".join(PARSERS))
    arguments.add_argument("--inputs", type=int, default=1000, help="for each reader")
    arguments.add_argument("--minutes", type=float, help="for each reader, at most")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--first", type=int, default=0, help="the number of the first input")
    arguments.add_argument("--out", type=Path, help="a JSON file for counts and faults")
    arguments.add_argument(
        "--keep", type=Path, help="write input --first of a reader here, and stop"
    )
    given = arguments.parse_args()
    names = given.parsers or list(PARSERS)
    unknown = [name for name in names if name not in PARSERS]
    if unknown:
        arguments.error(f"no reader {unknown[0]!r} (known: {', '.join(PARSERS)})")
    if given.keep is not None:
        print(keep(names[0], given.seed, given.first, given.keep))
        return 0
    reports = []
    for name in names:
        until = None if given.minutes is None else time.monotonic() + 60 * given.minutes
        reports += fuzz([name], given.inputs, seed=given.seed, first=given.first, until=until)
        print(line(reports[-1]), flush=True)
        for fault in reports[-1].faults[:10]:
            print(
                f"    {fault['kind']}, input {fault['input']}: {fault['message'][:300]}", flush=True
            )
        if given.out is not None:
            given.out.write_text(as_json(reports) + "\n")
    return int(any(report.faults for report in reports))


if __name__ == "__main__":
    sys.exit(main())
