"""Environments in worker processes: the serial episodes, and workers that fail in every way."""

import ctypes
import functools
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium
import numpy as np
import pytest

from iqmpc import make_env
from iqmpc.envs.vector import VectorEnv
from iqmpc.envs.workers import WorkerVectorEnv
from iqmpc.errors import TaskError, WorkerError
from iqmpc.seeding import stream_seed

pytestmark = pytest.mark.timeout(120)


class Walk(gymnasium.Env):
    """Observes the last action and a seeded random walk; from step 4 on ends by chance.

    `fault(env)` is called at every step; it may misbehave.
    """

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float64)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)

    def __init__(self, fault=None):
        self.fault, self.obs = fault, np.zeros(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seed, self.steps = seed, 0
        self.obs[:] = self.np_random.normal(size=3)
        return self.obs, {}

    def step(self, action):
        self.steps += 1
        if self.fault is not None:
            self.fault(self)
        self.obs[:2] = action
        self.obs[2] += self.np_random.normal()
        luck = self.np_random.random()
        late = self.steps >= 4
        return (
            self.obs,
            np.float32(self.obs[2]),
            late and luck < 0.1,
            late and luck > 0.9,
            {"big": np.zeros(9)},
        )


def at_step(step, action, env):
    if env.steps == step:
        action()


def first_episode(action, env):
    """In the third step of the run's first episode alone, so that a restart helps."""
    if env.seed == stream_seed(0, "train", 0) and env.steps == 3:
        action()


def die(number=signal.SIGKILL):
    os.kill(os.getpid(), number)


def fail():
    raise ValueError("the simulator [diverged]")


def faulty(action, when=first_episode):
    return functools.partial(Walk, functools.partial(when, action))


def vector(*factories, **options):
    return WorkerVectorEnv(factories, "walk", like=Walk(), **options)


def episodes(envs, ticks, leave_out=False):
    """What `ticks` steps of one stream of actions recorded, and what was started when."""
    random, ended, started = np.random.default_rng(5), [], []
    try:
        for tick in range(ticks):
            started.append(envs.start())
            actions = random.uniform(-1, 1, (len(envs), envs.action_dim)).astype(np.float32)
            ended += [
                envs.observations,
                *envs.step(actions[:1] if leave_out and tick == ticks - 1 else actions),
            ]
        ended += envs.cut()
    finally:
        envs.close()
    return ended, started


def assert_same(one, two):
    assert one[1] == two[1] and len(one[0]) == len(two[0])
    for a, b in zip(one[0], two[0], strict=True):
        if isinstance(a, np.ndarray):
            assert a.dtype == b.dtype == np.float32
            np.testing.assert_array_equal(a, b)
            continue
        assert a.terminated is b.terminated and a.rewards.tolist() == b.rewards.tolist()
        for x, y in ((a.observations, b.observations), (a.actions, b.actions)):
            assert np.array(x).dtype == np.array(y).dtype == np.float32
            np.testing.assert_array_equal(x, y)


def test_episodes_are_the_serial_ones_bit_for_bit():
    serial = episodes(VectorEnv([Walk() for _ in range(3)], "walk", seed=3), 60, leave_out=True)
    assert sum(not isinstance(e, np.ndarray) for e in serial[0]) > 15
    assert_same(episodes(vector(Walk, Walk, Walk, seed=3), 60, leave_out=True), serial)


def test_simulators_are_the_serial_ones_bit_for_bit():
    make = functools.partial(make_env, "cheetah-run", episode_length=10, transition_noise=0.3)
    serial = episodes(VectorEnv([make(), make()], "cheetah"), 25)
    assert_same(episodes(WorkerVectorEnv([make, make], "cheetah", like=make()), 25), serial)


class Images(Walk):
    observation_space = gymnasium.spaces.Box(0, 255, (9, 64, 64), np.uint8)

    def image(self):
        return np.full((9, 64, 64), 100 + int(20 * self.obs[0]), np.uint8)

    def reset(self, **options):
        super().reset(**options)
        return self.image(), {}

    def step(self, action):
        _, *rest = super().step(action)
        return self.image(), *rest


def test_images_are_shared_as_bytes():
    envs = WorkerVectorEnv([Images, Images], "images", like=Images())
    assert envs._observations.array.nbytes == 2 * 9 * 64 * 64
    serial = VectorEnv([Images(), Images()], "images")
    for made in (envs, serial):
        made.start()
        made.step(np.float32([[0.5, 0], [-0.5, 0]]))
    assert envs.observations.dtype == np.uint8
    np.testing.assert_array_equal(envs.observations, serial.observations)
    envs.close()


@pytest.mark.parametrize(
    ("action", "said"),
    [
        (die, r"was ended by SIGKILL, as the system does when memory runs out"),
        (functools.partial(die, signal.SIGSEGV), "was ended by SIGSEGV"),
        (functools.partial(ctypes.string_at, 0), "was ended by SIGSEGV"),
        (functools.partial(os._exit, 3), "ended with exit code 3"),
        (
            functools.partial(sys.exit, 3),
            r"failed: step\(\) asked the program to end \(SystemExit: 3\)",
        ),
        (fail, r"raised\nTraceback [\s\S]*in fail\n[\s\S]*ValueError: the simulator \[diverged\]"),
        (functools.partial(time.sleep, 60), r"gave no answer for 5 s \(train.env_timeout_s\)"),
    ],
)
def test_a_worker_that_fails_is_named_and_replaced(action, said):
    messages = []
    timeout_s = 5 if "no answer" in said else 120
    envs = vector(faulty(action), Walk, timeout_s=timeout_s, on_message=messages.append)
    old = envs.envs[0].process.pid
    recorded, started = episodes(envs, 30)
    (message,) = messages
    assert envs.restarts == 1
    assert re.match(rf"worker 0 of walk \(process {old}\) {said}", message), message
    assert message.endswith(
        "\nrestarted (1 of at most 10), its unfinished episode of 2 steps dropped"
    )
    # the other's episodes went on, and the next of the one replaced has the next seed
    serial, _ = episodes(VectorEnv([Walk(), Walk()], "walk"), 3)
    np.testing.assert_array_equal(recorded[2], serial[2])
    assert started[:4] == [[0, 1], [], [], [0]]
    walk = Walk()
    walk.reset(seed=stream_seed(0, "train", 2))
    np.testing.assert_array_equal(recorded[3][0], walk.obs.astype(np.float32))
    assert all(
        len(e.observations) == len(e.actions) + 1 == len(e.rewards) + 1
        for e in recorded
        if not isinstance(e, np.ndarray)
    )


def test_a_worker_may_die_between_steps_and_inside_a_reset():
    messages = []
    envs = vector(Walk, Walk, on_message=messages.append)
    envs.start()
    envs.envs[1].process.kill()
    assert envs.step(np.zeros((2, 2), np.float32)) == []
    assert envs.restarts == 1 and "worker 1 of walk" in messages[0]
    envs.envs[1].process.kill()
    assert envs.start() == [1] and envs.restarts == 2 and envs.started == 4
    assert messages[1].endswith("restarted (2 of at most 10)")  # it was in no episode
    assert envs.observations.shape == (2, 3)
    envs.close()


def test_restarts_are_limited():
    envs = vector(Walk, faulty(fail, functools.partial(at_step, 2)), max_restarts=2)
    processes = []
    with pytest.raises(
        WorkerError,
        match=r"worker 1 of walk \(process \d+\) raised\nTraceback "
        r"[\s\S]*\[diverged\]\nafter 2 restarts of workers, and no more than "
        r"train.env_restarts=2 are allowed",
    ):
        while True:
            processes += [w.process for w in envs.envs]
            envs.start()
            envs.step(np.zeros((2, 2), np.float32))
    assert envs.restarts == 2 and not any(p.is_alive() for p in processes)


class Other(Walk):
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (5,), np.float32)


