"""Where a run's demonstrations come from, and what the learner draws of them."""

from __future__ import annotations

from dataclasses import replace

from iqmpc.config import Config, TaskConfig, names_task
from iqmpc.demos import Demonstrations, Facts
from iqmpc.errors import ConfigError
from iqmpc.observation import ObservationSpec
from iqmpc.replay import SliceReplay
from iqmpc.scaling import ObservationScaling


def demonstrations_for(
    config: Config, spec: ObservationSpec, action_dim: int
) -> Demonstrations | None:
    """The demonstrations that `config.demos` names, or those packaged with the task.

    None where nothing is named and the objective (`td`) needs none. `spec` is what the environment
    observes. Raises `DemonstrationError` for what cannot be read, and
    `ConfigError` for images that are drawn otherwise than the task draws them.
    """
    path, episodes = config.demos.path, config.demos.episodes
    if path is not None:
        found = _read(path, config.task, spec, action_dim, episodes)
    elif config.learner.objective == "td":
        return None
    elif spec.images:
        raise ConfigError(
            "no demonstrations of images ship: give some with demos.path=FILE (iqmpc demos "
            "record RUN FILE --obs pixels makes them from a run on the state)"
        )
    else:
        found = Demonstrations.packaged(config.task.name)
    return found if episodes is None else found.select(episodes)


def add_demonstrations(replay: SliceReplay, config: Config, action_dim: int) -> int:
    """Put the episodes of the files of `demos.add` into `replay`; returns how many.

    Raises as `demonstrations_for` and `expert_replay` do, and then has put none.
    """
    spec, files = replay.observation_spec, (config.demos.add or "").split(",")
    sets = [_read(path, config.task, spec, action_dim) for path in files if path]
    for demonstrations in sets:
        _check(demonstrations, config, spec, action_dim)
    for demonstrations in sets:
        _put(replay, demonstrations)
    return sum(map(len, sets))


def _read(
    path: str, task: TaskConfig, spec: ObservationSpec, action_dim: int, episodes: int | None = None
) -> Demonstrations:
    found = Demonstrations.load(
        path,
        task=task.name,
        obs_dim=None if spec.images else spec.shape[0],
        action_dim=action_dim,
        facts=Facts(
            episodes=episodes,
            task_obs_keys=None if task.obs_keys is None else tuple(task.obs_keys.split(",")),
        ),
    )
    # Images drawn otherwise could be told apart by that alone.
    drawn = found.provenance.get("render")
    if spec.images and drawn not in (None, rendering(task)):
        raise ConfigError(
            f"{path} holds {drawn} renderings, task.fast_render="
            f"{str(task.fast_render).lower()} asks for {rendering(task)} ones"
        )
    return found


def rendering(task: TaskConfig) -> str:
    """How the task draws its images, as demonstrations' provenance says it."""
    return "fast" if task.fast_render else "full"


def expert_replay(
    demonstrations: Demonstrations,
    config: Config,
    spec: ObservationSpec,
    action_dim: int,
    device: str,
) -> SliceReplay:
    """The demonstrations as the learner draws them, by their own scaling if it is asked for.

    Others may be added to them, which leave the scaling as it is. Raises `ConfigError` where they
    are of another task, of other shapes than the environment's, or all shorter than the horizon.
    """
    _check(demonstrations, config, spec, action_dim)
    scaling = None
    normalise = config.model.normalise_obs
    if normalise == "demos" and spec.images:
        raise ConfigError("model.normalise_obs=demos scales numbers, the task observes images")
    if normalise != "off" and not spec.images:
        scaling = ObservationScaling.of(e.observations for e in demonstrations.episodes)
    replay = SliceReplay(
        spec,
        action_dim,
        horizon=config.learner.horizon,
        capacity=sum(len(e.actions) + 1 for e in demonstrations.episodes),
        grows=True,
        device=device,
        scaling=scaling,
    )
    _put(replay, demonstrations)
    return replay


def _put(replay: SliceReplay, demonstrations: Demonstrations) -> None:
    for e in demonstrations.episodes:
        replay.add(replace(e, rewards=None))  # which the method never sees


def _check(
    demonstrations: Demonstrations, config: Config, spec: ObservationSpec, action_dim: int
) -> None:
    task, horizon = config.task.name, config.learner.horizon
    if not names_task(demonstrations.task, task):
        raise ConfigError(
            f"the demonstrations are of task {demonstrations.task!r}, the run's is {task!r}: give "
            "task.name, or rename them (iqmpc demos convert --task)"
        )
    given, given_dim = demonstrations.observation_spec, demonstrations.action_dim
    if (given, given_dim) != (spec, action_dim):
        raise ConfigError(
            f"the demonstrations of {demonstrations.task!r} have observations {list(given.shape)} "
            f"and {given_dim} actions, the environment has {list(spec.shape)} and {action_dim}"
        )
    if all(len(e.actions) < horizon for e in demonstrations.episodes):
        raise ConfigError(f"no demonstration is as long as learner.horizon={horizon}")
