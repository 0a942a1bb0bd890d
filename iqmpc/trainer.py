"""The loop that coordinates environments, planner, replay and learner."""

from __future__ import annotations

import contextlib
import functools
import math
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch

from iqmpc import checkpoint
from iqmpc.agent import Agent, prepare_torch, resolve_device
from iqmpc.compiler import check_compiler
from iqmpc.config import Config, differences, may_change, names_task
from iqmpc.demos import Demonstrations
from iqmpc.envs import description
from iqmpc.envs.vector import Recording, VectorEnv, check_alike
from iqmpc.envs.workers import WorkerVectorEnv
from iqmpc.errors import CheckpointError, ConfigError, TaskError
from iqmpc.evaluation import Evaluation, evaluate, ratio
from iqmpc.frames import is_image, unstacked
from iqmpc.interrupts import Interrupts
from iqmpc.learner import Learner
from iqmpc.provenance import commit, machine
from iqmpc.replay import SliceReplay
from iqmpc.runlog import RunLog, last_evaluations, write_summary
from iqmpc.seeding import stream_seed
from iqmpc.threads import threads

Environment = gymnasium.Env | Callable[[], gymnasium.Env]
_REPORT_EVERY = 25  # steps or updates between progress reports, and no more
_REPORT_EVERY_S = 2.0  # seconds; metrics are fetched no oftener than either

Metrics = tuple[tuple[str, ...], torch.Tensor]  # names and, on the learner's device, values
_SHORT_ENOUGH = 10  # episodes, all too short to learn from, after which a run gives up


class _State(NamedTuple):
    """What a checkpoint holds, as it was after an episode."""

    step: int
    tensors: dict[str, torch.Tensor]
    meta: dict[str, Any]
    overwritten: int  # of the replay, whose tensors are not copied


class _Watched(gymnasium.Wrapper):
    """Calls `check` before every step."""

    def __init__(self, env: gymnasium.Env, check: Callable[[], None]):
        super().__init__(env)
        self._check = check

    def step(self, action: np.ndarray) -> Any:
        self._check()
        return self.env.step(action)


