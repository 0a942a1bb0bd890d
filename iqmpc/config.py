"""The settings of a run: frozen dataclasses, the only schema.

Hydra fills them at the command line's edge (`iqmpc.composition`); nothing below sees Hydra.
`Config.from_dict` is strict: an unknown key or a value of the wrong type is a `ConfigError`
that names the key, the nearest valid one and what was expected.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import math
import re
import reprlib
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from operator import attrgetter
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from iqmpc.errors import ConfigError

MOST_THREADS = 1024
_MOST = 2**31 - 1  # of anything that is counted


def gym_task_name(env_id: str) -> str:
    """The name of suite `gym`'s task: HalfCheetah-v4 is gym-halfcheetah-v4.

    Of `package:Cart-v0` the package, which is only imported for it, does not count.
    """
    if re.search(r"-v\d+$", env_id):
        env_id = env_id.rpartition(":")[2]
    return re.sub(r"[^a-z0-9]+", "-", f"gym-{env_id}".lower())


def names_task(given: str, task: str) -> bool:
    """Whether demonstrations of `given` are for `task`; a gym task may go by its env id."""
    return task in (given, gym_task_name(given))


@dataclass(frozen=True)
class TaskConfig:
    """Which environment, and how it is stepped.

    name: the task; of suite `gym` it is named after `env_id` unless it is given
    suite: dmcontrol, myosuite, maniskill, gym, or a name of one's own
    episode_length: control steps of an episode, after `action_repeat`
    action_repeat: steps of the simulator for one action
    gradient_penalty: what the task asks for by default (manipulation does, locomotion does not)
    env_id: the gymnasium id or `module:function` of suite `gym`
    transition_noise: probability that a step acts with a uniform action instead of the agent's
    terminates: whether episodes can end in terminal states (a fall), not only by their length
    obs: `pixels` observes three stacked 64 × 64 frames
    obs_keys: members of a dictionary of observations, such as `qpos,agent/qvel`, in this order
        (null: all of them, sorted)
    fast_render: draw frames without shadows and multisampling: faster, and other pixels
    """

    name: str = "walker-walk"
    suite: str = "dmcontrol"
    episode_length: int = 500
    action_repeat: int = 2
    gradient_penalty: bool = False
    env_id: str | None = None
    transition_noise: float = 0.0
    terminates: bool = False
    obs: Literal["state", "pixels"] = "state"
    obs_keys: str | None = None
    fast_render: bool = False

    def __post_init__(self) -> None:
        _at_least("task", self, 1, "episode_length", "action_repeat")
        _in_range("task", self, 0.0, 1.0, "transition_noise")
        if self.suite == "gym" and self.name == "gym" and self.env_id is not None:
            object.__setattr__(self, "name", gym_task_name(self.env_id))  # frozen for others


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the world model; the defaults are the paper's (4.3M parameters).

    encoder_dim: width of the encoder's hidden layer
    hidden_dim: width of all other hidden layers
    latent_dim: features of a latent, a multiple of `simnorm_dim`
    simnorm_dim: latent features that a softmax of SimNorm is over
    critics: critics in the ensemble, of which pairs are drawn
    dropout: share of features that the critics' first layer drops
    log_std_min: least log σ of the policy prior
    log_std_max: greatest log σ of the policy prior
    termination: a head that recognises terminal latents, which planning then gives no future
        (null: where the task has `terminates`)
    normalise_obs: `demos` scales flat observations by the demonstrations' mean and std, `auto` too,
        where there are demonstrations and numbers
    """

    encoder_dim: int = 256
    hidden_dim: int = 512
    latent_dim: int = 512
    simnorm_dim: int = 8
    critics: int = 5
    dropout: float = 0.01
    log_std_min: float = -10.0
    log_std_max: float = 2.0
    termination: bool | None = None
    normalise_obs: Literal["off", "demos", "auto"] = "off"

    def __post_init__(self) -> None:
        _at_least("model", self, 1, "encoder_dim", "hidden_dim", "latent_dim", "simnorm_dim")
        _at_least("model", self, 2, "critics")
        _in_range("model", self, 0.0, 0.99, "dropout")
        if self.latent_dim % self.simnorm_dim:
            raise ConfigError(
                f"model.latent_dim must be a multiple of model.simnorm_dim, got {self.latent_dim} "
                f"and {self.simnorm_dim}"
            )
        if self.log_std_min >= self.log_std_max:
            raise ConfigError(
                f"model.log_std_min must be below model.log_std_max, got {self.log_std_min} and "
                f"{self.log_std_max}"
            )


