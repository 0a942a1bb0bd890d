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
    task, path = config.task, config.demos.path
    if path is None:
        if config.learner.objective == "td":
            return None
        if spec.images:
            raise ConfigError(
                "no demonstrations of images ship: give some with demos.path=FILE (iqmpc demos "
                "record RUN FILE --obs pixels makes them from a run on the state)"
            )
        found = Demonstrations.packaged(task.name)
    else:
        found = Demonstrations.load(
            path,
            task=task.name,
            obs_dim=None if spec.images else spec.shape[0],
            action_dim=action_dim,
            facts=Facts(
                episodes=config.demos.episodes,
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
    return found if config.demos.episodes is None else found.select(config.demos.episodes)


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

    Raises `ConfigError` where they are of another task, of other shapes than the
    environment's, or all shorter than the horizon.
    """
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
    rows = sum(len(e.actions) + 1 for e in demonstrations.episodes)
    scaling = None
    normalise = config.model.normalise_obs
    if normalise == "demos" and spec.images:
        raise ConfigError("model.normalise_obs=demos scales numbers, the task observes images")
    if normalise != "off" and not spec.images:
        scaling = ObservationScaling.of(e.observations for e in demonstrations.episodes)
    replay = SliceReplay(
        spec, action_dim, horizon=horizon, capacity=rows, device=device, scaling=scaling
    )
    for e in demonstrations.episodes:
        replay.add(replace(e, rewards=None))  # which the method never sees
    if not replay.slices:
        raise ConfigError(f"no demonstration is as long as learner.horizon={horizon}")
    return replay
