"""Roll out an agent and report what it reached."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import gymnasium
import numpy as np

from iqmpc import stored_agent
from iqmpc.agent import Agent
from iqmpc.envs import check_spaces, interface, make_env
from iqmpc.episode import Episode, EpisodeBuffer
from iqmpc.seeding import stream_seed
from iqmpc.threads import leave_torch_idle, prepare_torch

# Standard deviations of the noise in `mixed_episodes`: little, much, and hardly the agent any more.
NOISES = (0.25, 0.5, 1.0)


class Actor(Protocol):
    """Who acts in a rollout: an `Agent`, or what else has these two."""

    def reset(self) -> None:
        """An episode starts."""

    def act(self, obs: np.ndarray) -> np.ndarray:
        """obs [O] -> action [A] in [-1, 1]."""
        ...


class Noisy:
    """An actor with Gaussian noise of standard deviation `noise` on its actions, then clipped."""

    def __init__(self, actor: Actor, noise: float, seed: int):
        self._actor, self._noise = actor, noise
        self._random = np.random.default_rng(seed)

    def reset(self) -> None:
        self._actor.reset()

    def act(self, obs: np.ndarray) -> np.ndarray:
        action = np.asarray(self._actor.act(obs), np.float32)
        if self._noise:
            action = action + self._noise * self._random.standard_normal(action.shape)
        return np.clip(action, -1, 1).astype(np.float32)


class Random:
    """Acts uniformly at random, with `action_dim` actions."""

    def __init__(self, action_dim: int, seed: int):
        self._action_dim, self._random = action_dim, np.random.default_rng(seed)

    def reset(self) -> None:
        pass

    def act(self, obs: np.ndarray) -> np.ndarray:
        return self._random.uniform(-1, 1, self._action_dim).astype(np.float32)


def open_run(
    run: str | Path,
    changes: Mapping[str, Any],
    *,
    checkpoint: str = "newest",
    seed: int | None = None,
    render: bool = False,
) -> tuple[Agent, gymnasium.Env]:
    """The agent of a run folder or file, as `Agent.load` gives it, and its task's environment.

    Sets torch's threads as the run asks for. `render` makes an environment that draws frames.
    Raises `CheckpointError` for what is no run or has no checkpoint, `TaskError` where the
    environment cannot be made here.
    """
    config = stored_agent.settings(run).replace(changes)
    prepare_torch(config)
    env = make_env(config.task, render_mode="rgb_array" if render else None)
    agent = Agent.load(run, checkpoint=checkpoint, changes=changes, seed=seed)
    if agent.planner.leaves_torch_idle:
        leave_torch_idle()
    return agent, env


@dataclass(frozen=True)
class Evaluation:
    """Episodes of an agent, as recorded.

    `solved` says of each whether the task was solved at any of its steps; an `Episode`'s own
    `success` is that of its last step. None where the task defines none.
    """

    episodes: tuple[Episode, ...]
    solved: tuple[bool | None, ...]

    @property
    def returns(self) -> np.ndarray:
        return np.array([e.undiscounted_return for e in self.episodes])

    @property
    def return_mean(self) -> float:
        return float(self.returns.mean())

    @property
    def return_std(self) -> float:
        return float(self.returns.std())

    @property
    def success_rate(self) -> float | None:
        """Share of episodes solved at their last step; None where the task defines none."""
        return _share([e.success for e in self.episodes])

    @property
    def success_any_rate(self) -> float | None:
        """Share of episodes solved at any step; None where the task defines none."""
        return _share(self.solved)

    @property
    def score(self) -> tuple[float, float]:
        """What agents are compared by: success where the task has it, then return."""
        mean = self.return_mean
        return self.success_rate or 0.0, mean if math.isfinite(mean) else -math.inf

    def summary(self, demonstrator_return: float | None) -> dict[str, Any]:
        """The figures as summary.json and `iqmpc eval` name them."""
        return {
            "episodes": len(self.episodes),
            "return_mean": self.return_mean,
            "return_std": self.return_std,
            "success_rate": self.success_rate,
            "success_any_rate": self.success_any_rate,
            "demonstrator_return": demonstrator_return,
            "ratio": ratio(self.return_mean, demonstrator_return),
        }


def no_evaluation(demonstrator_return: float | None) -> dict[str, Any]:
    """What `Evaluation.summary` gives, where nothing was evaluated."""
    names = ("return_mean", "return_std", "success_rate", "success_any_rate", "ratio")
    return {"episodes": 0, "demonstrator_return": demonstrator_return, **dict.fromkeys(names)}


def _share(outcomes: Sequence[bool | None]) -> float | None:
    known = [outcome for outcome in outcomes if outcome is not None]
    return float(np.mean(known)) if known else None


class _Watched(gymnasium.Wrapper):
    """Remembers whether any step of the episode was a success."""

    solved: bool | None = None

    def reset(self, **how: Any) -> tuple[np.ndarray, dict[str, Any]]:
        self.solved = None
        return self.env.reset(**how)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        obs, reward, terminated, truncated, info = interface.step(self.env, action)
        success = interface.success(info)
        if success is not None:
            self.solved = bool(self.solved) or success
        return obs, reward, terminated, truncated, info


def rollout(
    actor: Actor,
    env: gymnasium.Env,
    *,
    seed: int,
    episode_length: int | None = None,
    on_step: Callable[[gymnasium.Env], None] | None = None,
) -> Episode:
    """One episode from `env.reset(seed=seed)`, without exploration noise; of images, the frames.

    It is cut after `episode_length` steps where it has not ended (None: never). `on_step(env)` is
    called before each step. Raises `TaskError`, by step, for what an environment gives and must not
    (`iqmpc.envs.interface`).
    """
    space = env.observation_space
    with interface.at("its reset"):
        obs, info = interface.reset(env, seed=seed)
        episode = EpisodeBuffer([interface.observation(obs, space)])
    actor.reset()
    terminated = truncated = False
    while not (terminated or truncated or len(episode.actions) == episode_length):
        if on_step is not None:
            on_step(env)
        action = actor.act(episode.observations[-1])
        with interface.at(f"step {len(episode.actions) + 1}"):
            obs, reward, terminated, truncated, info = interface.step(env, action)
            obs = interface.observation(obs, space)
            episode.add(action, reward, obs, interface.taken_over(info, env.action_space))
    return episode.finish(terminated=terminated, success=interface.success(info))


def evaluate(
    agent: Agent,
    env: gymnasium.Env,
    *,
    episodes: int,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
    on_step: Callable[[gymnasium.Env], None] | None = None,
) -> Evaluation:
    """`episodes` episodes without exploration noise, of `task.episode_length` steps at most.

    Raises `TaskError`, by task, episode and step, for what an environment gives and must not.
    `progress(done, return)` is called after each; `on_step(env)` before each step of the first.
    """
    done, solved, watched = [], [], _Watched(env)
    task = agent.config.task
    for index in range(episodes):
        with interface.at(f"{task.name}, evaluation episode {index}"):
            done.append(
                rollout(
                    agent,
                    watched,
                    seed=stream_seed(seed, "eval", index),
                    episode_length=task.episode_length,
                    on_step=on_step if index == 0 else None,
                )
            )
        solved.append(watched.solved)
        if progress is not None:
            progress(index + 1, done[-1].undiscounted_return)
    return Evaluation(tuple(done), tuple(solved))


def mixed_episodes(
    agent: Agent,
    env: gymnasium.Env,
    *,
    each: int = 6,
    noises: Sequence[float] = NOISES,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> list[Episode]:
    """Episodes from poor to good, in three equal parts of `each` episodes.

    The agent as it is evaluated; the agent with Gaussian noise on its actions, its standard
    deviation one of `noises` after the other; uniform random actions. Episodes are reset from seeds
    of a stream of their own under `seed`, and noise follows from it too.
    `progress(done, return)` is called after each.
    """
    task = agent.config.task
    _, action_dim = check_spaces(env, task.name)
    episodes = []
    for index in range(3 * each):
        draws = stream_seed(seed, "correlation-actions", index)
        actor: Actor = agent
        if index >= 2 * each:
            actor = Random(action_dim, draws)
        elif index >= each:
            actor = Noisy(agent, noises[index % len(noises)], draws)
        with interface.at(f"{task.name}, correlation episode {index}"):
            episodes.append(
                rollout(
                    actor,
                    env,
                    seed=stream_seed(seed, "correlation", index),
                    episode_length=task.episode_length,
                )
            )
        if progress is not None:
            progress(index + 1, episodes[-1].undiscounted_return)
    return episodes


class RewardPairs(NamedTuple):
    """Of every step the true and the decoded reward, float64 [N] each."""

    true: np.ndarray
    decoded: np.ndarray

    @property
    def correlation(self) -> float | None:
        """Pearson's; None where either does not vary or is not finite."""
        if not (np.isfinite(self.decoded).all() and np.isfinite(self.true).all()):
            return None
        if not self.decoded.std() or not self.true.std():
            return None
        return float(np.corrcoef(self.decoded, self.true)[0, 1])


