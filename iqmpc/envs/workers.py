"""Several environments, each in a process of its own, over shared memory.

gymnasium's `AsyncVectorEnv` does not serve: it resets by itself (0.29 at once, with the last
observation in `info`; 1.x in a step that is none), and where one worker fails it ends them all.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import pickle
import signal
import time
import traceback
import weakref
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import gymnasium
import numpy as np

from iqmpc.envs import check_spaces, interface
from iqmpc.envs.vector import Stepped, VectorEnv, check_alike, step
from iqmpc.errors import TaskError, WorkerError

# Neither torch, MuJoCo nor GL survives a fork.
_CONTEXT = multiprocessing.get_context("spawn")
_GRACE_S = 5.0  # for a process to end by itself
_START_S = 120.0  # to import a simulator and make the environment, beside the time for a step


class WorkerVectorEnv(VectorEnv):
    """A `VectorEnv` whose environments are stepped at the same time, in N worker processes.

    Environment i is what `factories[i]` returns when it is called in its worker; the functions are
    pickled, so they are a module's own or `functools.partial` of such. Their spaces must be those
    of `like`, an environment of this process. The episodes are those of `VectorEnv`, bit for bit,
    for as long as no worker fails.

    A worker that raises, dies or gives no answer for `timeout_s` is named to `on_message` with its
    traceback or signal and replaced; its unfinished episode is dropped, and the environment waits
    for `start`, which gives it the next seed. `restarts` counts them (and may be set to continue);
    with one more than `max_restarts`, `step` and `start` raise `WorkerError`. The workers end with
    `close`, or with this process however that ends, and leave no shared memory behind.

    Raises `TaskError` where a function cannot be pickled or makes no environment with the spaces of
    `like`.
    """

    def __init__(
        self,
        factories: Sequence[Callable[[], gymnasium.Env]],
        name: str,
        *,
        like: gymnasium.Env,
        seed: int = 0,
        max_restarts: int = 10,
        timeout_s: float = 120.0,
        episode_length: int | None = None,
        on_message: Callable[[str], None] | None = None,
    ):
        spec, _ = check_spaces(like, name)
        spaces = _Spaces(like.observation_space, like.action_space)
        rows = len(factories)
        self._actions = _Shared(rows, spaces.action_space.shape, np.float32)
        self._observations = _Shared(rows, spec.shape, spec.dtype)
        workers = [
            _Worker(index, factory, name, spaces, self._observations, self._actions, timeout_s)
            for index, factory in enumerate(factories)
        ]
        super().__init__(
            workers, name, seed=seed, episode_length=episode_length, on_message=on_message
        )
        self.max_restarts = max_restarts
        self._finalizer = weakref.finalize(self, _end, workers)
        try:
            for worker in workers:
                worker.launch()
            for worker in workers:
                worker.receive()
        except _Failure as failure:
            self.close()
            raise TaskError(f"{failure}") from None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the workers."""
        self._finalizer()

    def _reset(self, numbers: dict[int, int]) -> dict[int, np.ndarray]:
        answers = self._ask(
            {index: self._seed_of(number) for index, number in numbers.items()},
            {index: (number, 0) for index, number in numbers.items()},
        )
        return {index: self._observations.array[index].copy() for index in answers}

    def _step(self, actions: np.ndarray) -> dict[int, Stepped]:
        self._actions.array[: len(actions)] = actions
        episodes = [self._running(index) for index in range(len(actions))]
        answers = self._ask(
            dict.fromkeys(range(len(actions))),
            {i: (e.number, len(e.actions) + 1) for i, e in enumerate(episodes)},
        )
        return {
            index: (self._observations.array[index].copy(), *answer)
            for index, answer in answers.items()
        }

    def _ask(
        self, commands: dict[int, int | None], places: dict[int, tuple[int, int]]
    ) -> dict[int, tuple]:
        """Send every command, then gather the answers of those workers that did not fail.

        `places` is each one's episode and the step in it, for messages.
        """
        for index, command in commands.items():
            self.envs[index].send(command)
        answers = {}
        for index in commands:
            try:
                answers[index] = self.envs[index].receive()
            except _Breach as breach:
                self._replace(index, f"{breach} ({self._place(*places[index])})")
            except _Failure as failure:
                self._replace(index, str(failure))
        return answers

    def _replace(self, index: int, failure: str) -> None:
        worker, episode = self.envs[index], self._episodes[index]
        dropped = (
            f", its unfinished episode of {len(episode.actions)} steps dropped" if episode else ""
        )
        self._episodes[index] = None
        while True:
            worker.end(grace_s=0)
            if self.restarts >= self.max_restarts:
                self.close()
                raise WorkerError(
                    f"{failure}\nafter {self.restarts} restarts of workers, and no more than "
                    f"train.env_restarts={self.max_restarts} are allowed"
                )
            self.restarts += 1
            self._on_message(
                f"{failure}\nrestarted ({self.restarts} of at most {self.max_restarts})" + dropped
            )
            try:
                worker.launch()
                worker.receive()
                return
            except _Failure as again:
                failure = str(again)


class _Spaces(NamedTuple):
    observation_space: Any  # flat Boxes or one of images, as `check_spaces` has seen to
    action_space: Any


class _Failure(Exception):
    """What a worker did instead of answering."""


class _Breach(_Failure):
    """Its environment gave what it must not."""


