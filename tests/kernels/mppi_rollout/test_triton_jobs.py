"""The tables of jobs: what a job reads was written before, and nobody disturbs it."""

from __future__ import annotations

import pytest

from iqmpc.kernels.mppi_rollout import triton_jobs
from iqmpc.kernels.triton_weights import TritonWeights


@pytest.mark.parametrize("termination", [False, True])
@pytest.mark.parametrize("horizon", range(1, 6))
def test_jobs_read_what_was_written(make_weights, horizon, termination):
    """No job reads memory before it is written, and none of a stage's jobs disturb it."""
    w = TritonWeights(make_weights(5, 3, termination=termination))
    ends = termination * (horizon - 1)  # the head's, on z_1..z_{H-1}

    def reads(job):
        found = {job.x} if job.inputs else set()
        found |= {job.source} if job.init == triton_jobs.SAVED else set()
        found |= {("root", job.source)} if job.init == triton_jobs.SHARED else set()
        found |= {("a", job.step)} if job.action == triton_jobs.GIVEN else set()
        return found | ({"ã"} if job.action == triton_jobs.POLICY_ACTION else set())

    def writes(job):
        kind = {
            triton_jobs.POLICY: "ã",
            triton_jobs.ACT: ("a", job.step),
            triton_jobs.ROOT: ("root", job.out),
        }
        return {kind.get(job.kind, job.out)} | ({job.save} if job.save >= 0 else set())

    def run(stages, written):
        for stage in stages.stages:
            raw = stage.inputs == triton_jobs.RAW  # its x is not in scratch memory
            read = set().union(*(reads(job) - ({job.x} if raw else set()) for job in stage.jobs))
            new = [writes(job) for job in stage.jobs]
            assert read <= written and not read & set().union(*new)
            assert sum(map(len, new)) == len(set().union(*new))  # each has places of its own
            assert raw or all(job.inputs == 0 or job.in_features > 1 for job in stage.jobs)
            written |= set().union(*new)
        assert max((x for x in written if isinstance(x, int)), default=-1) < stages.columns
        return written

    def heads(stages):
        return {stages.heads + i * w.width for i in range(2 * (2 * horizon - 1) + ends)}

    actions = {("a", t) for t in range(horizon)}
    parts = {("root", i * w.width) for i in range(2 + (horizon > 1))}
    policy = {("root", 3 * w.width)}
    assert run(triton_jobs.root_stage(w, horizon), set()) == parts
    started = run(triton_jobs.start(w, horizon), set())
    assert {x for x in started if isinstance(x, tuple)} == parts | policy
    alone = run(triton_jobs.start(w, 0), set())
    assert {x for x in alone if isinstance(x, tuple)} == policy

    chain = triton_jobs.chain(w, horizon)
    written = actions | parts
    for job in chain.jobs:
        assert reads(job) <= written and not (job.inputs and job.x in writes(job))
        written |= writes(job)
    assert max(x for x in written if isinstance(x, int)) < chain.columns

    stages, trajectories = (f(w, horizon) for f in (triton_jobs.stages, triton_jobs.trajectories))
    assert heads(stages) <= run(stages, actions | parts)
    assert heads(trajectories) | actions <= run(trajectories, {("a", 0)} | parts)
    for jobs in (
        chain.jobs,
        *([job for stage in x.stages for job in stage.jobs] for x in (stages, trajectories)),
    ):
        assert sum(job.kind == triton_jobs.HEAD for job in jobs) == 2 * (2 * horizon - 1) + ends
        assert sum(job.kind == triton_jobs.SIMNORM for job in jobs) == horizon - 1