@dataclass(frozen=True)
class PlannerConfig:
    """MPPI over latents.

    Each of `mode`, `capture`, `threads`, `budget_us` and `precision` is an error beside a backend
    that makes nothing of it, and `auto` takes none of those.

    enabled: false acts with the policy prior alone, in training and evaluation
    horizon: steps of an imagined trajectory
    samples: trajectories of an iteration, those of the policy included
    elites: best trajectories, to which mean and std are refitted
    policy_trajectories: trajectories of the policy prior among the samples
    iterations: rounds of scoring and refitting (null: 6, or 8 when the task has 20 actions or more)
    temperature: η of the elites' weights exp(η (G − max G))
    std_min: least std of the sampled actions
    std_max: greatest std of the sampled actions, and the first
    score: the telescoped form (`advantage`) or the soft return as written (`unrolled`)
    backend: what computes a plan; auto takes the fastest that fits
    precision: of matrix products; `bf16` needs the cpu or the triton backend, `tf32` (float32 cut
        to three decimal digits) the triton backend, `float64` the reference (null: bf16 of the
        triton backend on a GPU, else float32)
    mode: the reference's: `compile` puts it under torch.compile
    capture: the triton backend's: a plan is one CUDA graph (null: yes)
    threads: the cpu backend's: threads of a plan (null: as many as torch uses)
    budget_us: the cpu backend's: microseconds a plan may take (null: as long as it takes)
    """

    enabled: bool = True
    horizon: int = 3
    samples: int = 512
    elites: int = 64
    policy_trajectories: int = 24
    iterations: int | None = None
    temperature: float = 0.5
    std_min: float = 0.05
    std_max: float = 2.0
    score: Literal["advantage", "unrolled"] = "advantage"
    backend: Literal["auto", "reference", "cpu", "triton"] = "auto"
    precision: Literal["float32", "bf16", "tf32", "float64"] | None = None
    mode: Literal["eager", "compile"] = "eager"
    capture: bool | None = None
    threads: int | None = None
    budget_us: float | None = None

    def iterations_for(self, action_dim: int) -> int:
        """`iterations`, or the paper's 6 (8 when the task has 20 actions or more)."""
        return self.iterations or (8 if action_dim >= 20 else 6)

    def __post_init__(self) -> None:
        _at_least("planner", self, 1, "horizon", "samples", "elites")
        _at_least("planner", self, 0, "policy_trajectories")
        if self.iterations is not None:
            _at_least("planner", self, 1, "iterations")
        if self.threads is not None:
            _in_range("planner", self, 1, MOST_THREADS, "threads")
        if self.budget_us is not None:
            _positive("planner", self, "budget_us")
        _positive("planner", self, "temperature", "std_min")
        for key, limit in (
            ("elites", "samples"),
            ("policy_trajectories", "samples"),
            ("std_min", "std_max"),
        ):
            if getattr(self, key) > getattr(self, limit):
                raise ConfigError(
                    f"planner.{key} must be at most planner.{limit}, got {getattr(self, key)} and "
                    f"{getattr(self, limit)}"
                )


