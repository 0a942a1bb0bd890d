"""When a run's updates are made, and on which thread."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Literal

import torch

from iqmpc.agent import Agent
from iqmpc.config import Config
from iqmpc.envs.vector import VectorEnv
from iqmpc.episode import Episode, EpisodeBuffer
from iqmpc.errors import TaskError
from iqmpc.methods import MethodLearner
from iqmpc.replay import SliceReplay
from iqmpc.reporting import Metrics, Reporter

Overlap = Literal["off", "sync", "async"]


class Updates:
    """The updates of a run, counted from its first step; a context manager while it trains.

    `train.updates_per_step` updates are due for each step after the random ones, and
    `train.initial_updates` before the first of them. `overlap` is `train.overlap` or the device's
    default, with the meaning that `Trainer` states. After updates that were waited for, the weights
    that act are published to `agent`.
    """

    def __init__(
        self,
        config: Config,
        learner: MethodLearner,
        agent: Agent,
        behaviour: SliceReplay,
        experts: SliceReplay | None,
        reporter: Reporter,
        *,
        device: str,
    ):
        self._config, self._learner, self._agent = config, learner, agent
        self._behaviour, self._experts, self._reporter = behaviour, experts, reporter
        self._device = device
        cuda = device.startswith("cuda")
        self.overlap: Overlap = config.train.overlap or ("async" if cuda else "off")
        self._thread: ThreadPoolExecutor | None = None  # while training
        self._stream = torch.cuda.Stream(device) if cuda and self.overlap == "async" else None
        self._stopped = threading.Event()
        self._under_way: Future[Metrics | None] | None = None
        self._any = False  # whether this process has made one

    def __enter__(self) -> Updates:
        self._stopped.clear()
        if self.overlap == "async":
            self._thread = ThreadPoolExecutor(1, "iqmpc-learner")
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None

    def stop(self) -> None:
        """End a long phase of updates after the one that is being made."""
        self._stopped.set()

    def begun(self, env_steps: int) -> bool:
        """Whether the random steps are over and there is something to learn from."""
        return env_steps >= self._config.random_steps and bool(self._behaviour.slices)

    def ready(self, env_steps: int) -> bool:
        """Whether the agent acts, and nothing in its place."""
        return self._config.init.path is not None or self.begun(env_steps)

    def due(self, env_steps: int) -> int:
        """Updates due after `env_steps` steps, those on the demonstrations alone included."""
        c = self._config
        if not self.begun(env_steps):
            return 0
        since = env_steps - c.random_steps
        return c.train.demo_updates + c.initial_updates + math.floor(since * c.train.update_rate)

    def complete(self, env_steps: int) -> bool:
        """Whether all that are due have been made: not where a signal has cut them short."""
        return self._learner.updates >= self.due(env_steps)

    def on_demonstrations_alone(self) -> None:
        """Make `train.demo_updates` updates before anything else, where none was made yet."""
        count = self._config.train.demo_updates
        if count and not self._learner.updates:
            assert self._experts is not None  # the schema refuses demo_updates for `td`
            on = "on the demonstrations alone"
            self._wait_for("demo updates", count, self._experts, on)

    def begin(self, env_steps: int) -> None:
        """Start what was left to be made beside the step that comes."""
        at_end = self._config.train.updates_at == "episode_end"
        if self.due(env_steps) > self._learner.updates and not at_end:
            self._under_way = self._start(self.due(env_steps), self._behaviour)

    @contextlib.contextmanager
    def beside_step(self) -> Iterator[None]:
        """The step of the environments, after which what `begin` started is waited for."""
        yield
        if self._under_way is not None:
            under_way, self._under_way = self._under_way, None
            self._join(under_way)

    def keep(
        self,
        envs: VectorEnv,
        were: Sequence[EpisodeBuffer | None],
        ended: Sequence[Episode],
    ) -> None:
        """Put the episodes that `ended` into the replay, and what a person did in them to the
        demonstrations; `were` are those open before."""
        for episode in ended:
            self._behaviour.add(episode)
            self._learn_from_person(episode)

    def catch_up(self, env_steps: int, new: int, *, ended: bool) -> None:
        """Make the updates due after `new` more steps, or leave them to be made beside the next.

        They are made now with `overlap` off, where an episode has `ended` and where they are more
        than those of the new steps. With `train.updates_at=episode_end` they wait for an end.
        """
        train = self._config.train
        if train.updates_at == "episode_end" and not ended:
            return
        missing = self.due(env_steps) - self._learner.updates
        if missing > math.ceil(new * train.update_rate):
            first = self._learner.updates <= train.demo_updates
            name = "initial updates" if first else "updates"
            usual = not first and train.updates_at == "episode_end"
            on = None if usual else f"on the first {env_steps} steps"
            self._wait_for(name, missing, self._behaviour, on)
        elif missing > 0 and (ended or self.overlap == "off"):
            self._join(self._start(self.due(env_steps), self._behaviour))

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing is learnt within: here, as between any two ticks at which an episode ended."""
        yield

    def finish(self) -> None:
        """Learn no more: nothing is under way after the last step."""

    def summary(self) -> dict[str, Any]:
        """Figures of how the updates kept up with the steps: none, since steps wait for them."""
        return {}

    def _learn_from_person(self, episode: Episode) -> None:
        """Put the stretches in which a person acted to the demonstrations.

        Raises `TaskError` for images, of which a stretch alone lacks the frames before it.
        """
        if episode.corrected is None:
            return
        if episode.observation_spec.images:
            raise TaskError("info['intervene_action'] is for flat observations, got images")
        steps = int(episode.corrected.sum())
        if self._experts is None:
            self._reporter.message(
                f"a person acted in {steps} steps, which learner.objective=td learns as it does all"
            )
            return
        before = len(self._experts)
        for stretch in episode.corrections():
            self._experts.add(replace(stretch, rewards=None))
        learnt = len(self._experts) - before
        self._reporter.message(
            f"a person acted in {steps} steps, of which {learnt} are demonstrations now"
            + ("" if learnt == steps else f" (stretches of {self._config.learner.horizon} or more)")
        )

    def _wait_for(self, name: str, count: int, behaviour: SliceReplay, on: str | None) -> None:
        """Make `count` updates while nothing else happens, and say `on` what."""
        compiled = self._learner.mode in ("compile", "graph") and not self._any
        if on is not None:
            after = ", compiled before the first: a minute" if compiled else ""
            self._reporter.message(f"{count} {name} {on}{after}")
        self._join(self._start(self._learner.updates + count, behaviour, phase=name))

    def _start(
        self, updates: int, behaviour: SliceReplay, *, phase: str | None = None
    ) -> Future[Metrics | None]:
        """Update until `updates` have been made in all, on the learner's thread if it has one.

        With a `phase` progress is reported, where the caller does nothing but wait.
        """
        if self._thread is None:
            done: Future[Metrics | None] = Future()
            done.set_result(self._make(updates, behaviour, phase))
            return done
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        return self._thread.submit(self._make, updates, behaviour, phase)

    def _join(self, updates: Future[Metrics | None]) -> None:
        self._reporter.metrics = updates.result() or self._reporter.metrics
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        self._agent.publish(self._learner.acting_weights())

    def _make(self, updates: int, behaviour: SliceReplay, phase: str | None) -> Metrics | None:
        metrics, first, learner = None, self._learner.updates, self._learner
        stream = (
            contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
        )
        if phase is not None:
            self._reporter.progress(phase=(phase, 0, updates - first))
        with stream:
            # Those of one tick are few, and without them the tick's episode could not be saved.
            while learner.updates < updates and not (phase and self._stopped.is_set()):
                with self._reporter.timing.measure("update"):
                    latest = learner.learn(self._experts, behaviour)
                self._any = True
                last = learner.updates == updates
                due = last or self._reporter.is_due(learner.updates, 1)
                shown = phase if due else None
                if shown is not None or last:  # a copy: the next update may overwrite them
                    metrics = tuple(latest), torch.stack(list(latest.values()))
                if shown is not None:
                    self._reporter.metrics = metrics
                    self._reporter.progress((shown, learner.updates - first, updates - first))
        return metrics
