"""Several environments stepped in this process, each in an episode of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import numpy as np

from iqmpc.envs import check_spaces, interface
from iqmpc.envs.interface import HasSpaces
from iqmpc.episode import Episode, EpisodeBuffer
from iqmpc.errors import TaskError
from iqmpc.seeding import stream_seed

# Observation, `interface.taken_over`, reward, terminated, truncated.
Stepped = tuple[np.ndarray, np.ndarray | None, float, bool, bool]


class VectorEnv:
    """N environments with the same spaces, stepped one after the other.

    Nothing is reset by itself (`gymnasium.vector` does so, and otherwise in every version): an
    environment whose episode has ended waits for `start`. Episode k of all that were started is
    reset with `stream_seed(seed, "train", k)`; `started` counts them and may be set to continue.
    An episode that does not end by itself is cut after `episode_length` steps (None: never), which
    is told to `on_message` once.

    Raises `TaskError` for spaces that do not fit the method or differ between the environments,
    and for an environment that is given twice; `start` and `step` for what an environment gives
    and must not (`iqmpc.envs.interface`), by episode and step.
    """

    def __init__(
        self,
        envs: Sequence[HasSpaces],
        name: str,
        *,
        seed: int = 0,
        episode_length: int | None = None,
        on_message: Callable[[str], None] | None = None,
    ):
        """`name` is the task's, for messages."""
        if not envs:
            raise ValueError("no environment was given")
        if len({id(env) for env in envs}) < len(envs):
            raise TaskError(f"{name}: each of the {len(envs)} environments must be another object")
        self.envs: list[Any] = list(envs)  # of a `WorkerVectorEnv` its workers
        self.name, self.seed, self.started = name, seed, 0
        self._episode_length, self._cut_before = episode_length, False
        self._on_message = on_message or (lambda text: None)
        self.observation_spec, self.action_dim = check_spaces(envs[0], name)
        for index, env in enumerate(envs[1:], 1):
            check_alike(env, envs[0], f"{name}: environment {index}", "environment 0")
        self._episodes: list[EpisodeBuffer | None] = [None] * len(envs)
        self.restarts = 0  # of environments: those in this process are never restarted

    def __len__(self) -> int:
        """N."""
        return len(self.envs)

    def start(self) -> list[int]:
        """Reset the environments that are in no episode: at first all, then those that ended.

        Returns their indices.
        """
        idle = waiting = self._idle()
        while waiting:
            numbers = dict(
                zip(waiting, range(self.started, self.started + len(waiting)), strict=True)
            )
            self.started += len(waiting)
            for index, obs in self._reset(numbers).items():
                self._episodes[index] = EpisodeBuffer([obs], numbers[index])
            waiting = self._idle()
        return idle

    @property
    def open(self) -> list[EpisodeBuffer | None]:
        """Each environment's episode so far; None of one that waits for `start`."""
        return list(self._episodes)

    @property
    def observations(self) -> np.ndarray:
        """The latest of all, [N, O] or [N, 3C, 64, 64]; `RuntimeError` before `start`."""
        return np.stack([self._running(index).observations[-1] for index in range(len(self))])

    def step(self, actions: np.ndarray) -> list[Episode]:
        """Step the first n environments with actions float32 [n, A], n <= N.

        Returns the episodes that ended with this step, whole and in the order of the environments.
        Raises `RuntimeError` for an environment that waits for `start`.
        """
        ended = []
        for index, (obs, taken_over, reward, terminated, truncated) in self._step(actions).items():
            episode = self._running(index)
            episode.add(actions[index], reward, obs, taken_over)
            over = terminated or truncated
            if not over and len(episode.actions) == self._episode_length:
                over = True
                self._say_cut()
            if over:
                self._episodes[index] = None
                with interface.at(self._place(episode.number, len(episode.actions))):
                    ended.append(episode.finish(terminated=terminated))
        return ended

    def cut(self) -> list[Episode]:
        """End all episodes where they are; returns those that have made a step."""
        unfinished = [e.finish() for e in self._episodes if e is not None and e.actions]
        self._episodes = [None] * len(self)
        return unfinished

    def close(self) -> None:
        """End what was started for these environments; those in this process are the caller's."""

    def _reset(self, numbers: dict[int, int]) -> dict[int, np.ndarray]:
        """Begin episodes, {index: its number} -> {index: observation} of those that could be."""
        result = {}
        for index, number in numbers.items():
            with interface.at(self._place(number, 0)):
                obs, _ = interface.reset(self.envs[index], seed=self._seed_of(number))
                result[index] = interface.observation(obs, self.envs[index].observation_space)
        return result

    def _step(self, actions: np.ndarray) -> dict[int, Stepped]:
        """What followed the step, by index, of those that made it."""
        episodes = [self._running(index) for index in range(len(actions))]
        result = {}
        for index, (action, episode) in enumerate(zip(actions, episodes, strict=True)):
            with interface.at(self._place(episode.number, len(episode.actions) + 1)):
                result[index] = step(self.envs[index], action)
        return result

    def _seed_of(self, number: int) -> int:
        return stream_seed(self.seed, "train", number)

    def _place(self, number: int, step: int) -> str:
        return f"{self.name}, episode {number}, {f'step {step}' if step else 'its reset'}"

    def _say_cut(self) -> None:
        if not self._cut_before:
            self._cut_before = True
            self._on_message(
                f"warning: an episode of {self.name} did not end by itself and was cut after "
                f"task.episode_length={self._episode_length} steps, as all such will be"
            )

    def _idle(self) -> list[int]:
        return [index for index, episode in enumerate(self._episodes) if episode is None]

    def _running(self, index: int) -> EpisodeBuffer:
        episode = self._episodes[index]
        if episode is None:
            raise RuntimeError(f"environment {index} is in no episode: call start() first")
        return episode


def step(env: gymnasium.Env, action: np.ndarray) -> Stepped:
    """One step of an environment, checked (`iqmpc.envs.interface`)."""
    obs, reward, terminated, truncated, info = interface.step(env, action)
    taken_over = interface.taken_over(info, env.action_space)
    seen = interface.observation(obs, env.observation_space)
    return seen, taken_over, reward, terminated, truncated


def check_alike(env: HasSpaces, other: HasSpaces, name: str, other_name: str) -> None:
    """`TaskError` where `env`'s spaces do not fit the method or are not those of `other`."""
    check_spaces(env, name)
    for space in ("observation_space", "action_space"):
        one, two = getattr(env, space), getattr(other, space)
        for what in ("shape", "dtype", "low", "high"):
            if not np.array_equal(getattr(one, what), getattr(two, what)):
                raise TaskError(
                    f"{name} and {other_name} differ in {space}.{what}: {one} and {two}"
                )