@dataclass(frozen=True)
class LearnerConfig:
    """The losses and the optimiser. Symbols as in the paper.

    objective: `iq` (inverse soft-Q, initial-state form), `v_diff` (the original form with the value
        difference on behaviour) or `td` (regression on the environment's reward)
    batch: slices drawn of each replay for an update
    horizon: H, steps of a slice
    rho: λ, by which each further step of a slice counts less
    discount: γ (null: from the episode length)
    alpha: α; the smaller, the more large implied rewards are penalised
    beta: β, weight of the entropy
    entropy_scale: β·A (`action_dim`) or β (`one`)
    entropy: form of log π: `exact`, the squashed Gaussian's density, or `presquash`, in which the
        squashing counts 1/A of the rest (the released code's: `iqmpc.kernels.layers.policy_sample`)
    dropout: where `model.dropout` acts: where critics are regressed (`regression`), or in V, V̄, the
        policy's loss and the gradient penalty too (`always`, as in the released code)
    c_cons: weight of the consistency loss
    c_iq: weight of the critics' loss
    c_gp: weight of the gradient penalty
    c_bc: weight of the prior's squared error on demonstrated actions, times 1 + |their mean Q|
    c_termination: weight of the termination head's loss
    termination_weight: how many times a terminal latent counts in the termination head's loss
    gradient_penalty: whether there is one (null: as the task says)
    lr: learning rate
    encoder_lr_scale: the encoder's learning rate as a share of `lr`
    grad_clip: greatest norm of a gradient
    tau: τ, by which the target critics move at each update
    mode: `fused` (one call of the C++ library: on a CPU, of flat observations), `compile`
        (torch.compile), `eager` (plain torch) or `graph` (one CUDA graph); `auto` is `fused` or
        `graph` where they can be, else `compile`
    precision: of the fused update's matrix products
    matmul: the other updates' matrix products: `float32`, `tf32` (on a GPU) or `bf16` (null: tf32
        on a GPU, else float32)
    """

    objective: Literal["iq", "v_diff", "td"] = "iq"
    batch: int = 256
    horizon: int = 3
    rho: float = 0.5
    discount: float | None = None
    alpha: float = 0.5
    beta: float = 1e-4
    entropy_scale: Literal["action_dim", "one"] = "action_dim"
    entropy: Literal["exact", "presquash"] = "exact"
    dropout: Literal["regression", "always"] = "regression"
    c_cons: float = 20.0
    c_iq: float = 0.1
    c_gp: float = 1.0
    c_bc: float = 0.0
    c_termination: float = 1.0
    termination_weight: float = 10.0
    gradient_penalty: bool | None = None
    lr: float = 3e-4
    encoder_lr_scale: float = 0.3
    grad_clip: float = 20.0
    tau: float = 0.01
    mode: Literal["auto", "fused", "compile", "eager", "graph"] = "auto"
    precision: Literal["float32", "bf16"] = "float32"
    matmul: Literal["float32", "tf32", "bf16"] | None = None

    def __post_init__(self) -> None:
        _at_least("learner", self, 1, "batch", "horizon")
        _positive("learner", self, "alpha", "lr", "grad_clip", "termination_weight")
        _at_least(
            "learner",
            self,
            0,
            "beta",
            "c_cons",
            "c_iq",
            "c_gp",
            "c_bc",
            "c_termination",
            "encoder_lr_scale",
        )
        _in_range("learner", self, 0.0, 1.0, "rho", "tau")
        if self.discount is not None:
            _in_range("learner", self, 0.0, 1.0, "discount")


@dataclass(frozen=True)
class AgentConfig:
    """Which method learns and acts, and with which weights.

    name: `iq_mpc`, or a baseline (docs/baselines.md), to which `model` and `planner` mean nothing
    average: which weights act: the live ones (`off`), or an exponential average of all of the world
        model's in `evaluation` (of a run and of whoever loads it) or `always` (in training too)
    average_rate: share of its distance to the live weights that the average moves at each update
    hidden_dim: a baseline's width of both hidden layers of each network
    temperature: a baseline's weight of the entropy (null: 0.01 for `iql_sac`, else learnt so that
        the entropy is -A)
    """

    name: Literal["iq_mpc", "bc", "iql_sac", "sqil", "gail", "hype", "hyper", "cfil_sac"] = "iq_mpc"
    average: Literal["off", "evaluation", "always"] = "off"
    average_rate: float = 0.005
    hidden_dim: int = 256
    temperature: float | None = None

    def __post_init__(self) -> None:
        _at_least("agent", self, 1, "hidden_dim")
        if self.temperature is not None:
            _positive("agent", self, "temperature")
        _positive("agent", self, "average_rate")
        _in_range("agent", self, 0.0, 1.0, "average_rate")


