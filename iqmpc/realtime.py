"""Updates beside a robot that does not wait: `train.control_hz`."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from iqmpc.agent import Agent
from iqmpc.config import Config
from iqmpc.envs.vector import VectorEnv
from iqmpc.episode import Episode, EpisodeBuffer
from iqmpc.errors import ConfigError
from iqmpc.latency import LatencyHistogram
from iqmpc.methods import MethodLearner
from iqmpc.replay import SliceReplay
from iqmpc.reporting import Reporter
from iqmpc.updates import Updates

_PART = 25  # steps of an episode that goes on after which the learner gets them
_NICER = 10  # by how much the learner's thread gives way to the one that acts
# Python's own interval, 5 ms, is how long the thread that acts may wait for the learner's lines.
_SWITCH_S = 1e-4
_METRICS_EVERY = 25  # updates
_IDLE_S = 1.0  # after which the learner's thread says how far the run is, if it has nothing to do


class RealTimeUpdates(Updates):
    """Updates on a thread of their own, at most those due and never waited for by who acts.

    Steps reach the learner while their episode goes on, a part of 25 at a time, through a queue;
    the replay, the learner and the publishing of its weights belong to its thread alone, except
    while `paused`. An update that fails ends the run at the next tick.
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
        """Raises `ConfigError` for what cannot act and learn at the same time."""
        control_hz = config.train.control_hz
        assert control_hz is not None
        if learner.model.observation_spec.images:
            raise ConfigError("train.control_hz is for flat observations, got images")
        if agent.planner.backend != "cpu":
            raise ConfigError(
                "train.control_hz plans while it learns, which planner.backend=cpu does; these "
                f"settings come to {agent.planner.backend}"
            )
        super().__init__(config, learner, agent, behaviour, experts, reporter, device=device)
        self.ticks = LatencyHistogram(1 / control_hz)
        self.ages = LatencyHistogram()  # of the weights that act
        self._parts: deque[Episode] = deque()
        self._ended: deque[Episode] = deque()  # for what a person did in them
        self._taken: dict[int, int] = {}  # steps handed over, by the number of an open episode
        self._wake, self._free = threading.Event(), threading.Event()
        self._lock = threading.RLock()  # a checkpoint pauses for its snapshot within its own pause
        self._free.set()
        self._steps = 0
        self._stepped: float | None = None  # when the environments' last step had ended
        self._published = 0, time.monotonic()  # updates, when
        self._most_behind = 0  # updates
        self._first: tuple[int, float] | None = None  # updates and time at the first one made here
        self._error: BaseException | None = None
        self._learning: threading.Thread | None = None

    def __enter__(self) -> RealTimeUpdates:
        self._stopped.clear()
        gc.freeze()  # what is here stays: collections, in whichever thread, need not look at it
        self._switch_s = sys.getswitchinterval()
        sys.setswitchinterval(_SWITCH_S)
        self._learning = threading.Thread(target=self._run, name="iqmpc-learner", daemon=True)
        self._learning.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._wake.set()
        if self._learning is not None:
            self._learning.join()
        sys.setswitchinterval(self._switch_s)
        gc.unfreeze()

    def complete(self, env_steps: int) -> bool:
        """Always: a run without a tick that waits has no other order of things."""
        return True

    def on_demonstrations_alone(self) -> None:
        """Nothing here: they are the first that the learner's thread makes."""

    def begin(self, env_steps: int) -> None:
        """Raise what the learner's thread has met; note how old the weights are that act now."""
        if self._error is not None:
            raise self._error
        updates, when = self._published
        self.ages.add(time.monotonic() - when)
        self._most_behind = max(self._most_behind, self._learner.updates - updates)

    def ready(self, env_steps: int) -> bool:
        """Whether the initial updates have been made too, which acting does not wait for."""
        train, init = self._config.train, self._config.init
        first = train.demo_updates + self._config.initial_updates
        made = self.begun(env_steps) and self._learner.updates >= first
        return init.path is not None or made

    @contextlib.contextmanager
    def beside_step(self) -> Iterator[None]:
        """The step of the environments; what lay between the last one and it is a tick's time."""
        if self._stepped is not None:
            self.ticks.add(time.monotonic() - self._stepped)
        yield
        self._stepped = time.monotonic()

    def keep(
        self,
        envs: VectorEnv,
        were: Sequence[EpisodeBuffer | None],
        ended: Sequence[Episode],
    ) -> None:
        """Hand over what a tick has finished: `ended` episodes, and long parts of those that go on.

        Parts overlap by H-1 steps, so that no slice is lost and none is there twice.
        """
        overlap, finished = self._config.learner.horizon - 1, iter(ended)
        for was, now in zip(were, envs.open, strict=True):
            if was is None or not was.actions:
                continue
            episode = next(finished) if now is not was else None
            taken = self._taken.pop(was.number, 0)
            if episode is not None or len(was.actions) - taken >= _PART:
                terminated = episode is not None and episode.terminated
                part = was.part(max(0, taken - overlap), terminated=terminated)
                self._parts.append(part)
                taken = len(was.actions)
            if episode is None:
                self._taken[was.number] = taken
            else:
                self._ended.append(episode)

    def catch_up(self, env_steps: int, new: int, *, ended: bool) -> None:
        """Tell the learner's thread how many steps were made."""
        if ended:
            self._stepped = None  # a reset follows, which is no tick
        self._steps = env_steps
        self._wake.set()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Learner and replay stand still within; what was handed over is in the replay."""
        self._free.clear()
        try:
            with self._lock:
                self._take_parts()
                yield
        finally:
            self._free.set()
            self._wake.set()

    def finish(self) -> None:
        """End the learner's thread; what was handed over is in the replay."""
        self.stop()
        self._wake.set()
        if self._learning is not None:
            self._learning.join()
            self._learning = None
        self._take_parts()
        if self._error is not None:
            raise self._error

    def summary(self) -> dict[str, Any]:
        """Late and slow ticks, updates a second, and the age of the weights that acted."""
        rate = None
        if self._first is not None:
            updates, since = self._first
            rate = round((self._learner.updates - updates) / max(time.monotonic() - since, 1e-9), 1)
        ages = self.ages.summary("weights_age")
        return {
            **self.ticks.summary("tick"),
            "updates_per_s": rate,
            **{key: ages[key] for key in ages if key.endswith("_ms")},
            "weights_age_max_updates": self._most_behind,
        }

    def _run(self) -> None:
        with contextlib.suppress(OSError, AttributeError):  # not allowed, or not Linux
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICER)
        try:
            while not self._stopped.is_set():
                self._free.wait()
                with self._lock:
                    self._take_parts()
                    made = self._make_one()
                if self._reporter.is_due(0, 0):
                    self._reporter.progress()
                if not made:
                    self._wake.wait(_IDLE_S)
                    self._wake.clear()
        except BaseException as error:  # raised by the thread that acts
            self._error = error

    def _take_parts(self) -> None:
        while self._parts:
            self._behaviour.add(self._parts.popleft())
        while self._ended:
            self._learn_from_person(self._ended.popleft())

    def _make_one(self) -> bool:
        """An update, if one is due, and its weights published."""
        learner, train = self._learner, self._config.train
        behaviour: SliceReplay | None = self._behaviour
        if learner.updates < train.demo_updates:
            behaviour = self._experts
        elif self.due(self._steps) <= learner.updates:
            return False
        if self._first is None:
            self._first = learner.updates, time.monotonic()
        assert behaviour is not None  # the schema refuses demo_updates for `td`
        with self._reporter.timing.measure("update"):
            latest = learner.learn(self._experts, behaviour)
        self._agent.publish(learner.acting_weights())
        self._published = learner.updates, time.monotonic()
        if learner.updates % _METRICS_EVERY == 0 or self._reporter.metrics is None:
            self._reporter.metrics = tuple(latest), torch.stack(list(latest.values()))
        return True
