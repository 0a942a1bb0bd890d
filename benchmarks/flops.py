"""Operation counts: the matrix products alone, a multiply-add as two operations.

Symbols as in the documentation: O, A, Z sizes of observation, action and latent; H horizon; E
problems, S samples, P policy trajectories, I iterations; K critics; B sequences in a batch.
"""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.cases import PlanCase, UpdateCase


class Macs(NamedTuple):
    """Multiply-adds of one row through each network, and through parts of first layers."""

    encoder: int
    dynamics: int
    policy: int
    critic: int
    encoder_first: int
    z_part: int  # latent to hidden: the first layer of π, and of d and Q without the action
    z_saved: int  # of those, what SimNorm's last members would take

    @classmethod
    def of(cls, case: PlanCase | UpdateCase) -> Macs:
        m, obs, act = case.config.model, case.obs_dim, case.action_dim
        enc, hid, lat = m.encoder_dim, m.hidden_dim, m.latent_dim
        return cls(
            encoder=obs * enc + enc * lat,
            dynamics=(lat + act) * hid + hid * hid + hid * lat,
            policy=lat * hid + hid * hid + hid * 2 * act,
            critic=(lat + act) * hid + hid * hid + hid,
            encoder_first=obs * enc,
            z_part=lat * hid,
            z_saved=lat // m.simnorm_dim * hid,
        )


def _start(case: PlanCase) -> int:
    """The encoder and the policy trajectories, one by one: h + P (H π + (H-1) d)."""
    c, m = case.config.planner, Macs.of(case)
    rollout = c.horizon * m.policy + (c.horizon - 1) * m.dynamics
    return m.encoder + c.policy_trajectories * rollout


def _scored(case: PlanCase) -> int:
    """Samples to score in a plan, when the policy's P trajectories are scored once: I (S-P) + P."""
    c = case.config.planner
    return case.iterations * (c.samples - c.policy_trajectories) + c.policy_trajectories


def plan_unrolled(case: PlanCase) -> int:
    """The unrolled variants, a sample: H d + (2H+1) (π + K Q); torch.compile merges none."""
    c, m = case.config.planner, Macs.of(case)
    h, q = c.horizon, case.config.model.critics * m.critic
    sample = h * m.dynamics + (2 * h + 1) * (m.policy + q)
    return 2 * case.problems * (case.iterations * c.samples * sample + _start(case))


def plan_advantage(case: PlanCase) -> int:
    """The reference, a sample: (H-1) (d + π) + 2 (2H-1) Q; at the end the mode of π."""
    h, m = case.config.planner.horizon, Macs.of(case)
    sample = (h - 1) * (m.dynamics + m.policy) + 2 * (2 * h - 1) * m.critic
    return 2 * case.problems * (_scored(case) * sample + _start(case) + m.policy)


def plan_floor(case: PlanCase) -> int:
    """The advantage form with all that can be shared computed once: what the C++ planner computes.

    z_0 is common to all samples and iterations, so its part of the first layers of d and of both
    critics, and π(z_0), are computed once; Q(z_t, a_t) and Q(z_t, ã_t) share the z part of theirs.
    The policy's trajectories are scored once, on the latents and with the π that made them. The
    groups of a latent sum to one, so each z part is smaller by one member of every group.
    """
    h, m = case.config.planner.horizon, Macs.of(case)
    z_part, policy = m.z_part - m.z_saved, m.policy - m.z_saved
    dynamics = (h - 1) * (m.dynamics - m.z_part) + (h - 2) * z_part  # the first step is from z_0
    # without z parts, then those of the latents after z_0, one for both actions
    critics = 2 * ((2 * h - 1) * (m.critic - m.z_part) + (h - 1) * z_part)
    sample = dynamics + (h - 1) * policy + critics
    return 2 * case.problems * (_scored(case) * sample + m.encoder + policy + 3 * z_part)


