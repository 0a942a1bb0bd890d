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
    entropy_coef: float,
) -> Tensor:  # [E, S]
    """G = Σ_{t<H} γ^t (Q(z_t,a_t) - γ V(z_{t+1}) - β log π(ã_t|z_t)) + γ^H V(z_H)."""
    problems, horizon, samples, _ = actions.shape
    action = actions.transpose(0, 1).flatten(1, 2)  # [H, E·S, A]
    # z_0 is one latent, so it takes one policy sample
    first = noise[:, :1, :1].expand(-1, -1, samples, -1)
    noise = torch.cat([first, noise[:, 1:]], dim=1).transpose(0, 1).flatten(1, 2)

    def value(z: Tensor, noise: Tensor) -> Tensor:
        action, log_prob = policy(w, z, noise)
        return q_min(w, z, action, pair) - entropy_coef * log_prob

    z = z0.repeat_interleave(samples, dim=0)
    total = torch.zeros(len(z), dtype=z.dtype, device=z.device)
    for t in range(horizon):
        _, log_prob = policy(w, z, noise[t])
        after = dynamics(w, z, action[t])
        reward = q_min(w, z, action[t], pair) - discount * value(after, noise[t + 1])
        total = total + discount**t * (reward - entropy_coef * log_prob)
        z = after
    return (total + discount**horizon * value(z, noise[horizon])).view(problems, samples)


class EagerUnrolled:
    """MPPI with `scores`: the settings, draws and warm start of `iqmpc.planner.Planner`.

    `compiled` puts one iteration under torch.compile, not the plan: the iterations are alike, and
    compiling each of them takes minutes.
    """

    def __init__(
        self,
        weights: Weights,
        config: PlannerConfig,
        *,
        discount: float,
        entropy_coef: float,
        problems: int,
        compiled: bool,
    ):
        self.weights, self.config = weights, config
        self.discount, self.entropy_coef, self.problems = discount, entropy_coef, problems
        self.iterations = config.iterations_for(weights.action_dim)
        self.device = weights.encoder[0].weight.device
        self.mean = torch.zeros(problems, config.horizon, weights.action_dim, device=self.device)
        self._improve = torch.compile(self.improve, dynamic=False) if compiled else self.improve

    @torch.no_grad()
    def plan(self, obs: Tensor) -> Tensor:
        """obs [E, O] -> action [E, A]."""
        c, problems, w = self.config, self.problems, self.weights
        z0 = latent(w, w.encoder, obs)
        trajectories = self.policy_trajectories(z0)
        mean = torch.cat([self.mean[:, 1:], torch.zeros_like(self.mean[:, :1])], dim=1)
        std = torch.full_like(mean, c.std_max)
        pair = torch.randperm(w.num_critics, device=self.device)[:2]
        for _ in range(self.iterations):
            drawn = c.samples - c.policy_trajectories
            noise = torch.randn(problems, c.horizon, drawn, w.action_dim, device=self.device)
            score_noise = torch.randn(
                problems, c.horizon + 1, c.samples, w.action_dim, device=self.device
            )
            mean, std, elites, weight = self._improve(
                z0, trajectories, mean, std, noise, score_noise, pair
            )
        self.mean = mean
        chosen = torch.multinomial(weight, 1).squeeze(1)
        return elites[torch.arange(problems), 0, chosen]

    def improve(
        self,
        z0: Tensor,  # [E, Z]
        trajectories: Tensor,  # [E, H, P, A]
        mean: Tensor,  # [E, H, A]
        std: Tensor,  # [E, H, A]
        noise: Tensor,  # [E, H, S-P, A]
        score_noise: Tensor,  # [E, H+1, S, A]
        pair: Tensor,  # [2] int64
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One iteration: new mean and std, elites [E, H, elites, A], their weights [E, elites]."""
        c = self.config
        drawn = (mean.unsqueeze(2) + std.unsqueeze(2) * noise).clamp(-1, 1)
        actions = torch.cat([trajectories, drawn], dim=2)
        returns = scores(
            self.weights, z0, actions, score_noise, pair, self.discount, self.entropy_coef
        )
        best, index = returns.topk(c.elites, dim=1)
        rows = index[:, None, :, None].expand(-1, c.horizon, -1, actions.shape[3])
        elites = actions.gather(2, rows)
        weight = torch.softmax(c.temperature * best, dim=1)
        share = weight[:, None, :, None]
        mean = (share * elites).sum(2)
        variance = (share * (elites - mean.unsqueeze(2)).square()).sum(2)
        return mean, variance.sqrt().clamp(c.std_min, c.std_max), elites, weight

    def policy_trajectories(self, z0: Tensor) -> Tensor:
        """Actions of π rolled through d: z0 [E, Z] -> [E, H, P, A]."""
        c, w = self.config, self.weights
        z = z0.repeat_interleave(c.policy_trajectories, dim=0)
        actions = []
        for t in range(c.horizon):
            if t:
                z = dynamics(w, z, actions[-1])
            actions.append(policy(w, z, torch.randn(len(z), w.action_dim, device=self.device))[0])
        return torch.stack(actions).unflatten(1, (len(z0), -1)).transpose(0, 1)
