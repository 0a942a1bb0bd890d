"""What the Triton rollout computes, as tables of jobs: a job is one layer on a tile of rows.

Both schedules run the same kind of job, so that a rollout of any horizon is data, not code. Plain
Python: does not import Triton.

A tile's rows are samples. Each row has a line of scratch memory, in regions of `width` columns;
`x`, `out`, `save` and `source` are columns of it.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

from iqmpc.kernels.triton_weights import PackedLayer, TritonWeights

# Job.kind: what becomes of the product. POLICY: the policy sample ã_t that a score needs. ACT: the
# policy's action a_t. ROOT: stored as it is, for all samples of a problem.
# Of MISH and SIMNORM, and RAW, which needs nothing, is also how a stage reads x.
MISH, SIMNORM, HEAD, POLICY, ACT, ROOT, RAW = range(7)
ROOTS = 4  # regions of what all samples of a problem share: see `root_stage` and `start`
# Job.init: what the product is added to: the bias, z_0's part of it, or a saved z_t part.
BIAS, SHARED, SAVED = range(3)
# Job.action: none, the trajectory's a_t or the policy's ã_t.
NONE, GIVEN, POLICY_ACTION = range(3)


class Job(NamedTuple):
    """One layer, of the dynamics, the policy, the termination head or the critic in `slot` of the
    drawn pair."""

    kind: int
    slot: int  # -1: not a critic; of a HEAD the termination head's
    weight: int
    inputs: int  # 0: no product with x
    outputs: int
    vectors: int
    features: int
    action_weight: int
    action: int
    step: int  # t
    init: int
    source: int  # column of z_0's or the saved part
    save: int  # column for the product before the action's part, -1: not kept
    x: int
    out: int
    policy_action: int  # of a HEAD: 1 where the action is ã_t
    in_vectors: int  # of the layer that made x, where x is still to be normalised
    in_features: int


class Stage(NamedTuple):
    """Jobs that may run side by side; `inputs` is how each reads x: RAW, MISH or SIMNORM."""

    inputs: int
    jobs: list[Job]


class Chain(NamedTuple):
    """A whole rollout as one list: scratch columns a row, columns of z_0's part, jobs."""

    columns: int
    jobs: list[Job]


class Stages(NamedTuple):
    """A whole rollout as stages, after `root_stage`.

    `heads` is the first of the regions where the critics' second layers lie: 2 i + c for critic c
    on action i of a_0, a_1, ã_1, a_2, ã_2, ... After them come, where there is a termination head,
    its second layers on z_1, z_2, ...
    """

    columns: int
    heads: int
    stages: list[Stage]


def root_stage(w: TritonWeights, horizon: int) -> Stages:
    """From z_0: its part of the first layers, in the first three regions of what a problem's
    samples share, [critic, critic, dynamics]. Rows are problems, of which no scratch is used."""
    return Stages(0, 0, [Stage(RAW, _roots(w, horizon, x=0))])


def start(w: TritonWeights, horizon: int) -> Stages:
    """From observations: the encoder, `root_stage` on its z_0 and π(z_0) in the fourth region.

    From z_0 where the encoder is not packed. Rows are problems. With horizon 0, π(z_0) alone.
    """
    region = itertools.count(step=w.width)
    result = []
    x = producer = None
    for i, layer in enumerate(w.encoder):
        out = next(region)
        job = _job(w.encoder, i, MISH, x=x or 0, producer=producer, out=out)
        result.append(Stage(MISH if i else RAW, [job]))
        x, producer = out, layer
    z0 = dict(x=x or 0, producer=producer)
    first, second = next(region), next(region)
    roots = _roots(w, horizon, **z0) if horizon else []
    result += [
        Stage(SIMNORM if w.encoder else RAW, [*roots, _job(w.policy, 0, MISH, out=first, **z0)]),
        Stage(MISH, [_job(w.policy, 1, MISH, x=first, producer=w.policy[0], out=second)]),
        Stage(MISH, [_job(w.policy, 2, ROOT, x=second, producer=w.policy[1], out=3 * w.width)]),
    ]
    return Stages(next(region), 0, result)


