"""What a budget costs in return: `python -m benchmarks.return_against_budget RUN --out curve.csv`.

Evaluates a run's agent (or a file's) with each budget, the policy prior alone first and no budget
last, on the same episodes. On a machine with other work, plans score fewer samples in the same
budget than on an idle one, which `samples` shows.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from iqmpc.evaluation import evaluate, open_run

BUDGETS_MS = (0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 20.0)
COLUMNS = ("budget_ms", "return_mean", "return_std", "samples", "missed", "late", "episodes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS_MS, help="in ms")
    parser.add_argument("--episodes", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    rows = []
    for budget_ms in (0.0, *given.budgets, None):
        changes = {"device": "cpu", "planner.backend": "cpu", "planner.threads": given.threads}
        if budget_ms == 0.0:
            changes["planner.enabled"] = False
        elif budget_ms is not None:
            changes["planner.budget_us"] = 1e3 * budget_ms
        agent, env = open_run(given.run, changes)
        result = evaluate(agent, env, episodes=given.episodes, seed=agent.config.seed)
        plans = agent.planner.statistics()
        rows.append(
            {
                "budget_ms": {0.0: "prior", None: "none"}.get(budget_ms, budget_ms),
                "return_mean": round(result.return_mean, 2),
                "return_std": round(result.return_std, 2),
                "samples": round(plans.samples / plans.plans, 1),
                "missed": plans.missed / plans.plans,
                "late": plans.late / plans.plans,
                "episodes": given.episodes,
            }
        )
        print(rows[-1], flush=True)
        env.close()
    if given.out:
        with open(given.out, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
