"""Whatever the extension is given, it raises: nothing ends the process."""

import subprocess
import sys
import textwrap

import pytest

SETUP = """
import faulthandler
import numpy as np, torch
faulthandler.enable()
torch.set_num_threads(1)
from iqmpc import _C, WorldModel
from iqmpc.config import Config
from iqmpc.kernels.mppi_plan import BACKENDS
from iqmpc.learner import Learner

GARBAGE = [
    None, 0, -1, 2**70, 1e300, float("nan"), "", "x", b"x", True, object(), int, [], [None], (0,),
    [[None]], [[None, None]], [[[], []]], [[[None], [None]]], {}, {"x": 1}, np.zeros(0),
    np.zeros((0, 0), np.float32), np.zeros((1, 1, 1), np.float32), np.array(None),
    np.zeros((2, 2), np.float32)[:, ::-1], range(4), lambda: None]
small = {"model.hidden_dim": 32, "model.latent_dim": 32, "model.encoder_dim": 32,
         "learner.mode": "fused", "planner.samples": 32, "planner.elites": 4, "threads": 1}
config = Config().replace(small)
given = {}  # what each class is made with, by its name

class Spy:
    def __init__(self, name):
        self.name, self.made = name, getattr(_C, name)
    def __call__(self, *args, **options):
        given[self.name] = args, options
        return self.made(*args, **options)

CLASSES = ["ModelView", "WorldModel", "Planner", "Learner"]
for name in CLASSES:
    setattr(_C, name, Spy(name))
learner = Learner(3, 2, config)
plan = BACKENDS["cpu"](learner.weights, config.planner, discount=0.9, problems=1)
for name in CLASSES:
    setattr(_C, name, getattr(_C, name).made)
f = lambda *shape: np.zeros(shape, np.float32)
objects = {name: getattr(_C, name)(*args, **options) for name, (args, options) in given.items()}

tried = raised = 0
def attempt(function, *args, **options):
    global tried, raised
    tried += 1
    try:
        function(*args, **options)
    except Exception:
        raised += 1
"""
UNINITIALISED = """
for name in [*objects, "WorldModel"]:
    cls = getattr(_C, name)
    for make in (cls.__new__, cls.__mro__[1].__new__):
        for member in dir(cls):
            if member.startswith("__") and member != "__init__":
                continue
            bare = make(cls)
            try:
                found = getattr(bare, member)
            except (TypeError, RuntimeError):  # a property
                continue
            assert callable(found), (name, member)
            if member != "__init__":
                for count in range(9):
                    attempt(found, *[None] * count)
        for function in (lambda x: _C.WorldModel(x), lambda x: _C.Planner(x, **given["Planner"][1]),
                         lambda x: objects["Planner"].publish(x),
                         lambda x: _C.rollout(x, *[None] * 9)):
            attempt(function, make(cls))
assert tried == raised > 100, (tried, raised)
print("survived")
"""
GARBAGE = """
for name, (args, options) in given.items():
    cls = getattr(_C, name)
    for garbage in GARBAGE:
        for index in range(len(args)):
            attempt(cls, *args[:index], garbage, *args[index + 1:], **options)
        for key in options:
            attempt(cls, *args, **{**options, key: garbage})
z, o, r = f(4, 1, 3), f(3, 1, 2), f(3, 1)
rows = (f(9, 3), f(9, 2), f(9), f(9), np.arange(4))
calls = {
    "Planner": {"plan": [f(1, 3), False, f(1, 2)], "reset": [0], "publish": [objects["ModelView"]],
                "draws": [0]},
    "Learner": {"update": [f(4, 2, 3), f(3, 2, 2), f(3, 2), f(3, 2), 1, 0, 0, 0],
                "learn": [rows, rows, 2, 0, 0, 0], "draws": [0, 2, 1],
                "slices": [0, True, rows, 2]},
}
for name, methods in calls.items():
    for method, args in methods.items():
        function = getattr(objects[name], method)
        function(*args)
        for garbage in GARBAGE:
            for index in range(len(args)):
                attempt(function, *args[:index], garbage, *args[index + 1:])
for garbage in GARBAGE:
    for index in range(5):
        bad = (*rows[:index], garbage, *rows[index + 1:])
        attempt(objects["Learner"].learn, bad, rows, 2, 0, 0, 0)
        attempt(objects["Learner"].learn, rows, bad, 2, 0, 0, 0)
    args = [objects["WorldModel"], f(1, 32), f(1, 3, 4, 2), f(1, 2, 4, 2), (0, 1), 0.9, "advantage",
            0.0, f(1, 4), 1]
    for index in range(9):
        attempt(_C.rollout, *args[:index], garbage, *args[index + 1:])
_C.rollout(*args)
for starts in ([-1], [99], [2**62], [7]):
    attempt(objects["Learner"].learn, (*rows[:4], np.array(starts)), rows, 2, 0, 0, 0)
assert tried - raised < tried / 5 and tried > 1000, (tried, raised)
print("survived")
"""


@pytest.mark.timeout(300)
@pytest.mark.parametrize("code", [UNINITIALISED, GARBAGE], ids=["uninitialised", "garbage"])
def test_the_process_survives(code):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SETUP + code)],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.stdout.endswith("survived\n"), done.stderr[-3000:]
