"""The loop that coordinates environments, planner, replay and learner."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch

from iqmpc.agent import resolve_device
from iqmpc.callbacks import Callback
from iqmpc.compiler import check_compiler
from iqmpc.config import Config, shortened
from iqmpc.demos import Demonstrations
from iqmpc.envs.batched import Worlds
from iqmpc.envs.description import describe
from iqmpc.envs.training import Environment, training_envs
from iqmpc.episode import Episode
from iqmpc.errors import CheckpointError, ConfigError, TaskError
from iqmpc.evaluation import Evaluation, evaluate, no_evaluation, ratio
from iqmpc.expert_data import add_demonstrations, demonstrations_for, expert_replay
from iqmpc.initial import start_from
from iqmpc.interrupts import Interrupts
from iqmpc.methods import agent_class, learner_class
from iqmpc.provenance import commit, machine
from iqmpc.realtime import RealTimeUpdates
from iqmpc.replay import SliceReplay
from iqmpc.reporting import Reporter
from iqmpc.run_folder import RunFolder
from iqmpc.run_state import RunState, Snapshot
from iqmpc.runlog import last_evaluations
from iqmpc.seeding import stream_seed
from iqmpc.threads import leave_torch_idle, prepare_torch, share_threads, threads
from iqmpc.trackers import check_loggers
from iqmpc.updates import Updates
from iqmpc.video import EvaluationVideos

_SHORT_ENOUGH = 10  # episodes, all too short to learn from, after which a run gives up


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

    `agent.name` says by which method (`iqmpc.methods`): the trainer is the same for all.

    What is not given follows from `config`, as on the command line: environments of `config.task`,
    the demonstrations of `config.demos` or those packaged with the task, and for `run` the folder
    `config.run_dir`, or a new one under `runs/`. `config.threads` sets the process.

    `env` is any `gymnasium.Env` with flat Box observations, or images as `iqmpc.observation` says,
    and actions in [-1, 1], or a sequence of `config.train.num_envs` of them with the same spaces.
    They are stepped together, one tick after another, and their actions planned in one call; a
    simulator that steps all of its worlds at once takes their place (`iqmpc.envs.batched.Worlds`,
    a `gymnasium.vector.VectorEnv` among others), with an `eval_env` of its own. In
    place of environments, functions that make them may be given: then `config.train.env_workers`
    can put each into a process of its own (`iqmpc.envs.workers`). Evaluation takes `eval_env`, in
    this process; where that is absent it is `env` itself, if that is one environment, or is made by
    the first function. `run` is the folder that receives config, metrics and checkpoints; a folder
    that holds a run already is refused unless `resume` continues it. `on_progress(values)` is
    called now and then with the current figures (`return` is the last episode's),
    `on_message(text)` with events in words. While steps wait for something long, `values` has its
    `phase`: its name (`demo updates`, `initial updates`, `updates` that were missing,
    `evaluation`), how much of it is done, and of how much. `callbacks` are told of every step,
    episode, evaluation and checkpoint, and may end the run (`iqmpc.callbacks.Callback`).

    Evaluations and checkpoints come after ticks at which an episode ended. A checkpoint holds no
    unfinished episode: where other environments were inside theirs, a resumed run has lost those
    steps (they stay counted) and goes on with every environment reset, by seeds not used before.
    With one environment, or with episodes that end together, nothing is lost and the continuation
    is exact.

    With `train.control_hz` the environment does not wait (`iqmpc.realtime`), so that no run is like
    another. `idle_action(obs [N, O]) -> action [N, A]` acts in place of random actions while there
    is no agent yet: in the random steps, and until the initial updates have been made beside them.

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
        env: Environment | Sequence[Environment] | Worlds | None = None,
        demonstrations: Demonstrations | None = None,
        *,
        run: str | Path | None = None,
        eval_env: gymnasium.Env | None = None,
        idle_action: Callable[[np.ndarray], np.ndarray] | None = None,
        resume: bool = False,
        on_progress: Callable[[dict[str, Any]], None] | None = None,
        on_message: Callable[[str], None] | None = None,
        callbacks: Sequence[Callback] = (),
    ):
        for callback in callbacks:
            if not isinstance(callback, Callback):
                raise ConfigError(
                    "callbacks must be instances of iqmpc.callbacks.Callback, got "
                    f"{shortened(callback)}"
                )
        self.config = config
        self._callbacks = tuple(callbacks)
        self._ending = False  # before train.steps
        self._reporter = Reporter(config, self._counters, on_progress, on_message)
        run = run or config.run_dir
        self._named = run is not None
        self.folder = RunFolder.unused(config) if run is None else RunFolder(run)
        if self.folder.holds_run and not resume:
            raise self._taken()
        self.device = resolve_device(config.device)
        self._idle_action = idle_action
        check_loggers(config)
        prepare_torch(config)
        self.envs, like = training_envs(config, env, eval_env, self._reporter.message)
        self.eval_env = like if config.train.control_hz is None else eval_env
        self._interface = describe(like, config.task)
        self._videos = EvaluationVideos(config.train.video_every, self._reporter.message)
        try:
            self._videos.check(self.eval_env)
            self._make_parts(demonstrations)
            self._interrupts = Interrupts(self._interrupted)
            self._resumed = resume
            if not (resume and self._go_on()):
                self._begin()
        except BaseException:
            self.envs.close()
            raise

    def _make_parts(self, demonstrations: Demonstrations | None) -> None:
        """What learns, acts, remembers and counts, as at the beginning of a run."""
        config, device = self.config, self.device
        spec, action_dim, count = self.envs.observation_spec, self.envs.action_dim, len(self.envs)
        if demonstrations is None:
            if config.demos.path is not None:
                self._reporter.message(f"reading {config.demos.path}")
            demonstrations = demonstrations_for(config, spec, action_dim)
        self.demonstrator_return = None if demonstrations is None else demonstrations.return_mean
        self.experts = (
            expert_replay(demonstrations, config, spec, action_dim, device)
            if demonstrations and config.learner.objective != "td"
            else None
        )
        acting = config if config.train.control_hz is None else share_threads(config)
        # Of the random actions, and later of the batches.
        self.generator = torch.Generator(device).manual_seed(stream_seed(config.seed, "trainer"))
        scaling = None if self.experts is None else self.experts.scaling
        self.learner = learner = learner_class(config)(
            spec, action_dim, config, device, sampler=self.generator, scaling=scaling
        )
        check_compiler(config, device, learner.mode)
        agent = agent_class(config)
        self.agent = agent(
            learner.model,
            acting,
            seed=config.seed,
            num_envs=count,
            weights=learner.acting_weights(),
        )
        # Evaluation plans for one environment; a single agent does both (and is compiled once),
        # but not beside a learner that publishes what acts.
        both = count == 1 and config.train.control_hz is None
        self._evaluator = (
            self.agent
            if both
            else agent(
                learner.model, acting, seed=config.seed, weights=learner.evaluation_weights()
            )
        )
        if learner.mode == "fused" and self.agent.planner.leaves_torch_idle:
            leave_torch_idle()
        self.behaviour = SliceReplay(
            spec,
            action_dim,
            horizon=config.learner.horizon,
            capacity=config.train.capacity,
            device=device,
            scaling=scaling,
        )
        updates = Updates if config.train.control_hz is None else RealTimeUpdates
        self.updates = updates(
            config,
            self.learner,
            self.agent,
            self.behaviour,
            self.experts,
            self._reporter,
            device=device,
        )
        self._state = RunState(
            self.folder,
            config,
            self.learner,
            self.agent.planner,
            self.behaviour,
            self.experts,
            self.generator,
            on_message=self._reporter.message,
        )
        self.env_steps = self.episodes = 0
        self._wall_before, self._started = 0.0, time.monotonic()
        self._evaluated_at = self._saved_at = 0
        self._best: tuple[float, float] | None = None  # the best evaluation's score
        self._short = 0  # episodes of fewer steps than the horizon, since this process began
        self._whole: Snapshot | None = None  # at the last tick at which an episode ended

    @property
    def run(self) -> Path:
        """The run folder."""
        return self.folder.path

    @property
    def wall_s(self) -> float:
        """Seconds of training, those before a continuation included."""
        return self._wall_before + time.monotonic() - self._started

    def claim_folder(self) -> Path:
        """The run folder, which this process has made now where none was named."""
        if not self._named:
            self.folder.path = RunFolder.unused(self.config, claim=True).path
            self._named = True
        return self.run

    def train(self) -> dict[str, Any]:
        """Train to `config.train.steps`, evaluate, write summary.json and return it."""
        self._commit = commit()  # now: the files may change while this runs
        self.claim_folder().mkdir(parents=True, exist_ok=True)
        with self.folder.locked():
            self._begin_folder()
            try:
                with self._interrupts, self.updates:
                    self._train()
                    return self._finish()
            except BaseException:
                self._rescue()
                raise
            finally:
                self._reporter.close()
                self.envs.close()

    def _train(self) -> None:
        c = self.config.train
        self.updates.on_demonstrations_alone()
        self._ending = False
        while self.env_steps < c.steps and not self._ending:
            ended = self._tick()
            # Before a signal is looked at, which would lose this episode; but one that has cut its
            # updates short is made again.
            if ended and self.updates.complete(self.env_steps):
                self._whole = self._snapshot()
            self._interrupts.check()
            for episode in ended:
                self._tell("on_episode", episode)
            if ended and self.env_steps < c.steps and not self._ending:
                due = self.env_steps - self._evaluated_at >= c.eval_every
                if due and self.eval_env is not None:
                    self._stop_if_enough(self._evaluate(c.eval_episodes))
                    self._whole = self._snapshot()
                if self.env_steps - self._saved_at >= c.checkpoint_every:
                    self._tell("on_checkpoint", self._save())
        self._reporter.flush()
        self.updates.finish()
        if self._saved_at != self.env_steps:
            self._whole = self._snapshot()
            self._tell("on_checkpoint", self._save())

    def _tick(self) -> list[Episode]:
        """One control step of every environment, and learning. The episodes that ended."""
        left = self.config.train.steps - self.env_steps
        self.updates.begin(self.env_steps)
        for index in self.envs.start():
            self.agent.reset(index)
        opened = self.envs.open
        actions = self._act(self.envs.observations)[:left]  # the last tick may have too many
        with self.updates.beside_step(), self._reporter.timing.measure("env"):
            ended = self.envs.step(actions)
        self.env_steps += len(actions)
        self.updates.keep(self.envs, opened, ended)
        self._tell("on_step", [e for e in opened[: len(actions)] if e is not None])
        if len(actions) == left or self._ending:
            opened, cut = self.envs.open, self.envs.cut()
            self.updates.keep(self.envs, opened, cut)
            ended += cut
        self._count_short(ended)
        self.updates.catch_up(self.env_steps, len(self.envs), ended=bool(ended))
        if self.config.train.control_hz is None and self._reporter.is_due(
            self.env_steps, len(actions)
        ):
            self._reporter.progress()
        for episode in ended:
            self.episodes += 1
            self._reporter.episode(episode.undiscounted_return)
        self._reporter.tick(self.env_steps, len(actions), ended=bool(ended))
        return ended

    def _tell(self, event: str, about: object) -> None:
        """Tell every callback, and end the run where one asks for it."""
        for callback in self._callbacks:
            if getattr(callback, event)(self, about) and not self._ending:
                self._ending = True
                name = f"{type(callback).__name__}.{event}"
                self._reporter.message(f"step {self.env_steps}: {name} ends the run")

    def _act(self, obs: np.ndarray) -> np.ndarray:
        """obs [N, ...] -> action [N, A]."""
        if self.updates.ready(self.env_steps):
            with self._reporter.timing.measure("plan"):
                return self.agent.act(obs, explore=True)
        if self._idle_action is not None:
            return np.asarray(self._idle_action(obs), np.float32)
        shape = len(obs), self.envs.action_dim
        uniform = torch.rand(shape, generator=self.generator, device=self.device)
        return (2 * uniform - 1).cpu().numpy()

    def _count_short(self, ended: Sequence[Episode]) -> None:
        """Say of episodes shorter than the horizon that the replay leaves them out, or give up."""
        horizon = self.config.learner.horizon
        short = [len(e.actions) for e in ended if len(e.actions) < horizon]
        if not short:
            return
        if not self._short:
            self._reporter.message(
                f"warning: an episode of {short[0]} steps is shorter than learner.horizon="
                f"{horizon}: nothing is learnt from such (said once)"
            )
        self._short += len(short)
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

    def _evaluate(self, episodes: int, *, last: bool = False) -> Evaluation:
        """Without exploration, and without a trace in the state of training."""
        reporter, step, env = self._reporter, self.env_steps, self.eval_env
        assert env is not None  # there is one, or nothing is evaluated
        at = self._counters()
        reporter.progress(("evaluation", 0, episodes))
        self._videos.begin(self.folder.video(step), after=self._evaluated_at, step=step, last=last)
        with self.updates.paused():
            self._evaluator.publish(self.learner.evaluation_weights())
            weights = self._state.weights()
        with self._evaluator.planner.untraced() as counted:
            result = evaluate(
                self._evaluator,
                _Watched(env, self._interrupts.check),
                episodes=episodes,
                seed=self.config.seed,
                progress=lambda done, _: reporter.progress(("evaluation", done, episodes)),
                on_step=self._videos.on_step,
            )
        with self.updates.paused():
            self.agent.publish(self.learner.acting_weights())  # the evaluator may be this agent
        self.agent.planner.count(counted)
        self._evaluated_at = step
        reporter.write(
            {
                **at,
                "eval_return_mean": result.return_mean,
                "eval_return_std": result.return_std,
                "eval_success_rate": result.success_rate,
                "nonfinite_plans": self.agent.planner.nonfinite_plans,
            }
        )
        video = self._videos.finish()
        if video is not None:
            reporter.video(step, video)
        share = ratio(result.return_mean, self.demonstrator_return)
        beside = (
            ""
            if self.demonstrator_return is None
            else f" (the demonstrator's is {self.demonstrator_return:.1f})"
            if share is None
            else f" ({100 * share:.0f} % of the demonstrator's {self.demonstrator_return:.0f})"
        )
        reporter.message(f"step {step}: return {result.return_mean:.1f}{beside}")
        if self._best is None or result.score > self._best:
            self._best = result.score
            figures = result.summary(self.demonstrator_return)
            self._state.save_best(weights, {**at, **figures, "evaluated_at": step})
        self._tell("on_evaluation", result)
        return result

    def _stop_if_enough(self, result: Evaluation) -> None:
        """End the run where `train.stop_at` is reached, and say so."""
        share = ratio(result.return_mean, self.demonstrator_return)
        wanted = self.config.train.stop_at
        if wanted is None or share is None or share < wanted:
            return
        self._reporter.message(f"ending here: train.stop_at={wanted:g} is reached")
        self._ending = True

    def _finish(self) -> dict[str, Any]:
        trained_s, episodes = self.wall_s, self.config.train.final_episodes
        figures = no_evaluation(self.demonstrator_return)
        if self.eval_env is not None:
            self._reporter.message(f"evaluating {episodes} episodes")
            figures = self._evaluate(episodes, last=True).summary(self.demonstrator_return)
        summary = {
            "task": self.config.task.name,
            "seed": self.config.seed,
            "env_steps": self.env_steps,
            "updates": self.learner.updates,
            "skipped_updates": self.learner.skipped_updates,
            "wall_s": round(trained_s, 1),
            "checkpoint": self.folder.step_path(self._saved_at).name,
            **figures,
            **last_evaluations(self.folder, before=self.env_steps),
            **self.agent.planner.summary(),
            **self.updates.summary(),
            "env_restarts": self.envs.restarts,
            "threads": threads(),
            "machine": machine(self.device),
            "commit": self._commit,
        }
        self.folder.save_summary(summary)
        if self._short:
            self._reporter.message(
                f"warning: {self._short} episodes were shorter than learner.horizon="
                f"{self.config.learner.horizon}, and nothing was learnt from them"
            )
        return summary

    def _counters(self) -> dict[str, Any]:
        return {
            "env_steps": self.env_steps,
            "updates": self.learner.updates,
            "episodes": self.episodes,
            "wall_s": round(self.wall_s, 1),
        }

    def _begin_folder(self) -> None:
        """Claim the locked run folder, and write into it from now on."""
        if self._resumed:
            self._state.take_over()
        try:
            self.folder.save_config(self.config, new=not self._resumed)
        except FileExistsError:
            raise self._taken() from None
        self.folder.save_interface(self._interface)
        self.folder.summary.unlink(missing_ok=True)  # of what came before resuming
        since = self.env_steps if self._resumed else None
        self._reporter.open(self.folder, since=since, evaluated=self._evaluated_at)

    def _snapshot(self) -> Snapshot:
        with self.updates.paused():
            return self._state.capture(
                self.env_steps,
                {
                    **self._counters(),
                    "started": self.envs.started,
                    "env_restarts": self.envs.restarts,
                    "evaluated_at": self._evaluated_at,
                    "demonstrator_return": self.demonstrator_return,
                    "best": self._best,
                    "returns": self._reporter.returns,
                },
            )

    def _begin(self) -> None:
        """Start the run, from another's agent where `init` names one."""
        self._add_demonstrations()
        if self.config.init.path is not None:
            self._reporter.message(start_from(self.config, self.learner, self.behaviour))
            self.agent.publish(self.learner.acting_weights())

    def _add_demonstrations(self) -> None:
        if self.config.demos.add is None or self.experts is None:
            return
        count = add_demonstrations(self.experts, self.config, self.envs.action_dim)
        self._reporter.message(f"added {count} demonstrations of {self.config.demos.add}")

    def _go_on(self) -> bool:
        """Take over where the newest checkpoint has left off, if there is one."""
        meta = self._state.restore()
        if meta is None:
            return False
        if self.config.demos.add != meta.get("settings", {}).get("demos", {}).get("add"):
            self._add_demonstrations()  # the others are in the checkpoint
        self.agent.publish(self.learner.acting_weights())
        self.env_steps, self.episodes = meta["env_steps"], meta["episodes"]
        self.envs.started = meta.get("started", self.episodes)  # absent: of one environment
        self.envs.restarts = meta.get("env_restarts", 0)
        self._wall_before, self._evaluated_at = meta["wall_s"], meta["evaluated_at"]
        self._best = None if meta.get("best") is None else tuple(meta["best"])
        self._reporter.returns = meta.get("returns", [])
        self._saved_at = self.env_steps
        return True

    def _save(self) -> Path:
        with self.updates.paused():  # the snapshot's replay is the live one
            assert self._whole is not None
            if self._whole.overwritten != self.behaviour.overwritten:  # by a learner beside
                self._whole = self._snapshot()
            path = self._state.save(self._whole)
        self._saved_at = self._whole.step
        return path

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
            self._reporter.message(said)

    def _interrupted(self, name: str) -> None:
        """The first signal has come."""
        self.updates.stop()
        self._reporter.message(f"{name}: ending after this step (a second one ends at once)")

    def _taken(self) -> ConfigError:
        return ConfigError(
            f"{self.run} already holds a run: continue it with resume={self.run}, or give another "
            "run_dir"
        )
