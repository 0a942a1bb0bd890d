"""The environments of a run: those to train in and the one to evaluate in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import gymnasium

from iqmpc.config import Config
from iqmpc.envs import make_env
from iqmpc.envs.batched import BatchedVectorEnv, Worlds, are_worlds
from iqmpc.envs.vector import VectorEnv, check_alike
from iqmpc.envs.workers import WorkerVectorEnv
from iqmpc.errors import ConfigError

Environment = gymnasium.Env | Callable[[], gymnasium.Env]


def training_envs(
    config: Config,
    env: Environment | Sequence[Environment] | Worlds | None,
    eval_env: gymnasium.Env | None,
    on_message: Callable[[str], None],
) -> tuple[VectorEnv, gymnasium.Env]:
    """Those to train in and the one to evaluate in, of `config.task` where none are given.

    Raises `ConfigError` for a number or kind of environments that the settings do not fit, and
    `TaskError` for spaces that do not fit the method or one another.
    """
    count = config.train.num_envs
    if are_worlds(env):
        return _batched(config, cast(Worlds, env), eval_env, on_message)
    env = cast("Environment | Sequence[Environment] | None", env)
    if env is None:
        env = [partial(make_env, config.task, seed=config.seed)] * count
        if eval_env is None and config.train.video_every is not None:
            eval_env = make_env(config.task, seed=config.seed, render_mode="rgb_array")
    given = list(env) if isinstance(env, Sequence) else [env]
    if len(given) != count:
        raise ConfigError(f"train.num_envs={count} needs {count} environments, got {len(given)}")
    makers = [e for e in given if callable(e)]
    made = [e for e in given if not callable(e)]
    if made:
        if makers or config.train.env_workers:
            raise ConfigError(
                "train.env_workers=true needs functions that make the environments, got "
                f"{len(made)} environments among {count}"
                if config.train.env_workers
                else f"{len(made)} of {count} environments are made already: give environments or "
                "functions that make them, not both"
            )
        if count > 1 and (eval_env is None or any(eval_env is e for e in made)):
            raise ConfigError(
                f"train.num_envs={count} needs an eval_env of its own: an evaluation would cut the "
                "episodes that are being recorded"
            )
    elif config.train.workers:
        eval_env = eval_env or makers[0]()
        t = config.train
        return WorkerVectorEnv(
            makers,
            config.task.name,
            like=eval_env,
            seed=config.seed,
            max_restarts=t.env_restarts,
            timeout_s=t.env_timeout_s,
            episode_length=config.task.episode_length,
            on_message=on_message,
        ), eval_env
    else:
        eval_env = eval_env or (makers[0]() if count > 1 else None)
        made = [make() for make in makers]
    envs = VectorEnv(
        made,
        config.task.name,
        seed=config.seed,
        episode_length=config.task.episode_length,
        on_message=on_message,
    )
    if eval_env is None:
        return envs, made[0]
    check_alike(eval_env, made[0], f"{config.task.name}: eval_env", "environment 0")
    return envs, eval_env


def _batched(
    config: Config,
    worlds: Worlds,
    eval_env: gymnasium.Env | None,
    on_message: Callable[[str], None],
) -> tuple[VectorEnv, gymnasium.Env]:
    """Worlds that are stepped together, and the environment of its own that evaluation needs."""
    name, count = config.task.name, config.train.num_envs
    if worlds.num_envs != count:
        raise ConfigError(f"train.num_envs={count} needs {count} worlds, got {worlds.num_envs}")
    if config.train.env_workers or config.train.control_hz is not None:
        key = "env_workers" if config.train.env_workers else "control_hz"
        raise ConfigError(f"train.{key} must be left alone with worlds that are stepped together")
    if eval_env is None:
        raise ConfigError("worlds that are stepped together need an eval_env, a gymnasium.Env")
    envs = BatchedVectorEnv(
        worlds,
        name,
        seed=config.seed,
        episode_length=config.task.episode_length,
        on_message=on_message,
    )
    check_alike(eval_env, envs.envs[0], f"{name}: eval_env", "a world")
    return envs, eval_env