@dataclass(frozen=True)
class TrainConfig:
    """How long a run is and how it is spent. All counts are control steps of the environment.

    steps: length of the run, over all environments
    num_envs: environments stepped together, their actions planned in one call
    env_workers: each environment in a process of its own (null: where there are several)
    env_restarts: how often workers that fail are replaced, over all of them
    env_timeout_s: seconds after which a worker without an answer is replaced (two minutes more to
        start)
    random_steps: steps with random actions first (null: max(1000, 5 episodes))
    initial_updates: updates after the random steps (null: as many as those)
    demo_updates: updates before any interaction, with demonstrations on both sides
    updates_per_step: updates for the step of each environment; 0.25 is one for every fourth step
    capacity: steps that the replay of behaviour holds
    loggers: of `tensorboard`, `csv` (metrics.csv, written whether it is named or not) and `wandb`
    log_every: steps between rows of metrics, with the mean return since the last (null: a row for
        each episode)
    video_every: steps between videos of an evaluation's first episode, the last one's too (null:
        none)
    eval_every: steps between evaluations
    eval_episodes: episodes of an evaluation on the way
    final_episodes: episodes of the last evaluation
    checkpoint_every: steps between checkpoints
    keep: newest checkpoints that stay; the agent of the best evaluation stays beside them
    stop_at: end at the first evaluation with this share of the demonstrator's return
    overlap: `async` makes a step's updates beside the next step, `sync` the same ones one after the
        other, `off` before the next step (null: async on a GPU, else off; `Trainer`)
    updates_at: `episode_end` makes an episode's updates when it has ended, while the robot is put
        back
    control_hz: for an environment that does not wait, a robot at that rate: acting then never waits
        for learning (`iqmpc.realtime`), updates are made beside it as the time allows, and without
        an `eval_env` of its own nothing is evaluated
    """

    steps: int = 100_000
    num_envs: int = 1
    env_workers: bool | None = None
    env_restarts: int = 10
    env_timeout_s: float = 120.0
    random_steps: int | None = None
    initial_updates: int | None = None
    demo_updates: int = 0
    updates_per_step: int | float = 1
    capacity: int = 1_000_000
    loggers: tuple[Literal["tensorboard", "csv", "wandb"], ...] = ("tensorboard", "csv")
    log_every: int | None = None
    video_every: int | None = None
    eval_every: int = 10_000
    eval_episodes: int = 3
    final_episodes: int = 10
    checkpoint_every: int = 10_000
    keep: int = 2
    stop_at: float | None = None
    overlap: Literal["off", "sync", "async"] | None = None
    updates_at: Literal["step", "episode_end"] = "step"
    control_hz: float | None = None

    def __post_init__(self) -> None:
        _at_least(
            "train",
            self,
            1,
            "steps",
            "num_envs",
            "capacity",
            "eval_every",
            "eval_episodes",
            "final_episodes",
            "checkpoint_every",
            "keep",
        )
        _at_least("train", self, 0, "demo_updates", "env_restarts")
        _positive("train", self, "env_timeout_s", "updates_per_step")
        if self.stop_at is not None:
            _positive("train", self, "stop_at")
        if self.control_hz is not None:
            _positive("train", self, "control_hz")
            for key, usual in (("overlap", None), ("updates_at", "step"), ("env_workers", None)):
                given = getattr(self, key)
                if given != usual and given is not False:
                    raise ConfigError(
                        f"train.{key} must be left alone with train.control_hz, which says when "
                        f"updates are made and steps in this process, got {given}"
                    )
            if self.log_every is not None:
                raise ConfigError(
                    "train.log_every must be left alone with train.control_hz: rows are written "
                    f"between episodes, got {self.log_every}"
                )
        for key, least in (
            ("random_steps", 0),
            ("initial_updates", 0),
            ("log_every", 1),
            ("video_every", 1),
        ):
            if getattr(self, key) is not None:
                _at_least("train", self, least, key)

    @functools.cached_property
    def update_rate(self) -> Fraction:
        """`updates_per_step` as it is written: 0.1 is a tenth, not the float nearest to that."""
        return Fraction(str(self.updates_per_step))

    @property
    def workers(self) -> bool:
        """Whether each environment gets a process of its own, where functions make them."""
        if self.env_workers is None:
            return self.num_envs > 1 and self.control_hz is None
        return self.env_workers


@dataclass(frozen=True)
class DemosConfig:
    """Where the demonstrations are.

    path: a file (null: the packaged set of the task)
    episodes: how many of its episodes are used (null: all)
    add: further files, separated by commas, whose episodes come to those; also in a run that goes
        on
    """

    path: str | None = None
    episodes: int | None = None
    add: str | None = None

    def __post_init__(self) -> None:
        if self.episodes is not None:
            _at_least("demos", self, 1, "episodes")