def mixed_rewards(
    agent: Agent,
    env: gymnasium.Env,
    *,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> RewardPairs | None:
    """The rewards of `mixed_episodes`, the same whatever was planned before.

    None for an agent that decodes no reward.
    """
    if not agent.decodes_rewards:
        return None
    agent.planner.step = 0
    return reward_pairs(agent, mixed_episodes(agent, env, seed=seed, progress=progress))


def mixed_correlation(
    agent: Agent,
    env: gymnasium.Env,
    *,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> float | None:
    """The correlation of `mixed_rewards`."""
    pairs = mixed_rewards(agent, env, seed=seed, progress=progress)
    return None if pairs is None else pairs.correlation


def reward_correlation(agent: Agent, episodes: Sequence[Episode]) -> float | None:
    """Pearson correlation of the decoded reward with the true one, over all steps (paper, Table 7).

    Good episodes alone say little, since the true reward hardly varies in them: take those of
    `mixed_episodes`. None where either does not vary or is not finite. Raises as `reward_pairs`.
    """
    return reward_pairs(agent, episodes).correlation


def reward_pairs(agent: Agent, episodes: Sequence[Episode]) -> RewardPairs:
    """The rewards of all steps of episodes; `ValueError` for an episode without rewards."""

    def decoded_rewards(e: Episode) -> np.ndarray:
        obs = e.observed()
        return agent.decode_reward(
            obs[:-1],
            e.actions,
            obs[1:],
            terminated=e.terminated & (np.arange(len(e.actions)) == len(e.actions) - 1),
        )

    def true_rewards(e: Episode) -> np.ndarray:
        if e.rewards is None:
            raise ValueError("the correlation is of episodes with rewards")
        return e.rewards

    true, decoded = (
        np.concatenate([of(e) for e in episodes]).astype(np.float64)
        for of in (true_rewards, decoded_rewards)
    )
    return RewardPairs(true, decoded)


def ratio(return_mean: float | None, demonstrator: float | None) -> float | None:
    """Return over the demonstrator's; None where either is unknown or the latter not positive."""
    if (
        return_mean is None
        or demonstrator is None
        or not math.isfinite(demonstrator)
        or demonstrator <= 0
    ):
        return None
    return return_mean / demonstrator
