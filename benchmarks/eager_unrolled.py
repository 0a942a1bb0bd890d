"""The baseline: an MPPI planner in plain torch, as such planners are usually written.

It scores the unrolled soft return step by step, evaluates every critic of the ensemble and keeps
two, and asks the policy again wherever a density or a value needs it. Only the mathematics is
shared with the package: nothing here calls `iqmpc.kernels`, so that a faster package does not
speed its own baseline up.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from iqmpc.config import PlannerConfig
from iqmpc.kernels.weights import Layer, Weights


def norm(x: Tensor, layer: Layer) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], layer.gamma, layer.beta)


def hidden(layers: tuple[Layer, ...], x: Tensor) -> Tensor:
    """Linear, LayerNorm and Mish for each of `layers`: x [N, I] -> [N, O]."""
    for layer in layers:
        x = F.mish(norm(F.linear(x, layer.weight, layer.bias), layer))
    return x


def latent(w: Weights, layers: tuple[Layer, ...], x: Tensor) -> Tensor:
    """An MLP that ends in SimNorm: x [N, I] -> z [N, Z]."""
    last = layers[-1]
    z = norm(F.linear(hidden(layers[:-1], x), last.weight, last.bias), last)
    return z.view(len(z), -1, w.simnorm_dim).softmax(-1).view_as(z)


def dynamics(w: Weights, z: Tensor, action: Tensor) -> Tensor:
    return latent(w, w.dynamics, torch.cat([z, action], dim=-1))


def policy(w: Weights, z: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """z [N, Z], noise [N, A] -> action [N, A] and its log-density [N]."""
    last = w.policy[-1]
    mean, x = F.linear(hidden(w.policy[:-1], z), last.weight, last.bias).chunk(2, dim=-1)
    log_std = w.log_std_min + 0.5 * (w.log_std_max - w.log_std_min) * (torch.tanh(x) + 1)
    u = mean + log_std.exp() * noise
    log_prob = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    squash = 2 * (math.log(2) - u - F.softplus(-2 * u))
    return torch.tanh(u), (log_prob - squash).sum(-1)


def q_min(w: Weights, z: Tensor, action: Tensor, pair: Tensor) -> Tensor:
    """All K critics on z [N, Z], action [N, A]; the smaller of the two in `pair`: [N]."""
    x = torch.cat([z, action], dim=-1).expand(w.num_critics, -1, -1)
    for layer in w.critics[:-1]:
        x = torch.baddbmm(layer.bias.unsqueeze(1), x, layer.weight.transpose(1, 2))
        x = F.layer_norm(x, x.shape[-1:])
        x = F.mish(x * layer.gamma.unsqueeze(1) + layer.beta.unsqueeze(1))
    last = w.critics[-1]
    q = torch.baddbmm(last.bias.unsqueeze(1), x, last.weight.transpose(1, 2)).squeeze(-1)
    return q[pair].amin(0)


def scores(
    w: Weights,
    z0: Tensor,  # [E, Z]
    actions: Tensor,  # [E, H, S, A]
    noise: Tensor,  # [E, H+1, S, A]
    pair: Tensor,  # [2] int64
    discount: float,
    entropy: float,
) -> Tensor:  # [E, S]
    """G = Σ_{t<H} γ^t (Q(z_t,a_t) - γ V(z_{t+1}) - β log π(ã_t|z_t)) + γ^H V(z_H)."""
    envs, horizon, samples, _ = actions.shape
    action = actions.transpose(0, 1).flatten(1, 2)  # [H, E·S, A]
    # z_0 is one latent, so it takes one policy sample
    first = noise[:, :1, :1].expand(-1, -1, samples, -1)
    noise = torch.cat([first, noise[:, 1:]], dim=1).transpose(0, 1).flatten(1, 2)

    def value(z: Tensor, noise: Tensor) -> Tensor:
        prior, log_prob = policy(w, z, noise)
        return q_min(w, z, prior, pair) - entropy * log_prob

    z = z0.repeat_interleave(samples, dim=0)
    total = torch.zeros(len(z), dtype=z.dtype, device=z.device)
    for t in range(horizon):
        _, log_prob = policy(w, z, noise[t])
        after = dynamics(w, z, action[t])
        reward = q_min(w, z, action[t], pair) - discount * value(after, noise[t + 1])
        total = total + discount**t * (reward - entropy * log_prob)
        z = after
    return (total + discount**horizon * value(z, noise[horizon])).view(envs, samples)


class EagerUnrolled:
    """MPPI with `scores`. The same settings, draws and result as `iqmpc.planner.Planner.plan`."""

    def __init__(
        self,
        weights: Weights,
        config: PlannerConfig,
        *,
        discount: float,
        entropy: float,
        num_envs: int,
        compiled: bool,
    ):
        self.weights, self.config = weights, config
        self.discount, self.entropy, self.num_envs = discount, entropy, num_envs
        self.iterations = config.iterations or (8 if weights.action_dim >= 20 else 6)
        self.mean = torch.zeros(num_envs, config.horizon, weights.action_dim)
        self._compute = torch.compile(self.compute, dynamic=False) if compiled else self.compute

    @torch.no_grad()
    def plan(self, obs: Tensor) -> Tensor:
        """obs [E, O] -> action [E, A]."""
        c, envs, size = self.config, self.num_envs, self.weights.action_dim
        action, self.mean = self._compute(
            obs,
            self.mean,
            torch.randn(envs, c.horizon, c.policy_trajectories, size),
            torch.randn(self.iterations, envs, c.horizon, c.samples - c.policy_trajectories, size),
            torch.randn(self.iterations, envs, c.horizon + 1, c.samples, size),
            torch.rand(envs, c.elites),
            torch.randperm(self.weights.num_critics)[:2],
        )
        return action

    def compute(
        self,
        obs: Tensor,  # [E, O]
        previous: Tensor,  # [E, H, A]
        prior_noise: Tensor,  # [E, H, P, A]
        sample_noise: Tensor,  # [I, E, H, S-P, A]
        score_noise: Tensor,  # [I, E, H+1, S, A]
        uniform: Tensor,  # [E, elites]
        pair: Tensor,  # [2] int64
    ) -> tuple[Tensor, Tensor]:
        """One plan: action [E, A] and the mean [E, H, A] that the next one starts from."""
        c, w = self.config, self.weights
        z0 = latent(w, w.encoder, obs)
        prior = self._prior(z0, prior_noise)
        mean = torch.cat([previous[:, 1:], torch.zeros_like(previous[:, :1])], dim=1)
        std = torch.full_like(mean, c.std_max)
        for i in range(self.iterations):
            drawn = (mean.unsqueeze(2) + std.unsqueeze(2) * sample_noise[i]).clamp(-1, 1)
            actions = torch.cat([prior, drawn], dim=2)
            returns = scores(
                w, z0, actions, score_noise[i], pair, self.discount, self.entropy)
            best, index = returns.nan_to_num(-torch.inf).topk(c.elites, dim=1)
            elites = actions.gather(
                2, index[:, None, :, None].expand(-1, c.horizon, -1, actions.shape[3]))
            weight = torch.softmax(c.temperature * best, dim=1)
            share = weight[:, None, :, None]
            mean = (share * elites).sum(2)
            std = (share * (elites - mean.unsqueeze(2)).square()).sum(2).sqrt()
            std = std.clamp(c.std_min, c.std_max)
        # argmax of weight / exponential noise is one draw from the weights
        chosen = (weight / -uniform.clamp_min(1e-10).log()).argmax(1)
        action = elites[torch.arange(self.num_envs), 0, chosen]
        return action, mean

    def _prior(self, z0: Tensor, noise: Tensor) -> Tensor:
        """Actions of π rolled through d: noise [E, H, P, A] -> [E, H, P, A]."""
        envs, horizon, rows, _ = noise.shape
        z = z0.repeat_interleave(rows, dim=0)
        actions = []
        for t in range(horizon):
            action, _ = policy(self.weights, z, noise[:, t].flatten(0, 1))
            actions.append(action.view(envs, rows, -1))
            if t + 1 < horizon:
                z = dynamics(self.weights, z, action)
        return torch.stack(actions, dim=1)