def chain(w: TritonWeights, horizon: int) -> Chain:
    """One job after the other, in as little scratch memory as possible."""
    z, first, second, saved = (i * w.width for i in range(4))
    jobs = []

    def critic(c: int, action: int, t: int, **how: int) -> None:
        jobs.append(_job(w.critics, 0, MISH, slot=c, action=action, step=t, out=first, **how))
        jobs.append(_job(w.critics, 1, HEAD, slot=c, x=first, out=second,
                         policy_action=action == POLICY_ACTION))

    for t in range(horizon):
        if t:
            jobs.append(_job(w.policy, 0, MISH, x=z, out=first))
            jobs.append(_job(w.policy, 1, MISH, x=first, out=second))
            jobs.append(_job(w.policy, 2, POLICY, x=second, step=t))
            if w.termination:  # before the critics, whose scores count while z_t is not terminal
                jobs.append(_job(w.termination, 0, MISH, x=z, out=first))
                jobs.append(_job(w.termination, 1, HEAD, x=first, out=second))
        for c in range(2):
            if t:
                critic(c, POLICY_ACTION, t, x=z, save=saved)
                critic(c, GIVEN, t, init=SAVED, source=saved)
            else:
                critic(c, GIVEN, t, init=SHARED, source=c * w.width)
        if t + 1 < horizon:
            how = dict(x=z) if t else dict(init=SHARED, source=2 * w.width)
            jobs.append(_job(w.dynamics, 0, MISH, action=GIVEN, step=t, out=first, **how))
            jobs.append(_job(w.dynamics, 1, MISH, x=first, out=second))
            jobs.append(_job(w.dynamics, 2, SIMNORM, x=second, out=z))
    return Chain(4 * w.width, jobs)


def stages(w: TritonWeights, horizon: int) -> Stages:
    """As few stages as the dependencies allow; Q(z_t, ã_t) runs beside the layers of t + 1."""
    region = itertools.count(step=w.width)

    def two() -> list[int]:
        return [next(region), next(region)]

    z, policy, dynamics, given, policy_action = next(region), two(), two(), two(), two()
    saved = two(), two()  # by the parity of t: one is read while the other is written
    end = next(region) if w.termination else 0
    heads = next(region)

    def seconds(hidden: list[int], number: int) -> list[Job]:
        return _seconds(w, hidden, heads + 2 * number * w.width)

    result: list[Stage] = []
    late: tuple[list[Job], list[Job]] = [], []
    for t in range(horizon):
        parts = [[], [], []]  # first, second and third layers
        for c in range(2):
            how = (dict(x=z, producer=w.dynamics[2], save=saved[t % 2][c]) if t
                   else dict(init=SHARED, source=c * w.width))
            parts[0].append(_job(
                w.critics, 0, MISH, slot=c, action=GIVEN, step=t, out=given[c], **how))
        parts[1] += seconds(given, 2 * t - 1 if t else 0)
        if t:
            parts[0].append(_job(w.policy, 0, MISH, x=z, producer=w.dynamics[2], out=policy[0]))
            parts[1].append(
                _job(w.policy, 1, MISH, x=policy[0], producer=w.policy[0], out=policy[1]))
            for part, job in zip(parts, _ends(w, z, end, _end_head(w, heads, horizon, t)),
                                 strict=False):
                part += job
            parts[2].append(_job(w.policy, 2, POLICY, x=policy[1], producer=w.policy[1], step=t))
        if t + 1 < horizon:
            how = (dict(x=z, producer=w.dynamics[2]) if t
                   else dict(init=SHARED, source=2 * w.width))
            parts[0].append(
                _job(w.dynamics, 0, MISH, action=GIVEN, step=t, out=dynamics[0], **how))
            parts[1].append(
                _job(w.dynamics, 1, MISH, x=dynamics[0], producer=w.dynamics[0], out=dynamics[1]))
            parts[2].append(
                _job(w.dynamics, 2, SIMNORM, x=dynamics[1], producer=w.dynamics[1], out=z))
        result.append(Stage(SIMNORM if t else MISH, parts[0] + late[0]))
        result.append(Stage(MISH, parts[1] + late[1]))
        if parts[2]:
            result.append(Stage(MISH, parts[2]))
        late = ([], [])
        if t:
            late = ([_job(w.critics, 0, MISH, slot=c, action=POLICY_ACTION, step=t, init=SAVED,
                          source=saved[t % 2][c], out=policy_action[c]) for c in range(2)],
                    seconds(policy_action, 2 * t))
    result += [Stage(MISH, jobs) for jobs in late if jobs]
    return Stages(_end_head(w, heads, horizon, horizon), heads, result)


