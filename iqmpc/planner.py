"""MPPI over latents (IQ-MPC, Algorithm 1), warm-started from one control step to the next."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from iqmpc.config import PlannerConfig
from iqmpc.kernels import layers, mppi_refit, mppi_rollout
from iqmpc.kernels.backends import resolve_backend
from iqmpc.kernels.mppi_rollout import noise_steps
from iqmpc.kernels.weights import Weights, refresh, snapshot

_DTYPES = {"float32": torch.float32, "float64": torch.float64}


class PlanNoise(NamedTuple):
    """All draws of one plan; standard normal where not said otherwise.

    prior [E, H, P, A] for the policy trajectories; samples [I, E, H, S-P, A]; score
    [I, E, T, S, A] for the policy samples of the score; explore [E, A]; gumbel [E, elites] picks
    the elite; pair [2] int64 the critics.
    """

    prior: Tensor
    samples: Tensor
    score: Tensor
    explore: Tensor
    gumbel: Tensor
    pair: Tensor


class Planner:
    """Plans for `num_envs` independent problems at once, on its own snapshot of the weights.

    Call `reset` when an episode starts, `plan` at every control step and `publish` after the
    weights changed. Draws come from a generator of its own: the same seed gives the same plans.
    A plan is never non-finite or out of [-1, 1]; `nonfinite_plans` counts those for which no
    trajectory had a finite score (they fall back to the policy's mean action, or to zeros where
    that is not finite either).
    """

    def __init__(
        self,
        weights: Weights,
        config: PlannerConfig | None = None,
        *,
        discount: float,
        beta: float = 0.0,
        num_envs: int = 1,
        seed: int = 0,
    ):
        """`beta` is the entropy coefficient in force (the unrolled score's)."""
        self.config = config = config or PlannerConfig()
        self.backend = resolve_backend(config.backend, mppi_rollout.BACKENDS)
        # resolved once: the plan, which may be compiled, calls the kernels without further checks
        self._rollout = mppi_rollout.BACKENDS[self.backend]
        self._refit = mppi_refit.BACKENDS[self.backend]
        self.discount, self.beta, self.num_envs = discount, beta, num_envs
        self.iterations = config.iterations_for(weights.action_dim)
        self.dtype = _DTYPES[config.precision]
        self.weights = snapshot(weights, self.dtype)
        self.device = weights.encoder[0].weight.device
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.mean = torch.zeros(
            num_envs, config.horizon, weights.action_dim, dtype=self.dtype, device=self.device)
        self.nonfinite_plans = 0
        self._start, self._improve, self._choose = self._begin, self._iterate, self._end
        if config.mode == "compile":
            self._start, self._improve, self._choose = (
                torch.compile(f, dynamic=False) for f in (self._begin, self._iterate, self._end))

    def publish(self, weights: Weights) -> None:
        """Copy `weights` into the snapshot that plans are computed on."""
        refresh(self.weights, weights)

    def reset(self, env: int | None = None) -> None:
        """Forget the previous plan, of one problem or of all: an episode starts."""
        self.mean[slice(None) if env is None else env] = 0

    @torch.no_grad()
    def plan(self, obs: Tensor, *, explore: bool = False) -> Tensor:
        """obs [E, O] -> action [E, A] in [-1, 1]; `explore` adds std_0·ε to it.

        Raises `ValueError` for observations of another shape.
        """
        if list(obs.shape) != [self.num_envs, self.weights.obs_dim]:
            raise ValueError(
                f"obs must be [{self.num_envs}, {self.weights.obs_dim}], got {list(obs.shape)}")
        obs = obs.to(self.device, self.dtype)
        if self.config.enabled:
            noise = self._draw()
            if not explore:
                noise = noise._replace(explore=torch.zeros_like(noise.explore))
            action, mean = self._compute(self.weights, obs, self.mean, noise)
            self.mean.copy_(mean)
        else:
            noise = self._normal(len(obs), self.weights.action_dim)
            action = self._prior(self.weights, obs, noise if explore else torch.zeros_like(noise))
        return self._checked(action)

    def _checked(self, action: Tensor) -> Tensor:
        """Count and clean the plans that came back marked (their last column is 1)."""
        action, marked = action[:, :-1].float(), action[:, -1]
        bad = int(marked.sum())  # the action is on its way to the host anyway
        if bad:
            if not self.nonfinite_plans:
                warnings.warn(
                    "no trajectory of a plan has a finite score: acting with the policy's mean "
                    "action (counted as nonfinite_plans, said once)", RuntimeWarning, stacklevel=3)
            self.nonfinite_plans += bad
        return action

    def _prior(self, w: Weights, obs: Tensor, noise: Tensor) -> Tensor:
        action = layers.policy_action(w, layers.encode(w, obs), noise)
        finite = action.isfinite().all(1, keepdim=True)
        return torch.cat([action.nan_to_num(0).clamp(-1, 1), (~finite).to(action.dtype)], dim=1)

    def _compute(
        self, w: Weights, obs: Tensor, previous: Tensor, noise: PlanNoise
    ) -> tuple[Tensor, Tensor]:
        """One plan: (action with its mark [E, A+1], mean [E, H, A])."""
        z0, prior, mean, std = self._start(w, obs, previous, noise.prior)
        for samples, score in zip(noise.samples, noise.score, strict=True):
            actions, mean, std, index, weight = self._improve(
                w, z0, prior, mean, std, samples, score, noise.pair)
        action = self._choose(w, z0, actions, std, index, weight, noise.gumbel, noise.explore)
        return action, torch.where(action[:, -1:, None] > 0, 0.0, mean)

    # The three parts of a plan are pure functions. They are compiled one by one, because the
    # iterations are alike and compiling each of them again would take minutes.

    def _begin(
        self, w: Weights, obs: Tensor, previous: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """z_0 [E, Z], the policy's trajectories [E, H, P, A], shifted mean and std [E, H, A]."""
        z0 = layers.encode(w, obs)
        mean = torch.cat([previous[:, 1:], torch.zeros_like(previous[:, :1])], dim=1)
        std = torch.full_like(mean, self.config.std_max)
        return z0, self._policy_trajectories(w, z0, noise), mean, std

    def _iterate(
        self, w: Weights, z0: Tensor, prior: Tensor, mean: Tensor, std: Tensor, samples: Tensor,
        score: Tensor, pair: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Actions [E, H, S, A] of one iteration and the refit on their returns."""
        c = self.config
        drawn = (mean.unsqueeze(2) + std.unsqueeze(2) * samples).clamp(-1, 1)
        actions = torch.cat([prior, drawn], dim=2)
        returns = self._rollout(
            w, z0, actions, score, pair, self.discount, c.score, self.beta)
        return actions, *self._refit(
            actions, returns, c.elites, c.temperature, c.std_min, c.std_max)

    def _end(
        self, w: Weights, z0: Tensor, actions: Tensor, std: Tensor, index: Tensor, weight: Tensor,
        gumbel: Tensor, explore: Tensor,
    ) -> Tensor:
        """One elite's first action, in range, with the mark of a plan without a finite score."""
        # argmax of log-weight + Gumbel noise is one draw from the weights
        pick = (weight.log() + gumbel).argmax(1, keepdim=True)
        chosen = index.gather(1, pick)[:, None, :, None].expand(-1, 1, -1, actions.shape[3])
        action = actions.gather(2, chosen)[:, 0, 0] + std[:, 0] * explore
        finite = weight.sum(1, keepdim=True) > 0
        mode = torch.tanh(layers.policy(w, z0)[0])
        action = torch.where(finite, action, mode).nan_to_num(0).clamp(-1, 1)
        return torch.cat([action, (~finite).to(action.dtype)], dim=1)

    def _policy_trajectories(self, w: Weights, z0: Tensor, noise: Tensor) -> Tensor:
        """Actions of π rolled through d: noise [E, H, P, A] -> [E, H, P, A]."""
        z = z0.unsqueeze(1).expand(-1, noise.shape[2], -1)
        actions = []
        for t in range(noise.shape[1]):
            if t:
                z = layers.dynamics(w, z, actions[-1])
            actions.append(layers.policy_action(w, z, noise[:, t]))
        return torch.stack(actions, dim=1)

    def _draw(self) -> PlanNoise:
        c, envs, action_dim = self.config, self.num_envs, self.weights.action_dim
        uniform = torch.rand(envs, c.elites, device=self.device, generator=self.generator)
        return PlanNoise(
            prior=self._normal(envs, c.horizon, c.policy_trajectories, action_dim),
            samples=self._normal(self.iterations, envs, c.horizon,
                                 c.samples - c.policy_trajectories, action_dim),
            score=self._normal(self.iterations, envs, noise_steps(c.horizon, c.score), c.samples,
                               action_dim),
            explore=self._normal(envs, action_dim),
            gumbel=-torch.log(-torch.log(uniform.clamp(1e-10, 1 - 1e-7))).to(self.dtype),
            pair=layers.random_pair(self.weights.num_critics, self.generator),
        )

    def _normal(self, *shape: int) -> Tensor:
        draw = torch.randn(shape, device=self.device, generator=self.generator)
        return draw.to(self.dtype)

    def state_dict(self) -> dict[str, Tensor]:
        return {"mean": self.mean, "generator": self.generator.get_state(),
                "nonfinite_plans": torch.tensor(self.nonfinite_plans)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.mean.copy_(state["mean"])
        self.generator.set_state(state["generator"])
        self.nonfinite_plans = int(state["nonfinite_plans"])
