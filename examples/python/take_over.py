"""A run starts from another's agent, and a person corrects it while it acts.

python examples/python/take_over.py --steps 1000
"""

import argparse

import gymnasium as gym
import numpy as np
from own_environment import Reach, demonstrate, train

import iqmpc


class TakeOver(gym.Wrapper):
    """A person pushes in the first ten steps of each episode: `info` says so."""

    def step(self, action):
        mass = self.unwrapped
        person = None
        if mass.steps < 10:
            person = np.clip(5 * (mass.goal - mass.place) - 20 * mass.velocity, -1, 1)
        obs, reward, terminated, truncated, info = self.env.step(
            action if person is None else person
        )
        return obs, reward, terminated, truncated, {**info, "intervene_action": person}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--run", default="runs/reach-person")
    parser.add_argument("settings", nargs="*", help="as of iqmpc train")
    given = parser.parse_args()
    first = f"{given.run}-before"
    train(first, given.steps, *given.settings)

    config = iqmpc.compose(
        [
            "task.name=reach",
            "task.suite=own",
            "task.episode_length=60",
            f"train.steps={given.steps}",
            "train.random_steps=60",  # the agent's own: it acts from the first step
            f"init={first}",
            "init.replay=true",
            *given.settings,
        ]
    )
    trainer = iqmpc.Trainer(
        config,
        TakeOver(Reach()),
        demonstrate(Reach(), 20),
        eval_env=Reach(),  # without the person
        run=given.run,
        on_message=print,
    )
    before = len(trainer.experts)
    trainer.train()
    print(f"{len(trainer.experts) - before} steps of the person are demonstrations now")