class Trainer:
    """Trains an agent on environments from demonstrations (none for `objective: td`).

    `env` is any `gymnasium.Env` with flat Box observations, or images as `iqmpc.frames` says, and
    actions in [-1, 1], or a sequence of `config.train.num_envs` of them with the same spaces. They
    are stepped together, one tick after another, and their actions planned in one call. In place of
    environments, functions that make them may be given: then `config.train.env_workers` can put
    each into a process of its own (`iqmpc.envs.workers`). Evaluation takes `eval_env`, in this
    process; where that is absent it is `env` itself, if that is one environment, or is made by the
    first function. `run` is the folder that receives config, metrics and checkpoints; a folder that
    holds a run already is refused unless `resume` continues it. `on_progress(values)` is called now
    and then with the current figures (`return` is the last episode's), `on_message(text)` with
    events in words. While steps wait for something long, `values` has its `phase`: its name
    (`demo updates`, `initial updates`, `updates` that were missing, `evaluation`), how much of it
    is done, and of how much.

    Evaluations and checkpoints come after ticks at which an episode ended. A checkpoint holds no
    unfinished episode: where other environments were inside theirs, a resumed run has lost those
    steps (they stay counted) and goes on with every environment reset, by seeds not used before.
    With one environment, or with episodes that end together, nothing is lost and the continuation
    is exact.

    A tick is one step of every environment; `train.updates_per_step` updates are due for each of
    its steps, counted from the first: ⌊steps · 1/4⌋ in all, exactly, for one update on every fourth
    step. `train.overlap` says when they are made:

    - `off`: at the tick's end. The next plan acts on weights with every update that is due.
    - `async`: beside the next tick, on a thread (and CUDA stream) of the learner's own, while the
      planner acts on its snapshot, which is published at that tick's end. A plan lacks the updates
      of one tick at most. They are waited for at once where an episode ended and where more than
      a tick's are due (the initial ones), so that nothing is under way at an evaluation, at a
      checkpoint or at the end, and a continuation is as exact as with `off`.
    - `sync`: the schedule of `async`, one after the other on the caller's thread: the same run,
      bit for bit.

    An error in the learner's thread is raised by `train`.

    SIGINT, SIGTERM and SIGHUP (where nobody else handles them, in the main thread) end `train`
    after the tick under way by `Interrupted`, a `KeyboardInterrupt`; a second one at once. However
    `train` ends, what was learnt up to the last tick at which an episode ended is saved, and a
    continuation is as exact as from any checkpoint.

    Raises `TaskError`, `ConfigError`, `DemonstrationError` or `CheckpointError` for what does not
    fit, before anything is written; `train` raises `WorkerError` where workers fail too often,
    `TaskError` for what an environment must not give and where all episodes are shorter than
    `learner.horizon`, and `ConfigError` while another process trains in the folder.
    """

    def __init__(
        self,
        config: Config,
        env: Environment | Sequence[Environment],
        demonstrations: Demonstrations | None = None,
        *,
        run: str | Path,
        eval_env: gymnasium.Env | None = None,
        resume: bool = False,
        on_progress: Callable[[dict[str, Any]], None] | None = None,
        on_message: Callable[[str], None] | None = None,
    ):
        self.config, self.run = config, Path(run)
        self._on_progress = on_progress or (lambda values: None)
        self._on_message = on_message or (lambda text: None)
        self.envs, self.eval_env = _environments(config, env, eval_env, self._on_message)
        obs_shape, action_dim, count = self.envs.obs_shape, self.envs.action_dim, len(self.envs)
        self.device = resolve_device(config.device)
        prepare_torch(config)
        # Of the random actions, and later of the batches.
        self.generator = torch.Generator(self.device).manual_seed(
            stream_seed(config.seed, "trainer")
        )
        self.learner = Learner(obs_shape, action_dim, config, self.device, sampler=self.generator)
        check_compiler(config, self.device, self.learner.mode)
        self.agent = Agent(self.learner.model, config, seed=config.seed, num_envs=count)
        # Evaluation plans for one environment; a single agent does both (and is compiled once).
        self._evaluator = (
            self.agent if count == 1 else Agent(self.learner.model, config, seed=config.seed)
        )
        horizon = config.learner.horizon
        self.behaviour = SliceReplay(
            obs_shape,
            action_dim,
            horizon=horizon,
            capacity=config.train.capacity,
            device=self.device,
        )
        self.experts: SliceReplay | None = None
        self.demonstrator_return: float | None = None
        if demonstrations is not None:
            self.demonstrator_return = demonstrations.return_mean
        if config.learner.objective != "td":
            if demonstrations is None:
                raise ConfigError(
                    f"learner.objective={config.learner.objective} learns from demonstrations: "
                    "none were given"
                )
            self.experts = _expert_replay(
                demonstrations, config.task.name, obs_shape, action_dim, horizon, self.device
            )
        cuda = self.device.startswith("cuda")
        self.overlap = config.train.overlap or ("async" if cuda else "off")
        self._worker: ThreadPoolExecutor | None = None  # while training
        self._stream = torch.cuda.Stream(self.device) if cuda and self.overlap == "async" else None
        self._stop = threading.Event()  # ends updates that nobody waits for any more
        self.env_steps = self.episodes = 0
        self._short = 0  # episodes of fewer steps than the horizon, since this process began
        self._whole: _State | None = None  # at the last tick at which an episode ended
        self._interrupts = Interrupts(self._interrupted)
        self._resumed = self._learnt = False
        self._reported = 0.0  # when, on the monotonic clock
        self._restored: Path | None = None  # the checkpoint that is continued from
        self._unusable: list[Path] = []  # checkpoints newer than the one that is continued from
        self._wall_before, self._started = 0.0, time.monotonic()
        self._metrics: Metrics | None = None  # the last update's
        self._last_return: float | None = None
        self._warned = False  # of skipped updates
        self._evaluated_at = self._saved_at = 0
        if resume:
            self._restore()
        elif (self.run / "config.yaml").exists():
            raise self._taken()

    @property
    def wall_s(self) -> float:
        return self._wall_before + time.monotonic() - self._started

    def train(self) -> dict[str, Any]:
        """Train to `config.train.steps`, evaluate, write summary.json and return it."""
        self._commit = commit()  # now: the files may change while this runs
        self.run.mkdir(parents=True, exist_ok=True)
        with checkpoint.locked(self.run):
            return self._train()

    def _train(self) -> dict[str, Any]:
        c = self.config.train
        if self._resumed:
            self._take_over()
        try:
            checkpoint.save_config(self.run, self.config, new=not self._resumed)
        except FileExistsError:
            raise self._taken() from None
        description.save(self.run, description.describe(self.eval_env, self.config.task))
        (self.run / "summary.json").unlink(missing_ok=True)  # of what came before resuming
        since = self.env_steps if self._resumed else None
        self._log = RunLog(self.run, since=since, evaluated=self._evaluated_at)
        self._stop.clear()
        if self.overlap == "async":
            self._worker = ThreadPoolExecutor(1, "iqmpc-learner")
        try:
            with self._interrupts:
                if self.learner.updates == 0 and c.demo_updates:
                    self._wait_for_updates(
                        "demo updates", c.demo_updates, self.experts, "on the demonstrations alone"
                    )
                while self.env_steps < c.steps:
                    ended = self._tick()
                    self._interrupts.check()
                    if ended and self.env_steps < c.steps:
                        self._whole = self._state()
                        if self.env_steps - self._evaluated_at >= c.eval_every:
                            self._evaluate(c.eval_episodes)
                            self._whole = self._state()
                        if self.env_steps - self._saved_at >= c.checkpoint_every:
                            self._save()
                if self._saved_at != self.env_steps:
                    self._whole = self._state()
                    self._save()
                return self._finish()
        except BaseException:
            self._rescue()
            raise
        finally:
            self._stop.set()
            if self._worker is not None:
                self._worker.shutdown()
                self._worker = None
            self._log.close()
            self.envs.close()

    def _tick(self) -> bool:
        """One control step of every environment, and learning. Whether an episode ended."""
        left = self.config.train.steps - self.env_steps
        learning = None
        if self._due() > self.learner.updates:  # what the last tick left to be made beside this
            learning = self._start_updates(self._due(), self.behaviour)
        for index in self.envs.start():
            self.agent.reset(index)
        actions = self._act(self.envs.observations)[:left]  # the last tick may have too many
        ended = self.envs.step(actions)
        if learning is not None:
            self._join(learning)
        self.env_steps += len(actions)
        if len(actions) == left:
            ended += self.envs.cut()
        for episode in ended:
            self._keep(episode)
        self._learn(at_once=self.overlap == "off" or bool(ended))
        if self._report_is_due(self.env_steps, len(actions)):
            self._report()
        for episode in ended:
            self.episodes += 1
            self._last_return = float(np.sum(episode.rewards))
            self._log.write({**self._progress(), "return": self._last_return, **self._fetched()})
        if ended:
            self._metrics = None
        return bool(ended)

    def _keep(self, episode: Recording) -> None:
        """Put an episode into the replay, which leaves out what is shorter than the horizon."""
        obs = np.asarray(episode.observations)
        self.behaviour.add_episode(
            torch.as_tensor(unstacked(obs) if is_image(obs.shape[1:]) else obs),
            *(
                torch.as_tensor(np.asarray(x, np.float32))
                for x in (episode.actions, episode.rewards)
            ),
            terminated=episode.terminated,
        )
        steps, horizon = len(episode.actions), self.config.learner.horizon
        if steps >= horizon:
            return
        self._short += 1
        if self._short == 1:
            self._on_message(
                f"warning: an episode of {steps} steps is shorter than learner.horizon={horizon}: "
                "nothing is learnt from such (said once)"
            )
        if (
            self._short >= _SHORT_ENOUGH
            and not self.behaviour.slices
            and self.env_steps >= self.config.random_steps
        ):
            raise TaskError(
                f"{self.config.task.name}: all {self._short} episodes were shorter than "
                f"learner.horizon={horizon}, so nothing can be learnt from them; give a smaller "
                "learner.horizon, or an environment whose episodes are longer"
            )

    @property
    def _exploring_at_random(self) -> bool:
        """At first, and for as long as there is nothing to learn from."""
        return self.env_steps < self.config.random_steps or not self.behaviour.slices

    def _act(self, obs: np.ndarray) -> np.ndarray:
        """obs [N, ...] -> action [N, A]."""
        if self._exploring_at_random:
            uniform = torch.rand(
                len(obs), self.envs.action_dim, generator=self.generator, device=self.device
            )
            return (2 * uniform - 1).cpu().numpy()
        return self.agent.act(obs, explore=True)

    def _due(self) -> int:
        """Updates due by now: the initial ones, then `updates_per_step` for each step."""
        c = self.config
        if self._exploring_at_random:
            return 0
        since = self.env_steps - c.random_steps
        return c.train.demo_updates + c.initial_updates + math.floor(since * c.train.update_rate)

    def _learn(self, *, at_once: bool) -> None:
        """Make the updates that are due, or leave them to the next tick unless they are many."""
        missing = self._due() - self.learner.updates
        many = missing > math.ceil(len(self.envs) * self.config.train.update_rate)
        if many:
            first = self.learner.updates <= self.config.train.demo_updates
            self._wait_for_updates(
                "initial updates" if first else "updates",
                missing,
                self.behaviour,
                f"on the first {self.env_steps} steps",
            )
        elif missing > 0 and at_once:
            self._join(self._start_updates(self._due(), self.behaviour))

    def _wait_for_updates(self, name: str, count: int, behaviour: SliceReplay, on: str) -> None:
        """Make `count` updates while nothing else happens, and say so."""
        compiled = self.learner.mode in ("compile", "graph") and not self._learnt
        self._on_message(
            f"{count} {name} {on}" + (", compiled before the first: a minute" if compiled else "")
        )
        self._join(self._start_updates(self.learner.updates + count, behaviour, phase=name))

    def _start_updates(
        self, updates: int, behaviour: SliceReplay, *, phase: str | None = None
    ) -> Future[Metrics | None]:
        """Update until `updates` have been made in all, on the learner's thread if it has one.

        With a `phase` progress is reported, where the caller does nothing but wait.
        """
        if self._worker is None:
            done: Future[Metrics | None] = Future()
            done.set_result(self._update_to(updates, behaviour, phase))
            return done
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        return self._worker.submit(self._update_to, updates, behaviour, phase)

    def _join(self, learning: Future[Metrics | None]) -> None:
        """Wait for updates and publish the weights that act to the planner."""
        self._metrics = learning.result() or self._metrics
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)
        self.agent.publish(self.learner.acting_weights())

    def _update_to(self, updates: int, behaviour: SliceReplay, phase: str | None) -> Metrics | None:
        metrics, first = None, self.learner.updates
        stream = (
            contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
        )
        if phase is not None:
            self._report(phase=(phase, 0, updates - first))
        with stream:
            while self.learner.updates < updates and not self._stop.is_set():
                latest = self.learner.learn(self.experts, behaviour)
                self._learnt = True
                last = self.learner.updates == updates
                shown = phase is not None and (last or self._report_is_due(self.learner.updates, 1))
                if shown or last:  # a copy: the next update may overwrite them
                    metrics = tuple(latest), torch.stack(list(latest.values()))
                if shown:
                    self._metrics = metrics
                    self._report(phase=(phase, self.learner.updates - first, updates - first))
        return metrics

    def _fetched(self) -> dict[str, float]:
        """The last update's metrics, in one transfer from the device."""
        if self._metrics is None:
            return {}
        names, values = self._metrics
        fetched = dict(zip(names, values.tolist(), strict=True))
        if fetched["skipped_updates"] and not self._warned:
            self._warned = True
            warnings.warn(
                "an update had a loss or a gradient that is not finite and was left out (counted "
                "as skipped_updates, said once)",
                RuntimeWarning,
                stacklevel=2,
            )
        return fetched

    def _evaluate(self, episodes: int) -> Evaluation:
        """Without exploration, and without a trace in the state of training."""
        planner, at = self._evaluator.planner, self._progress()
        before = planner.state_dict()
        self._evaluator.publish(self.learner.evaluation_weights())
        planner.step = 0
        self._report(phase=("evaluation", 0, episodes))
        result = evaluate(
            self._evaluator,
            _Watched(self.eval_env, self._interrupts.check),
            episodes=episodes,
            seed=self.config.seed,
            progress=lambda done, _: self._report(phase=("evaluation", done, episodes)),
        )
        counted = {
            k: getattr(planner, k) - int(before[k])
            for k in ("nonfinite_plans", "missed_plans", "late_plans")
        }
        planner.load_state_dict(before)
        self.agent.publish(self.learner.acting_weights())  # the evaluator may be this agent
        for key, count in counted.items():
            setattr(self.agent.planner, key, getattr(self.agent.planner, key) + count)
        self._evaluated_at = self.env_steps
        self._log.write(
            {
                **at,
                "eval_return_mean": result.return_mean,
                "eval_return_std": result.return_std,
                "eval_success_rate": result.success_rate,
                "nonfinite_plans": self.agent.planner.nonfinite_plans,
            }
        )
        share = ratio(result.return_mean, self.demonstrator_return)
        beside = (
            ""
            if self.demonstrator_return is None
            else f" (the demonstrator's is {self.demonstrator_return:.1f})"
            if share is None
            else f" ({100 * share:.0f} % of the demonstrator's {self.demonstrator_return:.0f})"
        )
        self._on_message(f"step {self.env_steps}: return {result.return_mean:.1f}{beside}")
        return result

    def _finish(self) -> dict[str, Any]:
        trained_s = self.wall_s
        self._on_message(f"evaluating {self.config.train.final_episodes} episodes")
        result = self._evaluate(self.config.train.final_episodes)
        summary = {
            "task": self.config.task.name,
            "seed": self.config.seed,
            "env_steps": self.env_steps,
            "updates": self.learner.updates,
            "skipped_updates": self.learner.skipped_updates,
            "wall_s": round(trained_s, 1),
            "episodes": len(result.episodes),
            "return_mean": result.return_mean,
            "return_std": result.return_std,
            "success_rate": result.success_rate,
            "success_any_rate": result.success_any_rate,
            "demonstrator_return": self.demonstrator_return,
            "ratio": ratio(result.return_mean, self.demonstrator_return),
            **last_evaluations(self.run, before=self.env_steps),
            "backend": self.agent.planner.backend,
            "nonfinite_plans": self.agent.planner.nonfinite_plans,
            "missed_plans": self.agent.planner.missed_plans,
            "late_plans": self.agent.planner.late_plans,
            "env_restarts": self.envs.restarts,
            "threads": threads(),
            "machine": machine(self.device),
            "commit": self._commit,
        }
        write_summary(self.run, summary)
        if self._short:
            self._on_message(
                f"warning: {self._short} episodes were shorter than learner.horizon="
                f"{self.config.learner.horizon}, and nothing was learnt from them"
            )
        return summary

    def _progress(self) -> dict[str, Any]:
        return {
            "env_steps": self.env_steps,
            "updates": self.learner.updates,
            "episodes": self.episodes,
            "wall_s": round(self.wall_s, 1),
        }

    def _report_is_due(self, count: int, new: int) -> bool:
        """After so many steps or updates in all, of which `new` have just been made."""
        return count % _REPORT_EVERY < new or time.monotonic() - self._reported > _REPORT_EVERY_S

    def _report(self, phase: tuple[str, int, int] | None = None) -> None:
        self._reported = time.monotonic()
        self._on_progress(
            {
                **self._progress(),
                "return": self._last_return,
                **({} if phase is None else {"phase": phase}),
                **self._fetched(),
            }
        )

    def _state(self) -> _State:
        """What a continuation needs, as it is now, after a tick at which an episode ended.

        Copied, but for the replay, to which nothing is added before the next such tick.
        """
        tensors = {
            **{f"learner.{k}": v.clone() for k, v in self.learner.state_dict().items()},
            **{f"planner.{k}": v for k, v in self.agent.planner.state_dict().items()},
            **{f"behaviour.{k}": v for k, v in self.behaviour.state_dict().items()},
            "trainer.generator": self.generator.get_state(),
        }
        meta = {
            "obs_shape": self.learner.model.obs_shape,
            "action_dim": self.learner.model.action_dim,
            **self._progress(),
            "started": self.envs.started,
            "env_restarts": self.envs.restarts,
            "evaluated_at": self._evaluated_at,
            "demonstrator_return": self.demonstrator_return,
            "demonstrations": self._demonstrations_digest,
            "device": torch.device(self.device).type,
            "mode": self.learner.mode,
            "settings": self.config.to_dict(),
        }
        return _State(self.env_steps, tensors, meta, self.behaviour.overwritten)

    def _save(self) -> None:
        checkpoint.save(self.run, self._whole.step, self._whole.tensors, self._whole.meta)
        self._saved_at = self._whole.step

    def _rescue(self) -> None:
        """Save the last whole episode, while an exception ends the run."""
        whole = self._whole
        if (
            whole is None
            or whole.step == self._saved_at
            or whole.overwritten != self.behaviour.overwritten
        ):
            return
        said = f"saved as of step {whole.step}, the end of the last whole episode"
        try:
            self._save()
        except (OSError, CheckpointError) as error:
            said = f"step {whole.step} could not be saved: {error}"
        with contextlib.suppress(OSError):  # the terminal may be gone
            self._on_message(said)

    def _interrupted(self, name: str) -> None:
        """The first signal has come."""
        self._stop.set()
        self._on_message(f"{name}: ending after this step (a second one ends at once)")

    @functools.cached_property
    def _demonstrations_digest(self) -> str | None:
        """What a continuation must be given again, to be one."""
        return None if self.experts is None else checkpoint.digest(self.experts.state_dict())

    def _taken(self) -> ConfigError:
        return ConfigError(
            f"{self.run} already holds a run: continue it with resume={self.run}, or give another "
            "run_dir"
        )

    def _restore(self) -> None:
        found = checkpoint.load_config(self.run)  # refuses what is no run folder
        made = found.train.num_envs
        if made != len(self.envs):
            raise ConfigError(
                f"train.num_envs cannot change when a run is resumed: it is {made}, got "
                f"{len(self.envs)}"
            )
        self._resumed = True
        if not checkpoint.exists(self.run):
            self._on_message("the run has no checkpoint yet: starting from its beginning")
            return
        path, tensors, meta = checkpoint.newest(self.run)
        self._unusable = checkpoint.newer(self.run, path)
        checkpoint.check_settings(self.run, found, path, meta)
        self._check_changes(found, meta)
        if meta["demonstrations"] != self._demonstrations_digest:
            raise CheckpointError(
                f"{self.run} was trained on other demonstrations than those given now"
            )
        if meta["env_steps"] > self.config.train.steps:
            raise ConfigError(
                f"train.steps must be at least the {meta['env_steps']} that {path.name} has "
                f"made, got {self.config.train.steps}"
            )

        def part(name: str) -> dict[str, torch.Tensor]:
            prefix = name + "."
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        learner = part("learner")
        try:
            learner["generator"] = self._random_state(
                learner["generator"], self.learner.generator, "learner", meta
            )
            self.learner.load_state_dict(learner)
            self.agent.planner.load_state_dict(part("planner"))
            self.behaviour.load_state_dict(part("behaviour"))
            self.generator.set_state(
                self._random_state(tensors["trainer.generator"], self.generator, "trainer", meta)
            )
        except (KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{path} does not fit this run's settings: {error}") from error
        self.agent.publish(self.learner.acting_weights())
        self.env_steps, self.episodes = meta["env_steps"], meta["episodes"]
        self.envs.started = meta.get("started", self.episodes)  # absent: of one environment
        self.envs.restarts = meta.get("env_restarts", 0)
        self._wall_before, self._evaluated_at = meta["wall_s"], meta["evaluated_at"]
        self._saved_at = self.env_steps
        self._restored = path
        self._on_message(f"continuing from {path.name}")

    def _check_changes(self, found: Config, meta: dict[str, Any]) -> None:
        """`ConfigError` for settings other than those of the checkpoint that may not change."""
        settings = meta.get("settings", {})
        changed = [
            text
            for key, text in differences(settings, self.config.to_dict())
            if not may_change(key)
        ]
        if changed:
            raise ConfigError(
                "what a run learns cannot change when it is resumed: " + "; ".join(changed)
            )
        made = {"mode": meta.get("mode"), "precision": settings.get("learner", {}).get("precision")}
        now = {"mode": self.learner.mode, "precision": self.config.learner.precision}
        for key, old in made.items():
            if old not in (None, now[key]):
                self._on_message(
                    f"the run was made with learner.{key}={old} and goes on with "
                    f"{now[key]}: not bit for bit"
                )
        for key, text in differences(settings, found.to_dict()):
            if key.startswith("train."):
                self._on_message(f"config.yaml differs from the checkpoint's settings: {text}")

    def _random_state(
        self, state: torch.Tensor, generator: torch.Generator, stream: str, meta: dict[str, Any]
    ) -> torch.Tensor:
        """The generator's saved state, or a new one where another kind of device has made it."""
        device = torch.device(self.device).type
        if meta.get("device", device) == device:
            return state
        if stream == "learner":
            self._on_message(
                f"the run was made on {meta['device']} and goes on on {device}: not "
                "bit for bit, and with other random draws"
            )
        generator.manual_seed(stream_seed(self.config.seed, f"resumed {stream}", meta["env_steps"]))
        return generator.get_state()

    def _take_over(self) -> None:
        """Make the folder ready to be continued in, which nobody else does by now."""
        if self._restored is not None:
            newer = checkpoint.newer(self.run, self._restored)
            if set(newer) - set(self._unusable) or not self._restored.exists():
                raise ConfigError(
                    f"{self.run} was continued by another process since {self._restored.name} was "
                    "read: resume it again"
                )
            checkpoint.set_aside(newer)
        elif checkpoint.exists(self.run):
            raise ConfigError(f"{self.run} was continued by another process: resume it again")
        checkpoint.tidy(self.run)


def _environments(
    config: Config,
    env: Environment | Sequence[Environment],
    eval_env: gymnasium.Env | None,
    on_message: Callable[[str], None],
) -> tuple[VectorEnv, gymnasium.Env]:
    """Those to train in and the one to evaluate in."""
    given, count = list(env) if isinstance(env, Sequence) else [env], config.train.num_envs
    if len(given) != count:
        raise ConfigError(f"train.num_envs={count} needs {count} environments, got {len(given)}")
    made = [not callable(e) for e in given]
    if any(made):
        if not all(made) or config.train.env_workers:
            raise ConfigError(
                "train.env_workers=true needs functions that make the environments, got "
                f"{sum(made)} environments among {count}"
                if config.train.env_workers
                else f"{sum(made)} of {count} environments are made already: give environments or "
                "functions that make them, not both"
            )
        if count > 1 and (eval_env is None or any(eval_env is e for e in given)):
            raise ConfigError(
                f"train.num_envs={count} needs an eval_env of its own: an evaluation would cut the "
                "episodes that are being recorded"
            )
    elif config.train.workers:
        eval_env = eval_env or given[0]()
        t = config.train
        return WorkerVectorEnv(
            given,
            config.task.name,
            like=eval_env,
            seed=config.seed,
            max_restarts=t.env_restarts,
            timeout_s=t.env_timeout_s,
            episode_length=config.task.episode_length,
            on_message=on_message,
        ), eval_env
    else:
        eval_env = eval_env or (given[0]() if count > 1 else None)
        given = [make() for make in given]
    envs = VectorEnv(
        given,
        config.task.name,
        seed=config.seed,
        episode_length=config.task.episode_length,
        on_message=on_message,
    )
    if eval_env is None:
        return envs, given[0]
    check_alike(eval_env, given[0], f"{config.task.name}: eval_env", "environment 0")
    return envs, eval_env


def _expert_replay(
    demonstrations: Demonstrations,
    task: str,
    obs_shape: tuple[int, ...],
    action_dim: int,
    horizon: int,
    device: str,
) -> SliceReplay:
    if not names_task(demonstrations.task, task):
        raise ConfigError(
            f"the demonstrations are of task {demonstrations.task!r}, the run's is {task!r}: give "
            "task.name, or rename them (iqmpc demos convert --task)"
        )
    given = (demonstrations.obs_shape, demonstrations.action_dim)
    if given != (obs_shape, action_dim):
        raise ConfigError(
            f"the demonstrations of {demonstrations.task!r} have observations {list(given[0])} and "
            f"{given[1]} actions, the environment has {list(obs_shape)} and {action_dim}"
        )
    rows = sum(len(e.actions) + 1 for e in demonstrations.episodes)
    replay = SliceReplay(obs_shape, action_dim, horizon=horizon, capacity=rows, device=device)
    for e in demonstrations.episodes:
        replay.add_episode(
            torch.from_numpy(e.observations), torch.from_numpy(e.actions), terminated=e.terminated
        )
    if not replay.slices:
        raise ConfigError(f"no demonstration is as long as learner.horizon={horizon}")
    return replay