def update(case: UpdateCase) -> int:
    """One update, forward and backward.

    A product with a gradient for its weights costs one more, for its input another one. Of 2B
    columns and H steps (R = 2B·H rows):
      targets    R (h + π + 2 Q̄)                         forward only
      rollout    2B (3 h - h_1) + 3 R d                  observations take no gradient
      critics    3 K R Q
      V(z_0)     B (π + 3·2 Q)                           experts only, π fixed
      policy     2B (H+1) (3 π - π_1 + 2·2 Q)            latents and critics fixed
      penalty    K B H (6 Q - Q_1 - 3 Q_3)               where there is one: Q, its gradient, and of
                                                         both the gradient by the weights
    """
    m, horizon = Macs.of(case), case.config.learner.horizon
    columns, members = 2 * case.batch, case.config.model.critics
    rows = columns * horizon
    first = m.critic - case.config.model.hidden_dim * (case.config.model.hidden_dim + 1)
    hidden = case.config.model.hidden_dim
    penalty = (
        members * case.batch * horizon * (6 * m.critic - first - 3 * hidden) if case.penalty else 0
    )
    macs = (
        rows * (m.encoder + m.policy + 2 * m.critic)
        + columns * (3 * m.encoder - m.encoder_first)
        + 3 * rows * m.dynamics
        + 3 * members * rows * m.critic
        + case.batch * (m.policy + 6 * m.critic)
        + columns * (horizon + 1) * (3 * m.policy - m.z_part + 4 * m.critic)
        + penalty
    )
    return 2 * macs


def update_floor(case: UpdateCase) -> int:
    """What the C++ update computes: gradients that nobody reads are left out.

    As `update`, but of a critic's first layer the gradient goes to z alone (data, V(z_0)) or to a
    alone (policy); the policy's step goes back through the smaller critic of each row; one neuron
    takes no matrix product on its way back; the encoder's first layer none for its input.
    """
    m, c, horizon = Macs.of(case), case.config, case.config.learner.horizon
    columns, members = 2 * case.batch, c.model.critics
    rows, hid = columns * horizon, c.model.hidden_dim
    square = hid * hid
    first = (c.model.latent_dim + case.action_dim) * hid
    critic_back = first + square + square + m.z_part  # weights, then inputs
    dynamics_back = 2 * m.dynamics - case.action_dim * hid
    macs = (
        rows * (m.encoder + m.policy + 2 * m.critic)
        + columns * (3 * m.encoder - m.encoder_first)
        + rows * (m.dynamics + dynamics_back)
        + members * rows * (m.critic + critic_back)
        + case.batch * (m.policy + 2 * (m.critic + critic_back))
        + columns
        * (horizon + 1)
        * (3 * m.policy - m.z_part + 2 * m.critic + square + case.action_dim * hid)
    )
    if case.penalty:
        # Q, its gradient, up with the bars, down to the first layer, and twice the weights
        macs += members * case.batch * horizon * (5 * first + 6 * square)
    return 2 * macs


def parameters(case: PlanCase | UpdateCase, critics: int) -> int:
    """Numbers in the weight matrices, with `critics` of the ensemble."""
    m = Macs.of(case)
    return m.encoder + m.dynamics + m.policy + critics * m.critic


def plan_bytes(case: PlanCase, itemsize: int) -> int:
    """Once through memory: the matrices a plan needs, a pair of critics among them, observations
    in, actions out. Noise and samples are made and used on the device and need not be stored."""
    return itemsize * parameters(case, 2) + 4 * case.problems * (case.obs_dim + case.action_dim + 1)


def update_bytes(case: UpdateCase) -> int:
    """Once through memory, float32: parameters and Adam's two moments read and written, the target
    critics too, and the batch read. Gradients and activations need not be stored."""
    critics = case.config.model.critics
    rows = (
        2
        * case.batch
        * (
            (case.config.learner.horizon + 1) * case.obs_dim
            + case.config.learner.horizon * (case.action_dim + 2)
        )
    )
    return 4 * (6 * parameters(case, critics) + 2 * critics * Macs.of(case).critic + rows)


def matmul(size: int) -> int:
    """A square product: 2 N³."""
    return 2 * size**3