class Ragged(Walk):
    def reset(self, **options):
        super().reset(**options)
        return np.zeros(1), {}


def broken():
    raise RuntimeError("no licence")


def test_what_cannot_be_made_is_refused_at_once():
    with pytest.raises(
        TaskError,
        match=r"worker 1 of walk \(process \d+\) raised\nTraceback "
        r"[\s\S]*RuntimeError: no licence",
    ):
        vector(Walk, broken)
    with pytest.raises(
        TaskError,
        match=r"walk: environment 0 and that of the main process differ "
        r"in action_space.shape",
    ):
        vector(Other)
    with pytest.raises(
        TaskError,
        match=r"must be a module's own or functools.partial of one, got "
        r"<function .*<lambda>",
    ):
        vector(Walk, lambda: Walk())
    with pytest.raises(ValueError, match="no environment was given"):
        vector()
    with pytest.raises(WorkerError, match=r"observation has shape \(1,\), its space \(3,\)"):
        vector(Ragged, max_restarts=0).start()


def test_workers_load_no_torch():
    envs = WorkerVectorEnv([loaded], "loaded", like=Walk())
    envs.start()
    assert envs.observations.tolist() == [[0, 0, 0]]
    envs.close()


def loaded():
    """After a DMControl task was made: does the worker hold torch, triton, h5py's GPU kin?"""
    make_env("walker-walk").reset(seed=0)

    class Loaded(Walk):
        def reset(self, **options):
            super().reset(**options)
            self.obs[:] = [
                "torch" in sys.modules,
                "triton" in sys.modules,
                "iqmpc.trainer" in sys.modules,
            ]
            return self.obs, {}

    return Loaded()


_PARENT = """
import sys, time
sys.path.insert(0, sys.argv[1])
import numpy, test_workers
if __name__ == "__main__":
    envs = test_workers.vector(test_workers.Walk, test_workers.Walk)
    envs.start()
    print(*(w.process.pid for w in envs.envs), flush=True)
    if sys.argv[2] == "killed":
        time.sleep(60)
    if sys.argv[2] == "failed":
        raise RuntimeError("something else")
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")
@pytest.mark.parametrize("how", ["killed", "failed", "ended"])
def test_workers_end_with_their_parent_and_leave_nothing(tmp_path, how):
    script = tmp_path / "parent.py"
    script.write_text(_PARENT)
    shared = Path("/dev/shm")
    before = set(shared.iterdir()) if shared.exists() else set()
    parent = subprocess.Popen(
        [sys.executable, script, Path(__file__).parent, how],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    workers = [Path("/proc") / pid for pid in parent.stdout.readline().split()]
    assert len(workers) == 2
    if how == "killed":
        parent.kill()
    error = parent.communicate()[1]
    assert parent.returncode == {"killed": -signal.SIGKILL, "failed": 1, "ended": 0}[how], error
    deadline = time.monotonic() + 10
    while any(map(running, workers)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(running, workers))
    assert set(shared.iterdir()) <= before if shared.exists() else True


def running(process):
    """Not gone, and not only waiting for whoever inherited it to look."""
    try:
        return process.joinpath("stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_signals_that_end_the_run_are_not_the_workers():
    """A terminal or a scheduler may send them to all processes; the run then saves and ends."""
    messages = []
    envs = vector(Walk, on_message=messages.append)
    envs.start()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(envs.envs[0].process.pid, number)
        envs.step(np.zeros((1, 2), np.float32))
        envs.start()
    process = envs.envs[0].process
    envs.close()
    assert envs.restarts == 0 and not messages and not process.is_alive()
