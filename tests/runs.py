"""What several files of tests on whole runs share."""

import csv
import os

import gymnasium
import numpy as np
import torch

from iqmpc import Trainer
from iqmpc.kernels import layers
from iqmpc.run_folder import RunFolder
from iqmpc.runlog import TIMING

# As small as a run can be made, in the words of the command line.
TINY_SIZES = [
    "model.encoder_dim=16",
    "model.hidden_dim=16",
    "model.latent_dim=16",
    "planner.samples=16",
    "planner.elites=4",
    "planner.policy_trajectories=4",
    "planner.iterations=1",
    "learner.batch=8",
]
# With which the point is learnt.
LEARNING = {
    "train.steps": 1000,
    "train.random_steps": 100,
    "train.initial_updates": 100,
    "train.final_episodes": 10,
    "train.eval_every": 1000,
    "learner.batch": 32,
    "learner.lr": 1e-3,
    "planner.samples": 64,
    "planner.elites": 8,
}


def train(config, env, demonstrations, run, **options):
    return Trainer(config, env, demonstrations, run=run, **options).train()


def pearson(x, y):
    x, y = x - x.mean(), y - y.mean()
    return (x * y).sum() / np.sqrt((x**2).sum() * (y**2).sum())


def tensors_of(run):
    _, tensors, meta = RunFolder(run).newest()
    del meta["wall_s"], meta["settings"]  # such as how updates overlap
    return tensors, meta


def assert_same_state(one, two):
    (a, meta_a), (b, meta_b) = tensors_of(one), tensors_of(two)
    assert meta_a == meta_b and a.keys() == b.keys()
    different = [k for k in a if not torch.equal(a[k], b[k])]
    assert not different


def planned_steps(trainer):
    """Train, and the environment steps at which the planner acted."""
    planned = []
    act = trainer.agent.act
    trainer.agent.act = lambda obs, **k: planned.append(trainer.env_steps) or act(obs, **k)
    trainer.eval_env = None  # nothing is evaluated on the way
    trainer._finish = dict
    trainer.train()
    return planned


class Watched(gymnasium.Wrapper):
    """Keeps what was observed and done."""

    def __init__(self, env):
        super().__init__(env)
        self.seen = []

    def reset(self, **how):
        self.obs, info = self.env.reset(**how)
        return self.obs, info

    def step(self, action):
        self.seen.append((self.obs, np.array(action)))
        self.obs, *rest = self.env.step(action)
        return self.obs, *rest


def modes(weights, seen):
    """The prior's mean actions where `seen` was, and what was done there."""
    obs, actions = (torch.tensor(np.array(x)) for x in zip(*seen, strict=True))
    return torch.tanh(layers.policy(weights, layers.encode(weights, obs))[0]), actions


class Marked(gymnasium.Env):
    """Observes (which environment and episode it is, the step): what belongs together shows."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)

    def __init__(self, mark, length, *, terminates=False, fails_at=None):
        self.mark, self.length, self.terminates = mark, length, terminates
        self.left, self.seeds = fails_at, []

    def obs(self):
        return np.array([self.mark + len(self.seeds) / 128, self.steps], np.float32)

    def reset(self, *, seed=None, options=None):
        self.seeds.append(seed)
        self.steps = 0
        return self.obs(), {}

    def step(self, action):
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
        self.steps += 1
        ended = self.steps >= self.length
        return (
            self.obs(),
            float(self.steps),
            ended and self.terminates,
            ended and not self.terminates,
            {},
        )


def marked(**options):
    """Episodes of 5, 7 and 11 steps; the 7 end in a terminal state."""
    return [Marked(1, 5), Marked(2, 7, terminates=True), Marked(3, 11, **options)]


def rows_of(run):
    return [
        {k: v for k, v in row.items() if k not in ("wall_s", *TIMING)}
        for row in csv.DictReader(open(run / "metrics.csv", newline=""))
    ]


def interrupted_at(trainer, step, number):
    """Send this process a signal in the step after `step`."""
    act = trainer._act

    def acting(obs):
        if trainer.env_steps == step:
            os.kill(os.getpid(), number)
        return act(obs)

    trainer._act = acting
    return trainer
