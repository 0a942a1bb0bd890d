"""Simulators that step many worlds at once: `gymnasium.vector`, and tensors of shape [N, …]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import gymnasium
import numpy as np

from iqmpc.envs import interface
from iqmpc.envs.vector import Stepped, VectorEnv
from iqmpc.episode import Episode, EpisodeBuffer
from iqmpc.errors import TaskError
from iqmpc.seeding import stream_seed

# Where the last observations of episodes stand whose worlds have begun others in the same step.
_FINAL = ("final_obs", "final_observation")
_STEP = "(observation, reward, terminated, truncated, info)"


class Worlds(Protocol):
    """N worlds stepped together: a `gymnasium.vector.VectorEnv`, or what has these.

    Arrays are NumPy's or tensors, of torch on any device or of JAX. A world whose episode has ended
    begins another by itself, as `metadata["autoreset_mode"]` says: `SameStep`, which gives the new
    episode's observation at once and the old one's last in `info["final_obs"]` (or
    `"final_observation"`) [N, …], or `NextStep`, the step after, which ignores that world's action.
    Where it says nothing, it is as `gymnasium.vector` has it in the version that is installed:
    `SameStep` before 1.0, then `NextStep`.
    """

    num_envs: int
    metadata: dict[str, Any]

    @property
    def single_observation_space(self) -> gymnasium.Space: ...

    @property
    def single_action_space(self) -> gymnasium.Space: ...

    def reset(self, *, seed: int) -> tuple[Any, dict[str, Any]]:
        """-> observation [N, …], info."""
        ...

    def step(self, actions: np.ndarray) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """action float32 [N, A] -> observation [N, …], reward, terminated, truncated [N], info."""
        ...


def are_worlds(env: Any) -> bool:
    """Whether something is stepped as `Worlds` are."""
    return hasattr(env, "num_envs") and hasattr(env, "single_observation_space")


class BatchedVectorEnv(VectorEnv):
    """A `VectorEnv` over worlds that are stepped in one call and reset themselves (`Worlds`).

    All are reset together, where a run begins or is continued, with a seed that follows from `seed`
    and the episodes begun so far; after that each draws its own. With `NextStep` a world sits out
    the step in which it is reset, which counts as a step of the run. An episode that reaches
    `episode_length` ends there for the learner; what the world does next is another.

    Raises `TaskError` as `VectorEnv` does, and for worlds that do not reset themselves.
    """

    def __init__(
        self,
        worlds: Worlds,
        name: str,
        *,
        seed: int = 0,
        episode_length: int | None = None,
        on_message: Callable[[str], None] | None = None,
    ):
        super().__init__(
            [_World(worlds) for _ in range(worlds.num_envs)],
            name,
            seed=seed,
            episode_length=episode_length,
            on_message=on_message,
        )
        self._worlds, self._at_once = worlds, _resets_at_once(worlds, name)
        self._latest = np.empty(0)  # observations of all worlds
        self._ready: list[int] | None = (
            None  # worlds at an episode's beginning; None before all are
        )

    def start(self) -> list[int]:
        """Start the episodes of worlds that are at the beginning of one: at first all."""
        if self._ready is None:
            with interface.at(f"{self.name}, the reset of {len(self)} worlds"):
                obs, _ = self._worlds.reset(seed=stream_seed(self.seed, "train", self.started))
                self._latest = self._rows("the observation", obs)
            self._ready = list(range(len(self)))
        started, self._ready = self._ready, []
        for index in started:
            with interface.at(self._place(self.started, 0)):
                obs = self._observation(self._latest[index])
            self._episodes[index] = EpisodeBuffer([obs], self.started)
            self.started += 1
        return started

    @property
    def observations(self) -> np.ndarray:
        """The latest of all, [N, …], also of a world that the next step resets."""
        return np.stack([self._observation(row) for row in self._latest])

    def step(self, actions: np.ndarray) -> list[Episode]:
        """Step all worlds, the first n with actions float32 [n, A]; the others' steps are lost.

        Returns the episodes of those n that ended.
        """
        reset = self._idle()  # by this step
        ended = super().step(actions)
        self._ready = self._idle() if self._at_once else reset
        return ended

    def cut(self) -> list[Episode]:
        """End all episodes where they are, and reset all worlds before they are stepped again."""
        self._ready = None
        return super().cut()

    def _step(self, actions: np.ndarray) -> dict[int, Stepped]:
        given = np.zeros((len(self), self.action_dim), np.float32)
        given[: len(actions)] = actions
        with interface.at(f"{self.name}, a step of {len(self)} worlds"):
            result = self._worlds.step(given)
            if not isinstance(result, tuple) or len(result) != 5:
                raise TaskError(f"step() gave a {type(result).__name__}, expected {_STEP}")
            *parts, info = result
            names = ("the observation", "the reward", "terminated", "truncated")
            rows = [self._rows(name, part) for name, part in zip(names, parts, strict=True)]
        self._latest = rows[0]
        found = {}
        for index, episode in enumerate(self._episodes[: len(actions)]):
            if episode is None:
                continue
            obs, reward, terminated, truncated = (row[index] for row in rows)
            with interface.at(self._place(episode.number, len(episode.actions) + 1)):
                if self._at_once and (terminated or truncated):
                    obs = _final(info, index)
                found[index] = (
                    self._observation(obs),
                    None,  # nobody takes over in one of many worlds
                    interface.number(reward),
                    interface.flag("terminated", terminated),
                    interface.flag("truncated", truncated),
                )
        return found

    def _observation(self, row: Any) -> np.ndarray:
        return interface.observation(row, self.envs[0].observation_space)

    def _rows(self, name: str, value: Any) -> np.ndarray:
        """A copy on the host of what is given for all worlds, [N, …]."""
        found = _host(value)
        if found.shape[:1] != (len(self),):
            raise TaskError(f"{name} has shape {found.shape}, expected [{len(self)}, …]")
        return found


class _World:
    """The spaces of one of them."""

    def __init__(self, worlds: Worlds):
        self.observation_space = worlds.single_observation_space
        self.action_space = worlds.single_action_space


def _resets_at_once(worlds: Worlds, name: str) -> bool:
    """Whether a world's next episode begins in the step that ends one."""
    said = (getattr(worlds, "metadata", None) or {}).get("autoreset_mode")
    mode = getattr(said, "value", said)  # gymnasium's is an enumeration
    if mode is None:
        return int(gymnasium.__version__.partition(".")[0]) < 1
    if mode not in ("SameStep", "NextStep"):
        raise TaskError(
            f"{name}: the worlds must reset themselves, autoreset_mode SameStep or NextStep, got "
            f"{mode}"
        )
    return mode == "SameStep"


def _final(info: dict[str, Any], index: int) -> np.ndarray:
    """What was observed last in an episode whose world is in the next one already."""
    for name in _FINAL:
        rows = info.get(name)
        if rows is not None and rows[index] is not None:
            return _host(rows[index])
    raise TaskError(
        "the episode has ended, and its last observation is in neither "
        + " nor ".join(f"info[{name!r}]" for name in _FINAL)
    )


def _host(value: Any) -> np.ndarray:
    """A copy of an array or a tensor as NumPy's."""
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    return np.array(value)
