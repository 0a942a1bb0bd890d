"""Demonstrations made offline: a policy acts, and its episodes are kept."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from typing import Protocol

import gymnasium
import numpy as np

import iqmpc
from iqmpc.agent import Agent
from iqmpc.demonstrators import npg, scripted
from iqmpc.demos.demonstrations import Demonstrations
from iqmpc.demos.types import DemonstrationError
from iqmpc.envs import interface, maniskill, myosuite
from iqmpc.envs.pixels import FrameRecorder
from iqmpc.episode import Episode
from iqmpc.evaluation import Noisy, rollout
from iqmpc.seeding import stream_seed

# Distributions whose versions change what an episode looks like, by the module that they install.
_PACKAGES = {
    "gymnasium": "gymnasium",
    "numpy": "numpy",
    "torch": "torch",
    "mujoco": "mujoco",
    "dm_control": "dm-control",
    "myosuite": "myosuite",
    "mani_skill2": "mani_skill2",
    "sapien": "sapien",
}


Function = Callable[[np.ndarray], np.ndarray]  # obs -> action


class Policy(Protocol):
    """Acts in one environment, from step to step of an episode; a plain function is one too."""

    def reset(self, env: gymnasium.Env) -> None:
        """An episode has begun: `env` has just been reset, and may be looked into. Optional."""

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        """obs float32 [O] -> action [A] in [-1, 1]."""
        ...


@dataclass(frozen=True)
class Demonstrator:
    """A policy and how its episodes become demonstrations.

    successes_only: keep only the episodes that are solved at their last step.
    noise: standard deviation of the Gaussian noise on its actions, unless another is asked for.
    provenance: who it is, as text by name.
    """

    policy: Policy | Function
    successes_only: bool = False
    noise: float = 0.0
    provenance: Mapping[str, str] = field(default_factory=dict)


def _packaged(task: str, env: gymnasium.Env, seed: int) -> Demonstrator:
    policy, provenance = npg.packaged(
        myosuite.TASKS[task], generator=np.random.default_rng(stream_seed(seed, "demonstrator"))
    )
    return Demonstrator(policy, successes_only=True, provenance=provenance)


def _scripted(task: str, env: gymnasium.Env, seed: int) -> Demonstrator:
    policy = scripted.CubeController(
        task, generator=np.random.default_rng(stream_seed(seed, "demonstrator"))
    )
    return Demonstrator(
        policy,
        successes_only=True,
        provenance={
            "demonstrator": "controller by hand (iqmpc.demonstrators.scripted)",
            "noise": f"{policy.noise} on actions, until the goal is reached",
        },
    )


# Tasks that have a demonstrator of their own: name -> what makes it, given the task's environment
# and the seed. Every other task's is an agent trained on its reward.
DEMONSTRATORS: dict[str, Callable[[gymnasium.Env, int], Demonstrator]] = {
    **{task: partial(_packaged, task) for task, id in myosuite.TASKS.items() if id in npg.CHOICES},
    **{task: partial(_scripted, task) for task in maniskill.TASKS},
}


class AgentPolicy:
    """A trained `iqmpc.Agent`, without exploration noise."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    def reset(self, env: gymnasium.Env) -> None:
        self._agent.reset()

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        return self._agent.act(obs)


def record(
    demonstrator: Demonstrator | Policy | Function,
    env: gymnasium.Env,
    *,
    task: str,
    episodes: int,
    max_tries: int,
    seed: int = 0,
    noise: float | None = None,
    min_return: float | None = None,
    successes_only: bool | None = None,
    fewer: bool = False,
    episode_length: int | None = None,
    provenance: Mapping[str, str] | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> Demonstrations:
    """Episodes of a demonstrator (or policy) until `episodes` are kept, of at most `max_tries`.

    Kept are those with at least `min_return` and, with `successes_only`, success at the last step.
    `noise` and `successes_only`: None takes the demonstrator's. `fewer`: take what was kept, if it
    is any. `episode_length` cuts episodes that do not end by themselves. `provenance` is added to
    the demonstrator's. `progress(kept, tried, return)` is called after each. The same arguments
    give the same episodes. Of an `env` that is a `FrameRecorder` the frames are kept, in the place
    of what the policy observed.
    Raises DemonstrationError that counts what was reached when too few were kept, and where
    successes are asked for and the task tells none.
    """
    if not isinstance(demonstrator, Demonstrator):
        demonstrator = Demonstrator(demonstrator)
    if max_tries < episodes:
        raise DemonstrationError(f"{episodes} episodes cannot be kept from {max_tries} tries")
    noise = demonstrator.noise if noise is None else noise
    successes_only = demonstrator.successes_only if successes_only is None else successes_only
    kept: list[Episode] = []
    tried = succeeded = reached = 0
    while len(kept) < episodes and tried < max_tries:
        actor = Noisy(_Actor(demonstrator.policy, env), noise, stream_seed(seed, "noise", tried))
        with interface.at(f"{task}, recorded episode {tried}"):
            episode = rollout(
                actor, env, seed=stream_seed(seed, "record", tried), episode_length=episode_length
            )
        if isinstance(env, FrameRecorder):
            episode = replace(episode, observations=env.frames)
        if successes_only and episode.success is None:
            raise DemonstrationError(f"{task} tells no success, so none can be selected by it")
        total = episode.undiscounted_return
        far_enough = min_return is None or total >= min_return
        tried += 1
        reached += far_enough
        succeeded += bool(episode.success)
        if far_enough and (episode.success or not successes_only):
            kept.append(episode)
        if progress is not None:
            progress(len(kept), tried, total)
    conditions = ([f"return >= {min_return:g}"] if min_return is not None else []) + (
        ["success"] if successes_only else []
    )
    if not kept or (len(kept) < episodes and not fewer):
        counts = [f"{reached} reached a return of {min_return:g}"] if min_return is not None else []
        counts += [f"{succeeded} succeeded"] if successes_only else []
        raise DemonstrationError(
            f"{len(kept)} of {episodes} episodes were kept after {tried} tries: {', '.join(counts)}"
        )
    provenance = {
        **demonstrator.provenance,
        **(provenance or {}),
        "versions": ", ".join(f"{name} {number}" for name, number in _versions().items()),
        "seed": str(seed),
        "kept": f"{len(kept)} of {tried}"
        + (f" with {' and '.join(conditions)}" if conditions else ""),
    }
    if noise:
        provenance["action_noise"] = f"{noise:g}"
    return Demonstrations(task, tuple(kept), provenance)


class _Actor:
    """A policy as `rollout` takes it."""

    def __init__(self, policy: Policy | Function, env: gymnasium.Env) -> None:
        self._policy, self._env = policy, env
        self._begin: Callable[[gymnasium.Env], None] | None = getattr(policy, "reset", None)

    def reset(self) -> None:
        if self._begin is not None:
            self._begin(self._env)

    def act(self, obs: np.ndarray) -> np.ndarray:
        action = np.asarray(self._policy(obs.copy()), np.float32)  # it may change what it is given
        if not np.isfinite(action).all():
            index = int(np.argmin(np.isfinite(action).ravel()))
            raise DemonstrationError(
                f"the demonstrator's actions: found {action.ravel()[index]} "
                f"at index {index}, expected finite values"
            )
        return action


def _versions() -> dict[str, str]:
    """Of this package and of those that the episodes came from."""
    names = [name for module, name in _PACKAGES.items() if module in sys.modules]
    return {"iqmpc": iqmpc.__version__, **{name: version(name) for name in names}}
