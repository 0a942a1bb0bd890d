"""What of a run a checkpoint holds, and how a run goes on from one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from iqmpc import checkpoint
from iqmpc.config import Config, differences, may_change
from iqmpc.controller import Controller
from iqmpc.errors import CheckpointError, ConfigError
from iqmpc.methods import MethodLearner
from iqmpc.replay import SliceReplay
from iqmpc.run_folder import RunFolder, set_aside
from iqmpc.seeding import stream_seed


class Snapshot(NamedTuple):
    """What a checkpoint will hold, as it was after an episode."""

    step: int
    tensors: dict[str, torch.Tensor]
    meta: dict[str, Any]
    overwritten: int  # of the replay, whose tensors are not copied


class RunState:
    """The parts of a run that a continuation needs, to and from its folder's checkpoints.

    `generator` is the trainer's own. `experts` are compared with those of the checkpoint as they
    are here first; a checkpoint holds them where some have been added since.
    """

    def __init__(
        self,
        folder: RunFolder,
        config: Config,
        learner: MethodLearner,
        planner: Controller,
        behaviour: SliceReplay,
        experts: SliceReplay | None,
        generator: torch.Generator,
        *,
        on_message: Callable[[str], None],
    ):
        self.folder, self._config, self._message = folder, config, on_message
        self._learner, self._planner, self._behaviour = learner, planner, behaviour
        self._generator, self._device = generator, generator.device.type
        self._experts, self._given = experts, 0 if experts is None else len(experts)
        # What a continuation must be given again, to be one.
        self._digest = None if experts is None else checkpoint.digest(experts.state_dict())
        self._restored: Path | None = None
        self._unusable: list[Path] = []  # checkpoints newer than the one that is continued from

    def capture(self, step: int, meta: dict[str, Any]) -> Snapshot:
        """What a continuation needs, as it is now, after a tick at which an episode ended.

        Copied, but for the replay, to which nothing is added before the next such tick. `meta` is
        what the trainer wants back beside it.
        """
        tensors = {
            **{f"learner.{k}": v.clone() for k, v in self._learner.state_dict().items()},
            **{f"planner.{k}": v for k, v in self._planner.state_dict().items()},
            **{f"behaviour.{k}": v for k, v in self._behaviour.state_dict().items()},
            **self._added(),
            "trainer.generator": self._generator.get_state(),
        }
        return Snapshot(step, tensors, self._described(meta), self._behaviour.overwritten)

    def save(self, snapshot: Snapshot) -> Path:
        """Write the checkpoint and return its path."""
        keep = self._config.train.keep
        return self.folder.save(snapshot.step, snapshot.tensors, snapshot.meta, keep=keep)

    def weights(self) -> dict[str, torch.Tensor]:
        """A copy of the weights as they are now, live and average."""
        return {
            f"learner.{name}": tensor.clone()
            for name, tensor in self._learner.state_dict().items()
            if name.startswith(("model.", "average.", "scaling."))
        }

    def save_best(self, weights: dict[str, torch.Tensor], meta: dict[str, Any]) -> None:
        """Write `weights` as the best agent's, with what `meta` says of it."""
        self.folder.save_best(weights, self._described(meta))

    def restore(self) -> dict[str, Any] | None:
        """Take over the newest whole checkpoint; its meta, or None where the run has none yet.

        Raises `ConfigError` or `CheckpointError` for what is no continuation of the run.
        """
        found = self.folder.load_config()  # refuses what is no run folder
        made, now = found.train.num_envs, self._config.train.num_envs
        if made != now:
            raise ConfigError(
                f"train.num_envs cannot change when a run is resumed: it is {made}, got {now}"
            )
        if not self.folder.has_checkpoint:
            self._message("the run has no checkpoint yet: starting from its beginning")
            return None
        path, tensors, meta = self.folder.newest()
        self._unusable = self.folder.newer(path)
        self.folder.check_settings(found, path, meta)
        self._check_changes(found, meta)
        if meta["demonstrations"] != self._digest:
            raise CheckpointError(
                f"{self.folder} was trained on other demonstrations than those given now: give "
                "those that demos.* of its config.yaml names, as they were (demos.add=FILE adds "
                "some; a new run with init=RUN starts from its agent)"
            )
        if meta["env_steps"] > self._config.train.steps:
            raise ConfigError(
                f"train.steps must be at least the {meta['env_steps']} that {path.name} has "
                f"made, got {self._config.train.steps}"
            )
        try:
            self._load(tensors, meta)
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            raise CheckpointError(f"{path} does not fit this run's settings: {error}") from error
        self._restored = path
        self._message(f"continuing from {path.name}")
        return meta

    def take_over(self) -> None:
        """Make the locked folder ready to be continued in, as it was when it was restored.

        Raises `ConfigError` where another process has continued the run since.
        """
        if self._restored is not None:
            newer = self.folder.newer(self._restored)
            if set(newer) - set(self._unusable) or not self._restored.exists():
                raise ConfigError(
                    f"{self.folder} was continued by another process since {self._restored.name} "
                    "was read: resume it again"
                )
            set_aside(newer)
        elif self.folder.has_checkpoint:
            raise ConfigError(f"{self.folder} was continued by another process: resume it again")
        self.folder.tidy(keep=self._config.train.keep)

    def _added(self) -> dict[str, torch.Tensor]:
        """The demonstrations, where some have come to those that were given at first."""
        if self._experts is None or len(self._experts) == self._given:
            return {}
        return {f"experts.{k}": v for k, v in self._experts.state_dict().items()}

    def _described(self, meta: dict[str, Any]) -> dict[str, Any]:
        """`meta` with what every checkpoint says of what it holds and was made with."""
        return {
            "obs_shape": self._learner.model.observation_spec.shape,
            "action_dim": self._learner.model.action_dim,
            **meta,
            "demonstrations": self._digest,
            "device": self._device,
            "mode": self._learner.mode,
            "matmul": self._learner.matmul,
            "settings": self._config.to_dict(),
        }

    def _load(self, tensors: dict[str, torch.Tensor], meta: dict[str, Any]) -> None:
        def part(name: str) -> dict[str, torch.Tensor]:
            prefix = name + "."
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        learner = part("learner")
        learner["generator"] = self._random_state(
            learner["generator"], self._learner.generator, "learner", meta
        )
        self._learner.load_state_dict(learner)
        self._planner.load_state_dict(part("planner"))
        self._behaviour.load_state_dict(part("behaviour"))
        added = part("experts")
        if added and self._experts is not None:
            self._experts.load_state_dict(added)
        self._generator.set_state(
            self._random_state(tensors["trainer.generator"], self._generator, "trainer", meta)
        )

    def _check_changes(self, found: Config, meta: dict[str, Any]) -> None:
        """`ConfigError` for settings other than those of the checkpoint that may not change."""
        settings = meta.get("settings", {})
        changed = [
            text
            for key, text in differences(settings, self._config.to_dict())
            if not may_change(key)
        ]
        if changed:
            raise ConfigError(
                "what a run learns cannot change when it is resumed: " + "; ".join(changed)
            )
        made = {key: meta.get(key) for key in ("mode", "matmul")}
        made["precision"] = settings.get("learner", {}).get("precision")
        now = {"mode": self._learner.mode, "matmul": self._learner.matmul}
        now["precision"] = self._config.learner.precision
        for key, old in made.items():
            if old not in (None, now[key]):
                self._message(
                    f"the run was made with learner.{key}={old} and goes on with "
                    f"{now[key]}: not bit for bit"
                )
        for key, text in differences(settings, found.to_dict()):
            if key.startswith("train."):
                self._message(f"config.yaml differs from the checkpoint's settings: {text}")

    def _random_state(
        self, state: torch.Tensor, generator: torch.Generator, stream: str, meta: dict[str, Any]
    ) -> torch.Tensor:
        """The generator's saved state, or a new one where another kind of device has made it."""
        if meta.get("device", self._device) == self._device:
            return state
        if stream == "learner":
            self._message(
                f"the run was made on {meta['device']} and goes on on {self._device}: not "
                "bit for bit, and with other random draws"
            )
        generator.manual_seed(
            stream_seed(self._config.seed, f"resumed {stream}", meta["env_steps"])
        )
        return generator.get_state()
