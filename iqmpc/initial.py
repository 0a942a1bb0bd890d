"""What a new run starts from: `init`."""

from __future__ import annotations

import dataclasses

from iqmpc import stored_agent
from iqmpc.config import Config, differences
from iqmpc.errors import CheckpointError, ConfigError
from iqmpc.learner import Learner
from iqmpc.methods import MethodLearner
from iqmpc.replay import SliceReplay
from iqmpc.stored_agent import StoredAgent

# Of the model; the others may differ from those it was trained with.
_SIZES = ("encoder_dim", "hidden_dim", "latent_dim", "simnorm_dim", "critics")


def start_from(config: Config, learner: MethodLearner, behaviour: SliceReplay) -> str:
    """Begin at the agent that `config.init` names, as it acts where it is evaluated.

    Its weights (the average where it acts with that) become the live ones, the targets and the
    average; no moment of an optimiser is taken over. With `init.replay` its run's episodes come
    into `behaviour`. Returns what was done, in words.

    Raises `CheckpointError` where there is no such agent or replay, `ConfigError` where it does not
    fit the run's environment or settings.
    """
    init = config.init
    assert init.path is not None  # asked for where there is one
    assert isinstance(learner, Learner)  # the schema refuses it for baselines
    found = stored_agent.find(init.path, init.checkpoint)
    _check(found, config, learner)
    learner.start_from(found.weights(found.config.agent.average))
    said = (
        f"starting from {init.path} ({found.path.name}: {found.config.task.name}, "
        f"{found.facts['env_steps']} steps)"
    )
    if not init.replay:
        return said
    rows = found.behaviour()
    if not rows:
        raise CheckpointError(f"init.replay=true: {found.path} holds weights alone, and no replay")
    if learner.scaling is not None:
        rows["obs"] = learner.scaling.to("cpu")(rows["obs"])
    try:
        behaviour.load_state_dict(rows)
    except ValueError as error:
        raise ConfigError(
            f"init.replay=true: the replay of {found.path} does not fit train.capacity="
            f"{config.train.capacity} and learner.horizon={config.learner.horizon}: {error}"
        ) from error
    return f"{said} with {len(behaviour)} steps of behaviour"


def _check(found: StoredAgent, config: Config, learner: Learner) -> None:
    """`ConfigError` where the agent is not one of the run's."""
    path, model = config.init.path, learner.model
    if found.config.is_baseline:
        raise ConfigError(
            f"init={path} is of agent.name={found.config.agent.name}, this run of iq_mpc"
        )
    theirs = found.observation.shape, found.action_dim
    ours = model.observation_spec.shape, model.action_dim
    if theirs != ours:
        raise ConfigError(
            f"init={path} has observations {list(theirs[0])} and {theirs[1]} actions, the "
            f"environment has {list(ours[0])} and {ours[1]}"
        )
    sizes = [
        {key: dataclasses.asdict(c.model)[key] for key in _SIZES} | {"termination": head}
        for c, head in ((found.config, found.termination), (config, config.termination))
    ]
    other = [text for _, text in differences(sizes[0], sizes[1])]
    if other:
        raise ConfigError(
            f"init={path} does not fit this run's model, which must have its sizes: "
            + "; ".join(f"model.{text} there" for text in other)
        )
