"""A process that was forked after a plan or an update goes on as any other, and ends."""

import subprocess
import sys

import pytest

from iqmpc import _C

SETUP = """
import os, signal, sys, threading, time
import numpy as np, torch
from iqmpc import Planner, WorldModel
from iqmpc.config import ModelConfig, PlannerConfig
torch.manual_seed(0)
torch.set_num_threads(1)
model = WorldModel(3, 2, ModelConfig(hidden_dim=32, latent_dim=32, encoder_dim=32))
config = PlannerConfig(backend="cpu", threads=3, samples={samples}, elites=16, iterations={rounds})
planner = Planner(model.weights(), config, discount=0.99)
obs = torch.zeros(1, 3)
work = lambda: planner.plan(obs)
"""
AFTER = """
first = planner.plan(obs)
planner.step, state = 0, planner.reset()
if os.fork() == 0:
    signal.alarm(60)
    same = torch.equal(planner.plan(obs), first)
    planner.reset()
    del planner
    sys.exit(not same)
_, status = os.wait()
print(os.waitstatus_to_exitcode(status), torch.equal(planner.plan(obs), first))
"""
# Forks until one falls into a call: the child then says so (0), else it has worked there (3).
DURING = """
over = threading.Event()
def go_on():
    while not over.is_set():
        work()
thread = threading.Thread(target=go_on)
thread.start()
for _ in range(100):
    if os.fork() == 0:
        signal.alarm(60)
        code = 3
        try:
            work()
        except RuntimeError as error:
            code = 0 if "this process was forked while the" in str(error) else 1
        {forget}
        os._exit(code)
    code = os.waitstatus_to_exitcode(os.wait()[1])
    if code != 3:
        break
over.set()
thread.join()
print(code, True)
"""

LEARNER = """
import os, signal, sys, threading, time
import torch
from iqmpc.config import Config
from iqmpc.learner import Learner
from iqmpc.losses import Batch
from iqmpc.threads import set_threads
set_threads(3, torch_idle=True)
torch.manual_seed(0)
config = Config().replace({{"model.hidden_dim": {width}, "model.latent_dim": 32,
                           "model.encoder_dim": 32, "learner.mode": "fused"}})
learner = Learner(3, 2, config)
n = {columns}
obs, action, zeros = torch.randn(4, n, 3), torch.rand(3, n, 2), torch.zeros(3, n)
batch = Batch(obs, action, zeros, zeros, n // 2)
work = lambda: learner.update(batch)
"""
AFTER_AN_UPDATE = """
learner.update(batch)
before = {{k: v.clone() for k, v in learner.state_dict().items()}}
learner.update(batch)
after = {{k: v.clone() for k, v in learner.state_dict().items()}}
learner.load_state_dict(before)
same = lambda: all(torch.equal(v, after[k]) for k, v in learner.state_dict().items())
if os.fork() == 0:
    signal.alarm(60)
    learner.update(batch)
    code = not same()
    del learner
    sys.exit(code)
_, status = os.wait()
learner.update(batch)
print(os.waitstatus_to_exitcode(status), same())
"""


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "program",
    [
        (SETUP + AFTER).format(samples=64, rounds=2),
        (SETUP + DURING).format(samples=2048, rounds=20, forget="del planner"),
        (LEARNER + AFTER_AN_UPDATE).format(width=32, columns=8),
        (LEARNER + DURING).format(width=256, columns=512, forget="del learner"),
    ],
    ids=["plan-after", "plan-during", "update-after", "update-during"],
)
def test_a_fork(program):
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=100
    )
    assert done.stdout == "0 True\n", done.stderr


def test_nothing_in_the_place_of_a_model():
    with pytest.raises(TypeError):
        _C.rollout(None, None, None, None, (0, 1), 0.9, "advantage", 0.0, None, 1)
    with pytest.raises(TypeError):
        _C.Planner(
            None,
            problems=1,
            horizon=1,
            samples=1,
            elites=1,
            policy_trajectories=0,
            iterations=1,
            temperature=1.0,
            std_min=0.1,
            std_max=1.0,
            discount=0.9,
            enabled=True,
            threads=1,
            budget_us=0.0,
            seed=0,
        )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"horizon": 2**30}, "horizon must be at most 1048576"),
        ({"samples": 2**30}, "samples must be at most 1048576"),
        ({"problems": 2**20, "samples": 2**20}, r"problems \* horizon \* samples must be at most"),
    ],
)
def test_sizes_beyond_all_plans(changes, said):
    import torch

    from iqmpc import WorldModel
    from iqmpc.config import ModelConfig, PlannerConfig
    from iqmpc.kernels.mppi_plan import BACKENDS

    torch.manual_seed(0)
    model = WorldModel(3, 2, ModelConfig(hidden_dim=32, latent_dim=32, encoder_dim=32))
    sizes = {"horizon": 3, "samples": 64, **changes}
    problems = sizes.pop("problems", 1)
    with pytest.raises(ValueError, match=said):
        BACKENDS["cpu"](model.weights(), PlannerConfig(**sizes), discount=0.9, problems=problems)
