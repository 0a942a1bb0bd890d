"""`python -m tests.kills`: training is ended at random moments and continued (docs/reliability.md).

Each case is a run of a tiny task that is made once to its end, then again with something that ends
it at a random moment, as often as not several times, and continued each time. The last checkpoint,
metrics.csv and summary.json must be those of the run that nothing ended, bit for bit.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import sys
import tempfile
import time
from pathlib import Path

from tests.kills.cases import CASES, Case, Ending, ended, reference


def main() -> int:
    arguments = argparse.ArgumentParser(prog="python -m tests.kills", description=__doc__)
    arguments.add_argument("--kills", type=int, default=20)
    arguments.add_argument("--minutes", type=float, help="stop after so many")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--cases", nargs="*", metavar="NAME", help=", ".join(CASES))
    arguments.add_argument("--out", type=Path, help="a JSON file for counts and faults")
    given = arguments.parse_args()
    rng = random.Random(given.seed)
    until = None if given.minutes is None else time.monotonic() + 60 * given.minutes
    counts: collections.Counter[str] = collections.Counter()
    faults: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory(prefix="iqmpc-kills-") as folder:
        names = given.cases or list(CASES)
        weights = [CASES[name].weight for name in names]
        whole: dict[str, Case] = {}
        number = 0
        while sum(counts.values()) < given.kills and (until is None or time.monotonic() < until):
            name = rng.choices(names, weights)[0]
            if name not in whole:
                whole[name] = reference(name, Path(folder) / name)
            number += 1
            endings = [Ending.drawn(rng, whole[name]) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
            said = ended(whole[name], endings, Path(folder) / f"{name}-{number}")
            counts.update(f"{name}, {ending.kind}" for ending in endings)
            if said:
                faults.append({"case": name, "endings": list(map(str, endings)), "said": said})
                print(f"FAULT {name} {list(map(str, endings))}: {said}", flush=True)
            if number % 10 == 0:
                print(f"{sum(counts.values())} kills, {len(faults)} faults", flush=True)
            if given.out is not None:
                given.out.write_text(json.dumps({"counts": counts, "faults": faults}, indent=1))
    print(f"{sum(counts.values())} kills of {number} runs, {len(faults)} faults")
    for key, count in sorted(counts.items()):
        print(f"  {count:4}  {key}")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
