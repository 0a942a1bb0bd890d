"""A trained agent where it lies: in a run folder, or in a file that `iqmpc export` wrote."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from iqmpc import agent_file
from iqmpc.checkpoint import shapes
from iqmpc.config import Config
from iqmpc.errors import CheckpointError, one_line
from iqmpc.observation import ObservationSpec
from iqmpc.run_folder import RunFolder
from iqmpc.scaling import ObservationScaling


class StoredAgent(NamedTuple):
    """What is known of it before a model is made.

    `tensors` are as the file has them, of a run that scales its observations by `scaling`. An agent
    takes them as they are: `weights` has the scaling in them, and `config` none.
    """

    path: Path  # of the file that holds the tensors
    config: Config
    observation: ObservationSpec
    action_dim: int
    termination: bool
    facts: dict[str, Any]  # by `agent_file.FACTS`
    tensors: Mapping[str, Tensor]
    scaling: ObservationScaling | None = None

    def weights(self, average: str) -> dict[str, Tensor]:
        """The model's tensors, those that act with `agent.average` being `average`.

        Raises `CheckpointError` where there is no average.
        """
        if not any(name.startswith("learner.") for name in self.tensors):  # exported
            return dict(self.tensors)
        prefix = "learner.model." if average == "off" else "learner.average."
        found = self._part(prefix)
        if not found:
            raise CheckpointError(
                f"{self.path} holds no average of the weights, agent.average={average}: "
                "give agent.average=off"
            )
        if self.scaling is None:
            return found
        try:
            return self.scaling.folded_state(found)
        except RuntimeError as error:  # of another size
            raise CheckpointError(f"{self.path} holds no scaling of its observations") from error

    def behaviour(self) -> dict[str, Tensor]:
        """The run's replay, as `SliceReplay.state_dict` gives it without any scaling.

        {} where weights lie alone.
        """
        found = self._part("behaviour.")
        if found and self.scaling is not None:
            found["obs"] = self.scaling.inverse()(found["obs"]).float()
        return found

    def model(self, config: Config) -> Any:
        """The model of these settings with its weights.

        None is made of sizes that its weights do not have: `CheckpointError`.
        """

        from iqmpc.methods import learner_class  # which knows this module

        def made() -> Any:
            return learner_class(config).make_model(
                self.observation, self.action_dim, config, termination=self.termination
            )

        weights = self.weights(config.agent.average)
        unfit = f"{self.path} does not fit its settings (config.yaml)"
        try:
            with torch.device("meta"):  # takes no memory
                expected = {name: tuple(t.shape) for name, t in made().state_dict().items()}
        except (RuntimeError, TypeError, OverflowError) as error:
            raise CheckpointError(f"{unfit}: they describe no model ({one_line(error)})") from error
        held = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        for name in sorted(expected.keys() | held.keys()):
            if expected.get(name) != held.get(name):
                raise CheckpointError(
                    f"{unfit}: {name} has the shape {held.get(name)}, expected {expected.get(name)}"
                )
        model = made()
        model.load_state_dict(weights)
        return model

    def _part(self, prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}


def settings(run: str | Path) -> Config:
    """The settings of a run folder, file or `packaged:TASK`; `CheckpointError` where there are
    none."""
    file = agent_file.located(run)
    return RunFolder(run).load_config() if file is None else agent_file.load(file).config


def find(run: str | Path, checkpoint: str = "newest") -> StoredAgent:
    """The agent of a run folder, at the checkpoint that `RunFolder.checkpoint` names, or that of a
    file or `packaged:TASK`.

    Raises `CheckpointError` where there is none.
    """
    file = agent_file.located(run)
    if file is not None:
        return _of_file(file, checkpoint)
    folder = RunFolder(run)
    config = folder.load_config()
    path, tensors, meta = folder.checkpoint(checkpoint)
    folder.check_settings(config, path, meta)
    normalise, scaling = config.model.normalise_obs, None
    names = [f"learner.scaling.{key}" for key in ObservationScaling._fields]
    absent = normalise == "auto" and not tensors.keys() & set(names)
    if not (normalise == "off" or absent or config.is_baseline):  # whose model has it itself
        try:
            scaling = ObservationScaling(*(tensors[name] for name in names))
        except KeyError as error:
            raise CheckpointError(
                f"{path} holds no scaling of its observations, model.normalise_obs={normalise}"
            ) from error
    facts = {key: meta[key] for key in agent_file.FACTS}
    return StoredAgent(
        path,
        config.replace({"model.normalise_obs": "off"}),
        *shapes(meta),
        config.termination,
        facts,
        tensors,
        scaling,
    )


def _of_file(path: Path, checkpoint: str) -> StoredAgent:
    if checkpoint != "newest":
        raise CheckpointError(
            f"{path} is one agent and has no checkpoint {checkpoint!r}: give the run folder"
        )
    found = agent_file.load(path)
    return StoredAgent(
        path,
        found.config,
        found.observation,
        found.action_dim,
        found.termination,
        found.facts,
        found.tensors,
    )
