"""The Triton backend of `mppi_plan`: a whole plan on a GPU, as one CUDA graph where captured.

Under TRITON_INTERPRET=1 the same kernels run on the CPU, slowly, to show what they compute. This
module imports Triton: import it where it is used, not before (`iqmpc.kernels.backends`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from iqmpc.capture import CapturedStep, captured
from iqmpc.config import PlannerConfig
from iqmpc.errors import BackendError
from iqmpc.kernels import triton_launch
from iqmpc.kernels.mppi_plan.reference import PlanNoise
from iqmpc.kernels.mppi_plan.types import Plan
from iqmpc.kernels.mppi_refit.triton import HELD, elites_of, fit
from iqmpc.kernels.mppi_rollout import triton as rollout
from iqmpc.kernels.triton_launch import COUNTED, INTERPRETED, LAUNCH
from iqmpc.kernels.triton_tiles import power_of_two
from iqmpc.kernels.triton_weights import TritonWeights
from iqmpc.kernels.weights import Weights

_BLOCK = 1024  # numbers that a program of the elementwise kernels makes
_POLICY_ROOT = tl.constexpr(3)  # where π(z_0) lies in the root, in widths
_ROOTS = rollout._ROOTS
_SIZES = ["count", "uniforms", "critics", "total", "horizon", "samples", "num_policy", "elites"]


@triton.jit
def _random(control, stream, i):
    """Four blocks of 32 random bits for the counters i: Philox, keyed by the seed."""
    step = tl.load(control + 1)
    i = i.to(tl.uint32)
    zero = i * 0
    return tl.philox(
        tl.load(control), i, zero + stream, zero + (step & 0xFFFFFFFF).to(tl.uint32),
        zero + ((step >> 32) & 0xFFFFFFFF).to(tl.uint32))


@triton.jit
def _uniform(bits):
    """In (0, 1): the upper 23 of 32 bits, and a half."""
    return ((bits >> 9).to(tl.int32).to(tl.float32) + 0.5) * (1.0 / 8388608.0)


@triton.jit
def _normals(x, y):
    """Two independent standard normals from two uniforms (Box and Muller)."""
    radius = tl.sqrt(-2.0 * tl.log(_uniform(x)))
    angle = 6.283185307179586 * _uniform(y)
    return radius * tl.cos(angle), radius * tl.sin(angle)


@triton.jit(do_not_specialize=_SIZES)
def _draw_kernel(
    control,  # [3] int64: seed, step, whether to explore
    normal,  # [4 * count]
    uniform,  # [uniforms] in (0, 1)
    pair,  # [2] int64: two different critics
    count, uniforms, critics,
    CRITICS: tl.constexpr, BLOCK: tl.constexpr,
):
    """All draws of a plan. Grid: blocks of `count`, then blocks of `uniforms`."""
    blocks = tl.cdiv(count, BLOCK)
    if tl.program_id(0) < blocks:
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        x, y, z, w = _random(control, 0, i)
        n0, n1 = _normals(x, y)
        n2, n3 = _normals(z, w)
        tl.store(normal + i, n0, mask=i < count)
        tl.store(normal + count + i, n1, mask=i < count)
        tl.store(normal + 2 * count + i, n2, mask=i < count)
        tl.store(normal + 3 * count + i, n3, mask=i < count)
    else:
        i = (tl.program_id(0) - blocks) * BLOCK + tl.arange(0, BLOCK)
        x, y, z, w = _random(control, 1, i)
        tl.store(uniform + i, _uniform(x), mask=i < uniforms)
        if tl.program_id(0) == blocks:  # the places of the two largest of K random numbers
            k = tl.arange(0, CRITICS)
            bits, _1, _2, _3 = _random(control, 2, k)
            u = tl.where(k < critics, _uniform(bits), -1.0)
            first = tl.argmax(u, 0)
            second = tl.argmax(tl.where(k == first, -2.0, u), 0)
            tl.store(pair, first.to(tl.int64))
            tl.store(pair + 1, second.to(tl.int64))


@triton.jit
def _policy_action(root, e, a, eps, log_std_min, log_std_max, WIDTH: tl.constexpr):
    """tanh(μ + σ ε) of π(z_0), for problems e and actions a."""
    at = root + e * (_ROOTS * WIDTH) + _POLICY_ROOT * WIDTH + 2 * a
    return rollout.squashed(tl.load(at), tl.load(at + 1), eps, log_std_min, log_std_max)


@triton.jit
def _in_range(x):
    """Clamped to [-1, 1], 0 for NaN."""
    return tl.where(x == x, tl.minimum(tl.maximum(x, -1.0), 1.0), 0.0)


@triton.jit
def _act_kernel(
    control, root,
    explore,  # [E, A]
    out,  # [E, A + 1]
    log_std_min, log_std_max,
    A: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):
    """Without planning: the policy's action, marked where one is not finite. Grid: problems."""
    e = tl.program_id(0)
    a = tl.arange(0, BLOCK)
    eps = tl.load(explore + e * A + a, mask=a < A, other=0.0)
    eps *= tl.load(control + 2).to(tl.float32)
    x = _policy_action(root, e, tl.minimum(a, A - 1), eps, log_std_min, log_std_max, WIDTH)
    tl.store(out + e * (A + 1) + a, _in_range(x), mask=a < A)
    bad = tl.max(((x != x) & (a < A)).to(tl.int32), 0)  # tanh is never infinite
    tl.store(out + e * (A + 1) + A, bad.to(tl.float32))


