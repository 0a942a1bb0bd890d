"""The meaning of `mppi_plan`, in plain torch, on any device."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from iqmpc.compiler import compiled
from iqmpc.config import PlannerConfig
from iqmpc.kernels import layers
from iqmpc.kernels.mppi_plan.types import Plan, unserved_precision, unused
from iqmpc.kernels.mppi_refit.reference import mppi_refit_reference
from iqmpc.kernels.mppi_rollout.reference import mppi_rollout_reference
from iqmpc.kernels.weights import Weights, refresh, snapshot

_DTYPES = {"float32": torch.float32, "float64": torch.float64}


class PlanNoise(NamedTuple):
    """All draws of one plan; standard normal where not said otherwise.

    policy_noise [E, H, P, A] for the policy's trajectories and policy_score_noise [E, T, P, A] for
    the policy samples of their score; sample_noise [I, E, H, S-P, A] and score_noise
    [I, E, T, S-P, A] for the other samples and their score; root [E, A] for the policy sample at
    z_0 (the unrolled score's); explore [E, A]; gumbel [E, elites], standard Gumbel, picks the
    elite; pair [2] int64 the critics. T counts the latents after z_0 that are scored: H-1 in the
    advantage form, H unrolled.
    """

    policy_noise: Tensor
    policy_score_noise: Tensor
    sample_noise: Tensor
    score_noise: Tensor
    root: Tensor
    explore: Tensor
    gumbel: Tensor
    pair: Tensor


class ReferencePlan:
    """See `iqmpc.kernels.mppi_plan`. Computes where the weights are, in `config.precision`."""

    @staticmethod
    def unfit(weights: Weights, config: PlannerConfig) -> str | None:
        return unserved_precision(config, *_DTYPES) or unused(config, "mode")

    def __init__(
        self,
        weights: Weights,
        config: PlannerConfig,
        *,
        discount: float,
        entropy_coef: float = 0.0,
        problems: int = 1,
        seed: int = 0,
    ):
        self.config, self.discount, self.entropy_coef = config, discount, entropy_coef
        self.problems, self.seed, self.step = problems, seed, 0
        self.iterations = config.iterations_for(weights.action_dim)
        self.dtype = _DTYPES[config.precision or "float32"]
        self.weights = snapshot(weights, self.dtype)
        self.device = weights.encoder[0].weight.device
        self.generator = torch.Generator(self.device)
        self.mean = torch.zeros(
            problems, config.horizon, weights.action_dim, dtype=self.dtype, device=self.device
        )
        if config.mode == "compile":
            # One by one: iterations are alike, and compiling each of them again takes minutes.
            for phase in ("begin", "improve", "choose"):
                setattr(self, phase, compiled(getattr(self, phase), "planner.mode"))

    def publish(self, weights: Weights) -> None:
        refresh(self.weights, weights)

    def reset(self, problem: int | None = None) -> None:
        self.mean[slice(None) if problem is None else problem] = 0

    @torch.no_grad()
    def __call__(self, obs: Tensor, *, explore: bool = False) -> Plan:
        """obs [E, O] -> the plan; `explore` adds std_0 ε to its action."""
        seed = np.random.SeedSequence([self.seed, self.step]).generate_state(1, np.uint64)
        self.generator.manual_seed(int(seed[0]))
        self.step += 1
        obs = obs.to(self.device, self.dtype)
        if self.config.enabled:
            noise = self.draw()
            if not explore:
                noise = noise._replace(explore=torch.zeros_like(noise.explore))
            marked, mean = self.compute(self.weights, obs, self.mean, noise)
            self.mean.copy_(mean)
        else:
            noise = self._normal(self.problems, self.weights.action_dim)
            marked = self._act(self.weights, obs, noise if explore else torch.zeros_like(noise))
        # one transfer: the action is on its way to the host, and the marks with it
        marked = marked.float().cpu()
        iterations = self.iterations if self.config.enabled else 0
        return Plan(marked[:, :-1], int(marked[:, -1].sum()), iterations)

    def compute(
        self, w: Weights, obs: Tensor, previous: Tensor, noise: PlanNoise
    ) -> tuple[Tensor, Tensor]:
        """One plan: action [E, A+1] and mean [E, H, A].

        The action's last column is 1 where no score was finite.
        """
        z0, trajectories, returns, mean, std = self.begin(w, obs, previous, noise)
        for sample_noise, score_noise in zip(noise.sample_noise, noise.score_noise, strict=True):
            actions, mean, std, index, weight = self.improve(
                w,
                z0,
                trajectories,
                returns,
                mean,
                std,
                sample_noise,
                score_noise,
                noise.root,
                noise.pair,
            )
        action = self.choose(w, z0, actions, std, index, weight, noise.gumbel, noise.explore)
        return action, torch.where(action[:, -1:, None] > 0, 0.0, mean)

    def draw(self) -> PlanNoise:
        """Fresh draws from the generator."""
        c, problems, action_dim = self.config, self.problems, self.weights.action_dim
        drawn = c.samples - c.policy_trajectories
        steps = c.horizon - (c.score == "advantage")
        uniform = torch.rand(problems, c.elites, device=self.device, generator=self.generator)
        return PlanNoise(
            policy_noise=self._normal(problems, c.horizon, c.policy_trajectories, action_dim),
            policy_score_noise=self._normal(problems, steps, c.policy_trajectories, action_dim),
            sample_noise=self._normal(self.iterations, problems, c.horizon, drawn, action_dim),
            score_noise=self._normal(self.iterations, problems, steps, drawn, action_dim),
            root=self._normal(problems, action_dim),
            explore=self._normal(problems, action_dim),
            gumbel=-torch.log(-torch.log(uniform.clamp(1e-10, 1 - 1e-7))).to(self.dtype),
            pair=layers.random_pair(self.weights.num_critics, self.generator),
        )

    # The three phases of a plan, and the two parts of them that have a name, are pure functions.

    def begin(
        self, w: Weights, obs: Tensor, previous: Tensor, noise: PlanNoise
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """z_0 [E, Z], the policy's trajectories [E, H, P, A] and their returns [E, P], the shifted
        mean and the first std [E, H, A]."""
        z0 = layers.encode(w, obs)
        mean = torch.cat([previous[:, 1:], torch.zeros_like(previous[:, :1])], dim=1)
        std = torch.full_like(mean, self.config.std_max)
        trajectories = self.policy_trajectories(w, z0, noise.policy_noise)
        returns = self.returns(
            w, z0, trajectories, noise.policy_score_noise, noise.root, noise.pair
        )
        return z0, trajectories, returns, mean, std

    def improve(
        self,
        w: Weights,
        z0: Tensor,
        policy_trajectories: Tensor,
        policy_returns: Tensor,
        mean: Tensor,
        std: Tensor,
        sample_noise: Tensor,
        score_noise: Tensor,
        root: Tensor,
        pair: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Actions [E, H, S, A] of one iteration and the refit on their returns."""
        c = self.config
        drawn = (mean.unsqueeze(2) + std.unsqueeze(2) * sample_noise).clamp(-1, 1)
        returns = self.returns(w, z0, drawn, score_noise, root, pair)
        actions = torch.cat([policy_trajectories, drawn], dim=2)
        return actions, *mppi_refit_reference(
            actions,
            torch.cat([policy_returns, returns], dim=1),
            c.elites,
            c.temperature,
            c.std_min,
            c.std_max,
        )

    def choose(
        self,
        w: Weights,
        z0: Tensor,
        actions: Tensor,
        std: Tensor,
        index: Tensor,
        weight: Tensor,
        gumbel: Tensor,
        explore: Tensor,
    ) -> Tensor:
        """One elite's first action, in range, with the mark of a plan without a finite score."""
        # argmax of log-weight + Gumbel noise is one draw from the weights
        pick = (weight.log() + gumbel).argmax(1, keepdim=True)
        chosen = index.gather(1, pick)[:, None, :, None].expand(-1, 1, -1, actions.shape[3])
        action = actions.gather(2, chosen)[:, 0, 0] + std[:, 0] * explore
        finite = weight.sum(1, keepdim=True) > 0
        mode = torch.tanh(layers.policy(w, z0)[0])
        return _marked(torch.where(finite, action, mode), finite)

    def policy_trajectories(self, w: Weights, z0: Tensor, policy_noise: Tensor) -> Tensor:
        """Actions of π rolled through d: policy_noise [E, H, P, A] -> [E, H, P, A]."""
        z = z0.unsqueeze(1).expand(-1, policy_noise.shape[2], -1)
        actions: list[Tensor] = []
        for t in range(policy_noise.shape[1]):
            if t:
                z = layers.dynamics(w, z, actions[-1])
            actions.append(layers.policy_action(w, z, policy_noise[:, t]))
        return torch.stack(actions, dim=1)

    def returns(
        self,
        w: Weights,
        z0: Tensor,
        actions: Tensor,
        score_noise: Tensor,
        root: Tensor,
        pair: Tensor,
    ) -> Tensor:
        """Soft returns [E, S] of actions [E, H, S, A], by the score that the settings name."""
        if self.config.score == "unrolled":
            first = root[:, None, None].expand(-1, 1, actions.shape[2], -1)
            score_noise = torch.cat([first, score_noise], dim=1)
        return mppi_rollout_reference(
            w,
            z0,
            actions,
            score_noise,
            pair,
            self.discount,
            self.config.score,
            self.entropy_coef,
        )

    def _act(self, w: Weights, obs: Tensor, noise: Tensor) -> Tensor:
        """The policy's action at h(obs), marked where it is not finite: [E, A+1]."""
        action = layers.policy_action(w, layers.encode(w, obs), noise)
        return _marked(action, action.isfinite().all(1, keepdim=True))

    def _normal(self, *shape: int) -> Tensor:
        draw = torch.randn(shape, device=self.device, generator=self.generator)
        return draw.to(self.dtype)


def _marked(action: Tensor, finite: Tensor) -> Tensor:
    """action [E, A] in range, and a last column that is 1 where `finite` [E, 1] is not."""
    return torch.cat([action.nan_to_num(0).clamp(-1, 1), (~finite).to(action.dtype)], dim=1)
