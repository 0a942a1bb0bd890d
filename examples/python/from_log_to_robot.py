"""From a log of a robot to an agent's file in its control loop.

python examples/python/from_log_to_robot.py --steps 3000
"""

import argparse
import csv
from pathlib import Path

import numpy as np
from own_environment import Reach, demonstrate, train

import iqmpc
from iqmpc.export import export
from iqmpc.task_interface import TaskInterface

NAMES = ("x", "y", "vx", "vy", "dx", "dy")
FORCES = ("fx", "fy")
NEWTONS = 4.0  # of full force: logs are in units, actions in [-1, 1]


def write_log(path):
    """What a robot's recorder would have left: a row a step, the force it was sent."""
    with open(path, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["episode", *NAMES, *FORCES])
        for number, episode in enumerate(demonstrate(Reach(), 20).episodes):
            for obs, action in zip(episode.observations, episode.actions, strict=False):
                rows.writerow([number, *obs, *(NEWTONS * action)])


def read_log(path):
    """Demonstrations; the last row of each recording tells what its last force led to."""
    recordings = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            recordings.setdefault(row["episode"], []).append(row)
    episodes = []
    for rows in recordings.values():
        obs = np.array([[float(row[name]) for name in NAMES] for row in rows], np.float32)
        force = np.array([[float(row[name]) for name in FORCES] for row in rows[:-1]], np.float32)
        episodes.append(iqmpc.Episode(obs, force / NEWTONS))
    return iqmpc.Demonstrations("reach", tuple(episodes), {"demonstrator": "a log"})


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--folder", type=Path, default=Path("runs/robot"))
    parser.add_argument("settings", nargs="*", help="as of iqmpc train")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    log, agent_file = given.folder / "log.csv", given.folder / "agent.iqmpc"

    write_log(log)
    demonstrations = read_log(log)
    demonstrations.save(given.folder / "log.h5")  # iqmpc demos check log.h5
    # Learnt in a simulation (or on the robot: docs/real-time.md).
    run = given.folder / "run"
    train(run, given.steps, f"demos.add={given.folder / 'log.h5'}", *given.settings)

    interface = TaskInterface(
        observation_names=NAMES,
        action_names=FORCES,
        action_low=(-NEWTONS, -NEWTONS),
        action_high=(NEWTONS, NEWTONS),
        action_repeat=1,
        control_period_s=0.02,
    )
    export(run, agent_file, changes={"planner.budget_us": 5000.0}, interface=interface)

    # The robot's loop; examples/cpp/control_loop.cpp is the same without Python.
    agent, robot = iqmpc.Agent.load(agent_file), Reach()
    agent.reset()
    obs, _ = robot.reset(seed=7)
    for _ in range(60):
        action = agent.act(obs)
        force = NEWTONS * action  # what the motors would be sent
        obs, reward, *_ = robot.step(action)
    print(f"last force {np.round(force, 2)} N, {np.linalg.norm(obs[4:]):.2f} from the goal")