@triton.jit(do_not_specialize=_SIZES)
def _begin_kernel(
    root,
    mean,  # [E, H, A] of the plan before
    policy_noise,  # [E, H, P, A]
    sample_noise,  # [E, H, S - P, A]
    actions,  # [E, H, S, A]
    total,  # E * H * S * A
    horizon, samples, num_policy, std_max, log_std_min, log_std_max,
    A: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):
    """The first actions of the policy's trajectories and the samples of the first iteration."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = i % A
    line = i // A
    s = line % samples
    et = line // samples
    e = et // horizon
    t = et % horizon
    drawn = (i < total) & (s >= num_policy)
    first = (i < total) & (s < num_policy) & (t == 0)

    centre = tl.load(mean + (et + 1) * A + a, mask=drawn & (t + 1 < horizon), other=0.0)
    at = (et * (samples - num_policy) + s - num_policy) * A + a
    x = centre + std_max * tl.load(sample_noise + at, mask=drawn, other=0.0)
    x = tl.minimum(tl.maximum(x, -1.0), 1.0)

    e = tl.where(first, e, 0)  # beyond the end nothing may be read
    eps = tl.load(policy_noise + (et * num_policy + s) * A + a, mask=first, other=0.0)
    x = tl.where(first, _policy_action(root, e, a, eps, log_std_min, log_std_max, WIDTH), x)
    tl.store(actions + i, x, mask=drawn | first)


@triton.jit(do_not_specialize=_SIZES)
def _improve_kernel(
    control, root,
    actions,  # [E, H, S, A]
    returns,  # [E, S]
    sample_noise,  # [E, H, S - P, A] of the next iteration
    uniform,  # [E, elites]
    explore,  # [E, A]
    mean,  # [E, H, A]
    out,  # [E, A + 1]
    horizon, samples, num_policy, elites, temperature, std_min, std_max,
    CHOOSE: tl.constexpr, A: tl.constexpr, WIDTH: tl.constexpr, SAMPLES: tl.constexpr,
    ELITES: tl.constexpr, BLOCK_A: tl.constexpr, LINES: tl.constexpr,
):
    """Refit, then sample anew in place; to CHOOSE, after the last one, the mean and the action.

    Grid: problems, steps, blocks of actions. A program reads and writes the actions of its own step
    and block, and ranks for itself.
    """
    e, t = tl.program_id(0), tl.program_id(1)
    a = tl.program_id(2) * BLOCK_A + tl.arange(0, BLOCK_A)
    chosen, w = elites_of(returns + e * samples, samples, elites, temperature, SAMPLES, ELITES)
    line = (e * horizon + t).to(tl.int64)
    here = actions + line * samples * A
    centre, std = fit(here, chosen, w, a, A, elites, std_min, std_max, ELITES)
    if CHOOSE:
        finite = tl.sum(w, 0) > 0
        tl.store(mean + line * A + a, tl.where(finite, centre, 0.0), mask=a < A)
        if t == 0:
            k = tl.arange(0, ELITES)
            u = tl.load(uniform + e * elites + k, mask=k < elites, other=0.5)
            # argmax of log-weight + Gumbel noise is one draw from the weights
            score = tl.where(w > 0, tl.log(w) - tl.log(-tl.log(u)), float("-inf"))
            pick = tl.sum(tl.where(k == tl.argmax(score, 0), chosen, 0), 0)
            x = tl.load(here + pick * A + a, mask=a < A, other=0.0)
            eps = tl.load(explore + e * A + a, mask=a < A, other=0.0)
            x += std * eps * tl.load(control + 2).to(tl.float32)
            # where no score is finite, the policy's mean action
            at = root + e * (_ROOTS * WIDTH) + _POLICY_ROOT * WIDTH + 2 * a
            mode = rollout._tanh(tl.load(at, mask=a < A, other=0.0))
            tl.store(out + e * (A + 1) + a, _in_range(tl.where(finite, x, mode)), mask=a < A)
            if tl.program_id(2) == 0:
                tl.store(out + e * (A + 1) + A, tl.where(finite, 0.0, 1.0))
    else:
        tl.debug_barrier()  # the elites have been read
        drawn = samples - num_policy
        for first in range(0, drawn, LINES):
            s = first + tl.arange(0, LINES)
            mask = (s < drawn)[:, None] & (a < A)[None, :]
            eps = tl.load(sample_noise + (line * drawn + s)[:, None] * A + a[None, :], mask=mask,
                          other=0.0)
            x = centre[None, :] + std[None, :] * eps
            tl.store(here + (num_policy + s)[:, None] * A + a[None, :],
                     tl.minimum(tl.maximum(x, -1.0), 1.0), mask=mask)


class TritonPlan:
    """See `iqmpc.kernels.mppi_plan`. Weights are on a CUDA device, observations anywhere.

    Both scores rank alike in the same draws and this backend computes the advantage form for both.

    On a GPU the constructor makes one plan on observations of zeros, which compiles, tunes and
    takes the time of both schedules of the rollout, the faster of which is kept (`schedule` names
    one instead). With `config.capture` the plan then becomes one CUDA graph; a captured plan and
    one that is not launch the same kernels on the same memory. `publish` rewrites the weights that
    a graph reads, itself as a graph from the second time on that it is given the same memory;
    `reset` the mean; seed, step and whether to explore are inputs, from which a
    plan's draws are computed on the device.
    """

    def __init__(
        self, weights: Weights, config: PlannerConfig, *, discount: float,
        entropy_coef: float = 0.0, problems: int = 1, seed: int = 0, schedule: str | None = None,
    ):
        capture = not INTERPRETED if config.capture is None else config.capture
        if capture and INTERPRETED:
            raise BackendError("Triton's interpreter captures no CUDA graph, got "
                               "planner.capture=true")
        device, expected = weights.encoder[0].weight.device, triton_launch.DEVICE
        if device.type != expected:
            raise ValueError(
                f"the triton backend takes weights on a {expected} device, got {device}")
        self.config, self.problems, self.step = config, problems, 0
        self.precision = config.precision or ("float32" if INTERPRETED else "bf16")
        self.weights = w = TritonWeights(weights, precision=self.precision)
        self.device, self.iterations = w.device, config.iterations_for(w.action_dim)
        self._discount, self._seed = float(discount), seed
        self._allocate()
        self.schedule = schedule
        self._graph: torch.cuda.CUDAGraph | None = None
        self._refresh: CapturedStep | None = None
        self._published: Weights | None = None
        if device.type == "cpu":
            self.schedule = schedule or rollout.resolve_schedule(self._sample_launches[0])
        else:
            # Of another priority: torch's streams come from a pool of each, and two of one may be
            # the same, on which the branch would wait for its trunk.
            self._side = torch.cuda.Stream(self.device, priority=-1)
            self._prepare(capture)

    @torch.no_grad()
    def __call__(self, obs: Tensor, *, explore: bool = False) -> Plan:
        """obs [E, O], or uint8 images [E, 3C, 64, 64] -> the plan; `explore` adds std_0 ε to its
        action."""
        self._host_control.numpy()[:] = _signed(self._seed), _signed(self.step), explore
        self.step += 1
        with torch.cuda.device_of(self.mean):
            if obs.device.type == "cpu":  # one transfer to the device, ...
                self._host_obs.copy_(obs)
                self._inputs.copy_(self._host_inputs, non_blocking=True)
            else:
                self._obs.copy_(obs)
                self._control.copy_(self._host_control, non_blocking=True)
            if self._graph is None:
                self._plan()
            else:
                self._graph.replay()
            self._host_out.copy_(self._out, non_blocking=True)  # ... and one back
            if self._out.is_cuda:
                torch.cuda.current_stream().synchronize()
        marked = self._host_out.clone()
        iterations = self.iterations if self.config.enabled else 0
        return Plan(marked[:, :-1], int(marked[:, -1].sum()), iterations)

    def publish(self, weights: Weights) -> None:
        if self._refresh is None:
            self.weights.refresh(weights)
            return
        # A learner publishes the same memory again and again: some hundred launches become one.
        with torch.cuda.device_of(self.mean):
            self._refresh(lambda: self.weights.refresh(weights), tensors_key(weights))
        self._published = weights  # the graph reads its memory

    def reset(self, problem: int | None = None) -> None:
        self.mean[slice(None) if problem is None else problem] = 0

    def draws(self) -> PlanNoise:
        """What the last plan drew, as the reference's `compute` takes it.

        `actions` [E, H, S, A] and `returns` [E, S] are of its last iteration, the policy's first.
        """
        n = self._noise
        return PlanNoise(
            policy_noise=n["policy_noise"], policy_score_noise=n["policy_score_noise"],
            sample_noise=torch.stack(n["sample_noise"]), score_noise=torch.stack(n["score_noise"]),
            root=torch.zeros_like(n["explore"]), explore=n["explore"] * self._control[2],
            gumbel=-torch.log(-torch.log(self._uniform)), pair=self._pair)

    def _allocate(self) -> None:
        """The memory of a plan: a graph reads and writes it again and again."""
        c, w, problems, device = self.config, self.weights, self.problems, self.device
        action_dim, horizon, num_policy = w.action_dim, c.horizon, c.policy_trajectories
        drawn, steps = c.samples - num_policy, horizon - 1
        shapes = dict(policy_noise=(problems, horizon, num_policy, action_dim),
                      explore=(problems, action_dim),
                      policy_score_noise=(problems, steps, num_policy, action_dim))
        each = dict(sample_noise=(problems, horizon, drawn, action_dim),
                    score_noise=(problems, steps, drawn, action_dim))
        # 16 bytes each, for wide loads
        sizes = {name: -(-torch.Size(shape).numel() // 4) * 4
                 for name, shape in (shapes | each).items()}
        total = sum(sizes[name] * (self.iterations if name in each else 1) for name in sizes)
        largest = max(total, problems * horizon * c.samples * action_dim)
        if largest >= COUNTED:
            raise ValueError(
                f"a plan for {problems} problems at once needs {largest} random numbers or "
                f"actions, and the triton backend counts to {COUNTED - 1}: plan for fewer")
        self._normal = torch.empty(total, device=device)
        parts = iter(self._normal.split(
            [sizes[name] for name in shapes]
            + [sizes[name] for name in each for _ in range(self.iterations)]))

        def take(shape: tuple[int, ...]) -> Tensor:
            return next(parts)[:torch.Size(shape).numel()].view(shape)

        self._noise = {name: take(shape) for name, shape in shapes.items()}
        self._noise |= {name: [take(shape) for _ in range(self.iterations)]
                        for name, shape in each.items()}
        self._uniform = torch.empty(problems, c.elites, device=device)
        self._pair = torch.zeros(2, dtype=torch.int64, device=device)
        self._root = rollout.new_root(w, problems)
        self.actions = torch.empty(problems, horizon, c.samples, action_dim, device=device)
        self.returns = torch.empty(problems, c.samples, device=device)
        self.mean = torch.zeros(problems, horizon, action_dim, device=device)
        self._out = torch.zeros(problems, action_dim + 1, device=device)
        self._host_out = _on_host(self._out)
        # Seed, step and whether to explore, [3] int64, and the observations in one piece.
        shape = (problems, *w.obs_shape)
        dtype = torch.uint8 if len(w.obs_shape) > 1 else torch.float32
        size = torch.Size(shape).numel() * dtype.itemsize
        self._inputs = torch.zeros(32 + size, dtype=torch.uint8, device=device)
        self._host_inputs = _on_host(self._inputs)
        (self._control, self._obs), (self._host_control, self._host_obs) = (
            (x[:24].view(torch.int64), x[32:].view(dtype).view(shape))
            for x in (self._inputs, self._host_inputs))

        def launch(first: int, last: int, score_noise: Tensor, policy_noise: Tensor | None = None
                   ) -> rollout.Launch:
            return rollout.Launch(
                w, self.actions[:, :, first:last], score_noise, self._pair, self._discount,
                self.returns[:, first:last], self._root, c.samples, policy_noise)

        self._sample_launches = [
            launch(num_policy, c.samples, noise) for noise in self._noise["score_noise"]]
        self._policy_launch = launch(
            0, num_policy, self._noise["policy_score_noise"], self._noise["policy_noise"])

    def _prepare(self, capture: bool) -> None:
        with torch.no_grad(), torch.cuda.device(self.device):
            if self.schedule is None and self.config.enabled:
                self._draw()
                rollout.start(self._sample_launches[0], self._obs)
                self._begin()
                self.schedule = rollout.resolve_schedule(self._sample_launches[0])
            self._plan()
            self.mean.zero_()
            if capture:
                self._graph, _ = captured(self._plan, torch.cuda.Stream(self.device))
                self._refresh = CapturedStep(self.device, warm_ups=1)

    def _plan(self) -> None:
        """One plan, from the inputs on the device to the action: launches, and nothing else but
        torch's own of an encoder that is not packed."""
        c, n = self.config, self._noise
        self._draw()
        rollout.start(self._sample_launches[0], self._obs, imagine=c.enabled)
        if not c.enabled:
            w = self.weights
            _act_kernel[(self.problems,)](
                self._control, self._root, n["explore"], self._out, w.log_std_min,
                w.log_std_max, A=w.action_dim, WIDTH=w.width, BLOCK=power_of_two(w.action_dim),
                **LAUNCH)
            return
        self._begin()
        # The policy's trajectories need no iteration, and the first iteration none of them.
        beside = c.policy_trajectories > 0 and self.device.type == "cuda"
        if beside:
            self._side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._side):
                rollout.score_trajectories(self._policy_launch)
        elif c.policy_trajectories:
            rollout.score_trajectories(self._policy_launch)
        for i, launch in enumerate(self._sample_launches):
            if c.samples > c.policy_trajectories:
                rollout.score_samples(launch, self.schedule)
            if beside and i == 0:
                torch.cuda.current_stream().wait_stream(self._side)
            if i + 1 < self.iterations:
                self._improve(i)
        self._choose()

    def _draw(self) -> None:
        count, uniforms = self._normal.numel() // 4, self._uniform.numel()
        grid = (triton.cdiv(count, _BLOCK) + triton.cdiv(uniforms, _BLOCK),)
        critics = self.weights.num_critics
        _draw_kernel[grid](
            self._control, self._normal, self._uniform, self._pair, count, uniforms, critics,
            CRITICS=power_of_two(critics), BLOCK=_BLOCK, **LAUNCH)

    def _begin(self) -> None:
        c, w, n = self.config, self.weights, self._noise
        total = self.actions.numel()
        _begin_kernel[(triton.cdiv(total, _BLOCK),)](
            self._root, self.mean, n["policy_noise"], n["sample_noise"][0], self.actions, total,
            c.horizon, c.samples, c.policy_trajectories, c.std_max, w.log_std_min, w.log_std_max,
            A=w.action_dim, WIDTH=w.width, BLOCK=_BLOCK, **LAUNCH)

    def _improve(self, iteration: int) -> None:
        self._refit(self._noise["sample_noise"][iteration + 1], choose=False)

    def _choose(self) -> None:
        self._refit(self._noise["sample_noise"][0], choose=True)  # which it does not read

    def _refit(self, sample_noise: Tensor, *, choose: bool) -> None:
        c, w = self.config, self.weights
        elites = power_of_two(c.elites)
        # Narrow where few programs would have to draw all samples, as wide as serves otherwise.
        narrow = 8 if self.problems <= 4 else 32
        block = min(power_of_two(w.action_dim), narrow, max(1, HELD // elites))
        grid = (self.problems, c.horizon, triton.cdiv(w.action_dim, block))
        _improve_kernel[grid](
            self._control, self._root, self.actions, self.returns, sample_noise, self._uniform,
            self._noise["explore"], self.mean, self._out, c.horizon, c.samples,
            c.policy_trajectories, c.elites, c.temperature, c.std_min, c.std_max, CHOOSE=choose,
            A=w.action_dim, WIDTH=w.width, SAMPLES=power_of_two(c.samples), ELITES=elites,
            BLOCK_A=block, LINES=max(1, 2048 // block), num_warps=8, **LAUNCH)


def tensors_key(weights: Weights) -> tuple[tuple[int, torch.dtype], ...]:
    """Where a model's tensors lie: what a graph that reads them depends on."""
    return tuple((t.data_ptr(), t.dtype) for t in weights.tensors())


def _on_host(tensor: Tensor) -> Tensor:
    """Memory for a transfer from or to the device."""
    return torch.zeros(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)


def _signed(value: int) -> int:
    """A 64-bit integer with the bits of `value`."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value