class _Shared:
    """An array [rows, *shape] that workers inherit: it has no name, so nothing can be left over."""

    def __init__(self, rows: int, shape: tuple[int, ...], dtype: Any):
        self._shape, self._dtype = (rows, *shape), np.dtype(dtype)
        self._raw = _CONTEXT.RawArray("b", int(np.prod(self._shape)) * self._dtype.itemsize)

    @property
    def array(self) -> np.ndarray:
        return np.frombuffer(self._raw, self._dtype).reshape(self._shape)


class _Worker:
    """This process's end of one worker; it has the spaces that its environment must have."""

    def __init__(
        self,
        index: int,
        factory: Callable[[], gymnasium.Env],
        name: str,
        spaces: _Spaces,
        observations: _Shared,
        actions: _Shared,
        timeout_s: float,
    ):
        self.observation_space, self.action_space = spaces
        self._index, self._name, self._timeout_s = index, name, timeout_s
        self._arguments = (index, factory, name, spaces, observations, actions)
        self.process: Any = None

    def launch(self) -> None:
        """Start the process; its first answer, to be received, is that the environment is made."""
        self._pipe, theirs = _CONTEXT.Pipe()
        process = _CONTEXT.Process(
            target=_serve,
            args=(theirs, *self._arguments),
            daemon=True,
            name=f"{self._name}-worker-{self._index}",
        )
        try:
            process.start()
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise TaskError(
                f"{self._name}: the function that makes environment {self._index} is sent to a "
                "worker process, so it must be a module's own or functools.partial of one, got "
                f"{self._arguments[1]!r} ({error})"
            ) from error
        finally:
            theirs.close()  # so that the death of the worker ends the pipe
        self.process = process
        self._expect(_START_S + self._timeout_s)

    def send(self, command: int | None) -> None:
        """A seed resets, None steps."""
        self._expect(self._timeout_s)
        with contextlib.suppress(OSError):  # it is dead, as `receive` will find
            self._pipe.send(command)

    def receive(self) -> tuple:
        """The answer; raises `_Failure` that names the worker and says what became of it."""
        try:
            if not self._pipe.poll(max(0.0, self._deadline - time.monotonic())):
                raise self._failure(f"gave no answer for {self._limit_s:g} s (train.env_timeout_s)")
            answer = self._pipe.recv()
        except (EOFError, OSError):
            self.process.join(_GRACE_S)
            raise self._failure(_ending(self.process.exitcode)) from None
        if isinstance(answer, TaskError):
            raise _Breach(str(self._failure(f"failed: {answer}")))
        if isinstance(answer, str):
            raise self._failure(f"raised\n{answer.rstrip()}")
        return answer

    def end(self, grace_s: float) -> None:
        """Leave the process `grace_s` to end by itself."""
        if self.process is not None:
            self._pipe.close()
            self.process.join(grace_s)
            if self.process.is_alive():
                self.process.kill()
                self.process.join()
            self.process = None

    def hang_up(self) -> None:
        if self.process is not None:
            self._pipe.close()

    def _expect(self, limit_s: float) -> None:
        """An answer, from now on within this time."""
        self._limit_s, self._deadline = limit_s, time.monotonic() + limit_s

    def _failure(self, what: str) -> _Failure:
        return _Failure(f"worker {self._index} of {self._name} (process {self.process.pid}) {what}")


def _end(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.hang_up()  # all of them first, to end at the same time
    for worker in workers:
        worker.end(_GRACE_S)


def _ending(code: int | None) -> str:
    if code is None:
        return "closed its pipe"
    if code >= 0:
        return f"ended with exit code {code}; what it printed says why"
    name = signal.Signals(-code).name
    cause = ", as the system does when memory runs out" if name == "SIGKILL" else ""
    return f"was ended by {name}{cause}"


def _serve(
    pipe: Connection,
    index: int,
    factory: Callable[[], gymnasium.Env],
    name: str,
    spaces: _Spaces,
    observations: _Shared,
    actions: _Shared,
) -> None:
    """The worker: a made environment, then seeds to reset it and None to step it, until EOF."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # they are the parent's, which closes the pipe
    faulthandler.enable()  # where a simulator crashes, the last words are Python's
    env: gymnasium.Env | None = None
    observation, action = observations.array[index], actions.array[index]

    def make() -> tuple:
        nonlocal env
        env = factory()
        check_alike(env, spaces, f"{name}: environment {index}", "that of the main process")
        return ()

    def act(seed: int | None) -> tuple:
        assert env is not None  # made before anything is asked of it
        if seed is None:
            observation[...], *answer = step(env, action)
            return tuple(answer)
        obs, _ = interface.reset(env, seed=seed)
        observation[...] = interface.observation(obs, env.observation_space)
        return ()

    with contextlib.suppress(EOFError, OSError):  # the parent has closed the pipe, or is dead
        pipe.send(_tried(make))
        while True:
            pipe.send(_tried(act, pipe.recv()))
    if env is not None:
        env.close()


def _tried(function: Callable[..., tuple], *args: Any) -> tuple | str | TaskError:
    """The function's value, or the traceback of what it raised (a `TaskError` says it itself)."""
    try:
        return function(*args)
    except TaskError as error:
        return TaskError(str(error))  # without what it came from, which may not be picklable
    except BaseException:  # also SystemExit: whatever ends the environment is told
        return traceback.format_exc()
