"""A trained agent: load it, act with it, decode its rewards."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iqmpc import stored_agent
from iqmpc.config import Config
from iqmpc.errors import BackendError, ConfigError
from iqmpc.kernels import layers
from iqmpc.kernels.weights import Weights
from iqmpc.model import WorldModel
from iqmpc.planner import Planner
from iqmpc.seeding import stream_seed

# Settings that mean something to one backend alone, as they are where they are not given.
_OF_A_BACKEND = {"planner.mode": "eager", "planner.capture": None, "planner.threads": None}


def resolve_device(name: str) -> str:
    """`auto` as cuda or cpu; `ConfigError` where cuda is asked for and absent."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "device=cuda was asked for, but torch sees no CUDA device: give device=cpu, or install "
            "torch's CUDA build (iqmpc doctor says what is there)"
        )
    return name


class Agent:
    """A world model and its planner, acting on `num_envs` environments at once (one by default).

    Call `reset` at the start of every episode: the planner is warm-started from step to step. Each
    thread needs an agent of its own, as calls from several would warm-start one another's plans.
    """

    def __init__(
        self,
        model: WorldModel,
        config: Config,
        *,
        seed: int = 0,
        num_envs: int = 1,
        weights: Weights | None = None,
    ):
        """`weights` is what acts in place of the model's own, until `publish` is called."""
        weights = model.weights() if weights is None else weights
        self.entropy_coef = config.entropy_coefficient(model.action_dim)
        planner = Planner(
            weights,
            config.planner,
            discount=config.discount,
            entropy_coef=self.entropy_coef,
            problems=num_envs,
            seed=stream_seed(seed, "planner"),
        )
        self._set_up(model, config, planner, weights)

    def _set_up(self, model: Any, config: Config, planner: Any, weights: Any) -> None:
        self.model, self.config, self.planner = model, config, planner
        self.weights = weights  # what decodes rewards; the planner has a snapshot of them
        self.device = next(model.parameters()).device
        # What training says of it: checkpoint, env_steps, updates, wall_s, demonstrator_return.
        self.facts: dict[str, Any] = {}

    def require_world_model(self, what: str) -> None:
        """`ConfigError` where a baseline acts, of which `what` can make nothing."""
        if self.config.is_baseline:
            raise ConfigError(
                f"{what} is for agents with a world model (agent.name=iq_mpc), got "
                f"agent.name={self.config.agent.name}"
            )

    @property
    def decodes_rewards(self) -> bool:
        """Whether there is a reward to decode: not where a baseline has none."""
        return True

    @classmethod
    def load(
        cls,
        run: str | Path,
        *,
        checkpoint: str = "newest",
        changes: Mapping[str, Any] | None = None,
        seed: int | None = None,
        num_envs: int = 1,
    ) -> Agent:
        """The agent of a run folder, acting as it was evaluated there: with the average of the
        weights, unless `agent.average` is off. Or that of a file which `iqmpc export` wrote, or of
        `packaged:TASK`, which ships (docs/agents.md).

        `checkpoint` is `newest` (the newest whole one), `best` (of the best evaluation on the way,
        by success, then return) or a number of steps whose checkpoint is there.
        `changes` replaces settings, such as {"planner.enabled": False} to act with the policy
        prior or {"device": "cpu"}; another backend leaves behind the run's `planner.mode`,
        `capture` and `threads`, which were for its own. `seed` is the run's own by default. It acts
        on `num_envs` environments at once, whatever it was trained on. A run that was made on a
        device or with a backend that is not here acts on the CPU, in float32, with a warning.
        Raises `CheckpointError` where there is no checkpoint, `ConfigError` for wrong changes.
        """
        from iqmpc.methods import agent_class  # which knows this module

        found = stored_agent.find(run, checkpoint)
        changes = dict(changes or {})
        if "planner.backend" in changes:
            changes = _OF_A_BACKEND | changes
        made_on = found.config.device
        if made_on == "cuda" and "device" not in changes and not torch.cuda.is_available():
            warnings.warn(
                f"{run} was made with device=cuda, which is not here: acting on the CPU",
                RuntimeWarning,
                stacklevel=2,
            )
            changes["device"] = "cpu"
        config = found.config.replace(changes)
        device = resolve_device(config.device)
        model = found.model(config)
        seed = config.seed if seed is None else seed
        cls = agent_class(config)
        try:
            agent = cls(model.to(device), config, seed=seed, num_envs=num_envs)
        except BackendError as error:
            if any(key.startswith("planner.") and key != "planner.enabled" for key in changes):
                raise
            warnings.warn(
                f"{error}: acting with planner.backend=auto in float32",
                RuntimeWarning,
                stacklevel=2,
            )
            agent = cls(
                model,
                config.replace(
                    {
                        "planner.backend": "auto",
                        "planner.precision": "float32",
                        **_OF_A_BACKEND,
                    }
                ),
                seed=seed,
                num_envs=num_envs,
            )
        agent.facts = {"checkpoint": found.path.name, **found.facts}
        return agent

    def publish(self, weights: Weights) -> None:
        """Plan on a copy of `weights` from now on, and decode rewards with `weights` themselves."""
        self.weights = weights
        self.planner.publish(weights)

    def reset(self, env: int | None = None) -> None:
        """An episode starts, in one environment or in all."""
        self.planner.reset(env)

    def act(self, obs: np.ndarray, *, explore: bool = False) -> np.ndarray:
        """obs [N, O], N = `num_envs` (or [O] for one) -> action float32 [N, A] (or [A]) in [-1, 1].

        In place of O numbers, images are uint8 [3C, 64, 64]. The N actions are planned in one call.
        Raises `ValueError` for another shape, and for images of another type.
        """
        seen = self._tensor(obs, device="cpu")  # the planner moves it
        single = seen.ndim == len(self.model.observation_spec.shape)
        action = self.planner.plan(seen.unsqueeze(0) if single else seen, explore=explore)
        return (action[0] if single else action).numpy()

    @torch.no_grad()
    def decode_reward(
        self,
        obs: np.ndarray,
        action: np.ndarray,
        next_obs: np.ndarray,
        *,
        terminated: np.ndarray | bool = False,
        samples: int = 16,
    ) -> np.ndarray:
        """r(s, a) = Q(h(s), a) - γ (1 - d) V(h(s')), the reward that the critics imply.

        obs [N, O], action [N, A], next_obs [N, O] (or without N) -> float32 [N] (or a scalar), with
        uint8 images [3C, 64, 64] in place of O numbers where the agent was trained on them;
        `terminated` [N] marks steps that ended the task.
        Q is the mean over the ensemble; V averages `samples` draws of the prior, the same for every
        row and call. Raises `ValueError` for shapes that do not fit.
        """
        spec, action_dim = self.model.observation_spec, self.model.action_dim
        given = [
            self._tensor(obs),
            torch.as_tensor(np.asarray(action, np.float32), device=self.device),
            self._tensor(next_obs),
        ]
        single = given[0].ndim == len(spec.shape)
        obs_, action_, next_ = (x[None] if single else x for x in given)
        n = len(obs_)
        for name, tensor in (("obs", obs_), ("next_obs", next_)):
            spec.check(tensor, n, name=name, images=name)
        if list(action_.shape) != [n, action_dim]:
            raise ValueError(f"action must be {[n, action_dim]}, got {list(action_.shape)}")
        generator = torch.Generator(self.device).manual_seed(0)
        noise = torch.randn(samples, 1, action_dim, generator=generator, device=self.device)
        ended = torch.as_tensor(terminated, dtype=torch.float32, device=self.device)
        reward = self._decoded(obs_, action_, next_, ended, noise.expand(-1, n, -1)).cpu().numpy()
        return reward[0] if single else reward

    def _decoded(
        self, obs: Tensor, action: Tensor, next_obs: Tensor, terminated: Tensor, noise: Tensor
    ) -> Tensor:
        """`decode_reward` of tensors, its value averaged over standard normal noise [S, N, A]."""
        w = self.weights
        z = layers.encode(w, next_obs).expand(len(noise), -1, -1)
        next_action, log_prob = layers.policy_sample(w, z, noise, self.config.learner.entropy)
        value = (
            layers.critics(w.critics, z, next_action).mean(0) - self.entropy_coef * log_prob
        ).mean(0)
        q = layers.critics(w.critics, layers.encode(w, obs), action).mean(0)
        return q - self.config.discount * (1 - terminated) * value

    def _tensor(self, obs: np.ndarray, *, device: str | None = None) -> torch.Tensor:
        """Observations on `device` or the agent's."""
        return torch.as_tensor(self.model.observation_spec.cast(obs), device=device or self.device)