@dataclass(frozen=True)
class InitConfig:
    """What a new run starts from in place of random weights; its agent acts from the first step.

    path: a run folder, an agent's file or `packaged:TASK`, of the same sizes (null: random weights)
    checkpoint: which of the run's: `newest`, `best` or a number of steps
    replay: take over the run's replay of behaviour too
    """

    path: str | None = None
    checkpoint: str = "newest"
    replay: bool = False

    def __post_init__(self) -> None:
        if self.path is None and (self.replay or self.checkpoint != "newest"):
            raise ConfigError("init.checkpoint and init.replay need a run to start from, init=RUN")


@dataclass(frozen=True)
class Config:
    """Everything that defines a run; written to the run folder as `config.yaml`.

    seed: of everything random
    device: what learns and plans
    threads: of planning and updates (null: one for each core)
    run_dir: the run folder (null: a new one under `runs/`)
    preset: which preset `compose` started from; sets nothing by itself
    """

    task: TaskConfig = field(default_factory=TaskConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    planner: PlannerConfig = field(default_factory=PlannerConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    agent: AgentConfig = field(default_factory=AgentConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    demos: DemosConfig = field(default_factory=DemosConfig)
    init: InitConfig = field(default_factory=InitConfig)
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = None
    run_dir: str | None = None
    preset: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed must lie in [0, 2**32), got {shortened(self.seed)}")
        if self.threads is not None and not 1 <= self.threads <= MOST_THREADS:
            raise ConfigError(
                f"threads must lie in [1, {MOST_THREADS}], got {shortened(self.threads)}"
            )
        length = self.task.episode_length
        if self.learner.horizon > length:
            raise ConfigError(
                f"learner.horizon must be at most task.episode_length, got {self.learner.horizon} "
                f"and {length}"
            )
        if self.train.capacity <= length:
            raise ConfigError(
                f"train.capacity must be above task.episode_length, got {self.train.capacity} and "
                f"{length}"
            )
        if self.learner.objective == "td":
            for key, given in (
                ("train.demo_updates", self.train.demo_updates),
                ("demos.add", self.demos.add is not None),
                (f"learner.c_bc={self.learner.c_bc:g}", self.learner.c_bc),
                ("model.normalise_obs=demos", self.model.normalise_obs == "demos"),
            ):
                if given:
                    raise ConfigError(
                        f"{key} needs demonstrations, which learner.objective=td does not use"
                    )
        if self.is_baseline:
            self._check_baseline()

    def _check_baseline(self) -> None:
        """`ConfigError` for what is asked for and only `agent.name=iq_mpc` has."""
        for key, allowed in (
            ("task.obs", ("state",)),
            ("learner.objective", ("iq", "v_diff")),
            ("learner.mode", ("auto", "eager")),
            ("learner.precision", ("float32",)),
            ("learner.matmul", (None, "float32")),
            ("learner.c_bc", (0.0,)),
            ("agent.average", ("off",)),
            ("train.control_hz", (None,)),
            ("init.path", (None,)),
        ):
            given = attrgetter(key)(self)
            if given not in allowed:
                raise ConfigError(
                    f"agent.name={self.agent.name} has no {key}={given} (agent.name=iq_mpc has)"
                )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """Build from nested mappings; raises `ConfigError` for unknown or ill-typed keys."""
        return _build(cls, values, "")

    @classmethod
    def restored(cls, values: Mapping[str, Any]) -> Config:
        """The settings that a run folder holds, of this version or an earlier one.

        The only place that knows what settings meant before. Before 0.2 a backend left unsaid what
        it made nothing of: `planner.mode=compile`, which the preset `cpu` gave every run, beside
        another backend than the reference, and `planner.threads` beside another than cpu.
        Raises `ConfigError` as `from_dict` does.
        """
        planner = values.get("planner") if isinstance(values, Mapping) else None
        if isinstance(planner, Mapping):
            backend = planner.get("backend", "auto")
            dead = {"mode"} if backend != "reference" else set()
            dead |= {"threads"} if backend in ("reference", "triton") else set()
            values = {**values, "planner": {k: v for k, v in planner.items() if k not in dead}}
        return cls.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionaries and lists, as `from_dict` takes them and files hold them."""

        def plain(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            return {k: list(v) if isinstance(v, tuple) else v for k, v in pairs}

        return dataclasses.asdict(self, dict_factory=plain)

    def replace(self, changes: Mapping[str, Any]) -> Config:
        """A copy with dotted keys changed, checked as in `from_dict`."""
        values = self.to_dict()
        for key, value in changes.items():
            _check_key(key)
            *sections, last = key.split(".")
            node = values
            for section in sections:
                node = node[section]
            node[last] = value
        return Config.from_dict(values)

    @property
    def is_baseline(self) -> bool:
        """Whether another method than IQ-MPC learns and acts."""
        return self.agent.name != "iq_mpc"

    @property
    def discount(self) -> float:
        """γ = clip((L/5 − 1)/(L/5), 0.95, 0.995), L the episode length in control steps."""
        if self.learner.discount is not None:
            return self.learner.discount
        fraction = self.task.episode_length / 5
        return min(max((fraction - 1) / fraction, 0.95), 0.995)

    @property
    def random_steps(self) -> int:
        if self.train.random_steps is not None:
            return self.train.random_steps
        return max(1000, 5 * self.task.episode_length)

    @property
    def initial_updates(self) -> int:
        if self.train.initial_updates is not None:
            return self.train.initial_updates
        return self.random_steps

    def entropy_coefficient(self, action_dim: int) -> float:
        """β·A or β, as `learner.entropy_scale` says."""
        scale = action_dim if self.learner.entropy_scale == "action_dim" else 1
        return self.learner.beta * scale

    @property
    def gradient_penalty(self) -> bool:
        if self.learner.gradient_penalty is not None:
            return self.learner.gradient_penalty
        return self.task.gradient_penalty

    @property
    def termination(self) -> bool:
        """Whether the world model has a termination head."""
        if self.model.termination is not None:
            return self.model.termination
        return self.task.terminates


# Besides train.*: where things lie, how the same numbers are computed, and a name.
_CHANGEABLE = {
    "threads",
    "device",
    "run_dir",
    "demos.path",
    "demos.add",
    "learner.mode",
    "learner.precision",
    "learner.matmul",
    "planner.backend",
    "planner.precision",
    "planner.mode",
    "planner.capture",
    "planner.threads",
    "preset",
}


def may_change(key: str) -> bool:
    """Whether a dotted key may be another when a run is resumed."""
    return key in _CHANGEABLE or (key.startswith("train.") and key != "train.num_envs")


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(dotted key, "key is NEW, was OLD") of settings that are in both, as `to_dict` gives them."""
    found = []
    for key in old.keys() & new.keys():
        if isinstance(old[key], Mapping) and isinstance(new[key], Mapping):
            found += [
                (f"{key}.{k}", f"{key}.{text}") for k, text in differences(old[key], new[key])
            ]
        elif old[key] != new[key]:
            found.append((key, f"{key} is {new[key]!r}, was {old[key]!r}"))
    return sorted(found)


def _check_key(key: str) -> None:
    """Raise `ConfigError`, with the nearest, where a dotted key such as `learner.batch` is none."""
    node: Any = Config
    done: list[str] = []
    for part in key.split("."):
        hints = get_type_hints(node) if dataclasses.is_dataclass(node) else {}
        if part not in hints:
            raise ConfigError(_unknown(key, ".".join(done), part, node))
        node = hints[part]
        done.append(part)


def all_keys(cls: Any = Config, prefix: str = "") -> list[str]:
    """Every dotted key of the schema."""
    keys = []
    for name, hint in get_type_hints(cls).items():
        path = f"{prefix}{name}"
        keys += all_keys(hint, path + ".") if dataclasses.is_dataclass(hint) else [path]
    return keys


def meanings(cls: Any = Config, prefix: str = "") -> dict[str, str]:
    """What every dotted key of the schema means: a line `key: meaning` of its class's docstring."""
    entries = re.findall(r"^(\w+): (.*(?:\n    .*)*)", inspect.getdoc(cls) or "", re.MULTILINE)
    said = {key: " ".join(text.split()) for key, text in entries}
    found = {}
    for name, hint in get_type_hints(cls).items():
        nested = dataclasses.is_dataclass(hint)
        path = f"{prefix}{name}"
        found |= meanings(hint, path + ".") if nested else {path: said.get(name, "")}
    return found


def text_keys(cls: Any = Config, prefix: str = "") -> list[str]:
    """Every dotted key whose value is free text, or null."""
    hints = {f"{prefix}{name}": hint for name, hint in get_type_hints(cls).items()}
    keys = [key for key, hint in hints.items() if hint is str or str in get_args(hint)]
    for key, hint in hints.items():
        keys += text_keys(hint, key + ".") if dataclasses.is_dataclass(hint) else []
    return keys


_SHORTENED = reprlib.Repr()
_SHORTENED.maxstring = _SHORTENED.maxother = _SHORTENED.maxlong = 80


def shortened(value: Any) -> str:
    """What a value is, in at most a line."""
    return _SHORTENED.repr(value)


def _unknown(key: str, parent: str, part: str, node: Any) -> str:
    near = difflib.get_close_matches(key, all_keys(), n=1, cutoff=0.5)
    if not near:  # a key given without its section, such as `batch` for `learner.batch`
        near = [k for k in all_keys() if k.split(".")[-1] == key.split(".")[-1]][:1]
    hint = f"; did you mean {near[0]!r}?" if near else ""
    where = f" in {parent!r}" if parent else ""
    names = ", ".join(get_type_hints(node)) if dataclasses.is_dataclass(node) else "nothing"
    return f"unknown setting {shortened(key)}{hint} (known{where}: {names})"


def _build(cls: type, values: Any, path: str) -> Any:
    if not isinstance(values, Mapping):
        raise ConfigError(
            f"{path or 'the configuration'} must be a mapping, got {shortened(values)}"
        )
    hints = get_type_hints(cls)
    kwargs = {}
    for key, value in values.items():
        full = f"{path}.{key}" if path else str(key)
        if not isinstance(key, str) or key not in hints:
            raise ConfigError(_unknown(full, path, str(key), cls))
        kwargs[key] = _convert(hints[key], value, full)
    return cls(**kwargs)


def _convert(hint: Any, value: Any, path: str) -> Any:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _build(hint, value, path)
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        inner = [h for h in get_args(hint) if h is not type(None)]
        if inner == [int, float]:  # a number, kept as it is written
            whole = isinstance(value, int) and not isinstance(value, bool)
            return _convert(int if whole else float, value, path)
        return None if value is None else _convert(inner[0], value, path)
    if origin is tuple:
        (inner, _) = get_args(hint)
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{path} must be a list, such as [a,b], got {shortened(value)}")
        return tuple(_convert(inner, v, f"{path}[{i}]") for i, v in enumerate(value))
    if origin is Literal:
        choices = get_args(hint)
        if isinstance(value, str) and value in choices:
            return value
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint_text = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"{path} must be one of {', '.join(choices)}, got {shortened(value)}{hint_text}"
        )
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            value = float(value)
        except OverflowError:
            value = math.inf
    if hint is float and isinstance(value, str):  # YAML reads 3e-4 as a string
        try:
            value = float(value)
        except ValueError:
            pass
    if hint is int and isinstance(value, float) and value.is_integer():  # 1e5 steps
        value = int(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(
            f"{path} must be {hint.__name__}, got {shortened(value)} ({type(value).__name__})"
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{path} must be finite, got {value!r}")
    return value


def _at_least(section: str, config: Any, least: int, *keys: str) -> None:
    for key in keys:
        value = getattr(config, key)
        if value < least:
            raise ConfigError(f"{section}.{key} must be at least {least}, got {shortened(value)}")
        if isinstance(value, int) and value > _MOST:
            raise ConfigError(f"{section}.{key} must be at most {_MOST}, got {shortened(value)}")


def _positive(section: str, config: Any, *keys: str) -> None:
    for key in keys:
        if not getattr(config, key) > 0:
            raise ConfigError(
                f"{section}.{key} must be positive, got {shortened(getattr(config, key))}"
            )


def _in_range(section: str, config: Any, low: float, high: float, *keys: str) -> None:
    for key in keys:
        value = getattr(config, key)
        if not low <= value <= high:
            raise ConfigError(
                f"{section}.{key} must lie in [{low:g}, {high:g}], got {shortened(value)}"
            )