def trajectories(w: TritonWeights, horizon: int) -> Stages:
    """The policy's trajectories, after `start`: rolled out and scored in one go, a_0 given."""
    region = itertools.count(step=w.width)

    def two() -> list[int]:
        return [next(region), next(region)]

    z, policy, dynamics, given, policy_action = next(region), two(), two(), two(), two()
    end = next(region) if w.termination else 0
    heads = next(region)
    result: list[Stage] = []
    for t in range(horizon):
        latent = dict(x=z, producer=w.dynamics[2])
        if t:
            from_policy = dict(x=policy[1], producer=w.policy[1], step=t)
            result += [
                Stage(SIMNORM, [_job(w.policy, 0, MISH, out=policy[0], **latent)]),
                Stage(MISH, [_job(w.policy, 1, MISH, x=policy[0], producer=w.policy[0],
                                  out=policy[1])]),
                Stage(MISH, [_job(w.policy, 2, kind, **from_policy) for kind in (ACT, POLICY)]),
            ]
        first, second = _ends(w, z, end, _end_head(w, heads, horizon, t)) if t else ([], [])
        for action, hidden in ((GIVEN, given), (POLICY_ACTION, policy_action))[:2 if t else 1]:
            number = 2 * t - (action == GIVEN) if t else 0
            second += _seconds(w, hidden, heads + 2 * number * w.width)
            for c in range(2):
                how = latent if t else dict(init=SHARED, source=c * w.width)
                first.append(_job(
                    w.critics, 0, MISH, slot=c, action=action, step=t, out=hidden[c], **how))
        if t + 1 < horizon:
            how = latent if t else dict(init=SHARED, source=2 * w.width)
            first.append(
                _job(w.dynamics, 0, MISH, action=GIVEN, step=t, out=dynamics[0], **how))
            second.append(
                _job(w.dynamics, 1, MISH, x=dynamics[0], producer=w.dynamics[0], out=dynamics[1]))
        result += [Stage(SIMNORM if t else MISH, first), Stage(MISH, second)]
        if t + 1 < horizon:
            result.append(Stage(MISH, [
                _job(w.dynamics, 2, SIMNORM, x=dynamics[1], producer=w.dynamics[1], out=z)]))
    return Stages(_end_head(w, heads, horizon, horizon), heads, result)


def _roots(w: TritonWeights, horizon: int, **z0: object) -> list[Job]:
    jobs = [_job(w.critics, 0, ROOT, slot=c, out=c * w.width, **z0) for c in range(2)]
    if horizon > 1:
        jobs.append(_job(w.dynamics, 0, ROOT, out=2 * w.width, **z0))
    return jobs


def _ends(w: TritonWeights, z: int, hidden: int, out: int) -> tuple[list[Job], list[Job]]:
    """The termination head's first and second layer on a latent; none where there is no head."""
    if not w.termination:
        return [], []
    return ([_job(w.termination, 0, MISH, x=z, producer=w.dynamics[2], out=hidden)],
            [_job(w.termination, 1, HEAD, x=hidden, producer=w.termination[0], out=out)])


def _end_head(w: TritonWeights, heads: int, horizon: int, t: int) -> int:
    """Where the termination head's second layer on z_t lies; of t = H, the column after the last
    region."""
    last = heads + 2 * (2 * horizon - 1) * w.width
    return last + (t - 1) * w.width if w.termination else last


def _seconds(w: TritonWeights, hidden: list[int], out: int) -> list[Job]:
    """The second layers of both critics, into the two regions from column `out`."""
    return [_job(w.critics, 1, HEAD, slot=c, x=hidden[c], producer=w.critics[0],
                 out=out + c * w.width) for c in range(2)]


def _job(
    layers: tuple[PackedLayer, ...], index: int, kind: int, *, slot: int = -1, x: int | None = None,
    action: int = NONE, step: int = 0, init: int = BIAS, source: int = 0, save: int = -1,
    out: int = 0, policy_action: int = 0, producer: PackedLayer | None = None,
) -> Job:
    layer = layers[index]
    return Job(
        kind, slot, layer.weight, 0 if x is None else layer.inputs,
        layer.outputs, layer.vectors, layer.features, layer.action_weight, action, step, init,
        source, save, x or 0, out, int(policy_action), producer.vectors if producer else 0,
        producer.features if producer else 1)
