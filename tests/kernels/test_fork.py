"""A process that was forked after a plan plans, forgets and ends as any other."""

import subprocess
import sys
import textwrap

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
DURING = """
thread = threading.Thread(target=planner.plan, args=(obs,))
thread.start()
time.sleep(0.3)
if os.fork() == 0:
    signal.alarm(60)
    try:
        planner.plan(obs)
    except RuntimeError as error:
        said = "forked while the planner was planning" in str(error)
    del planner
    os._exit(not said)
_, status = os.wait()
thread.join()
print(os.waitstatus_to_exitcode(status), True)
"""


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("code", "samples", "rounds"), [(AFTER, 64, 2), (DURING, 8192, 200)])
def test_a_fork(code, samples, rounds):
    program = SETUP.format(samples=samples, rounds=rounds) + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                          timeout=100)
    assert done.stdout == "0 True\n", done.stderr


def test_nothing_in_the_place_of_a_model():
    with pytest.raises(TypeError):
        _C.rollout(None, None, None, None, (0, 1), 0.9, "advantage", 0.0, None, 1)
    with pytest.raises(TypeError):
        _C.Planner(None, num_envs=1, horizon=1, samples=1, elites=1, policy_trajectories=0,
                   iterations=1, temperature=1.0, std_min=0.1, std_max=1.0, discount=0.9,
                   enabled=True, threads=1, budget_us=0.0, seed=0)


@pytest.mark.parametrize(("changes", "said"), [
    ({"horizon": 2**54}, "horizon must be at most 1048576"),
    ({"samples": 2**62}, "samples must be at most 1048576"),
    ({"num_envs": 2**20, "samples": 2**20}, r"num_envs \* horizon \* samples must be at most"),
])
def test_sizes_beyond_all_plans(changes, said):
    import torch

    from iqmpc import WorldModel
    from iqmpc.config import ModelConfig, PlannerConfig
    from iqmpc.kernels.mppi_plan import BACKENDS

    torch.manual_seed(0)
    model = WorldModel(3, 2, ModelConfig(hidden_dim=32, latent_dim=32, encoder_dim=32))
    sizes = {"horizon": 3, "samples": 64, **changes}
    envs = sizes.pop("num_envs", 1)
    with pytest.raises(ValueError, match=said):
        BACKENDS["cpu"](model.weights(), PlannerConfig(**sizes), discount=0.9, beta=0.0,
                        num_envs=envs, seed=0)
