"""What a run tells its callers while it trains, each of whom may end it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from iqmpc.episode import Episode, EpisodeBuffer
    from iqmpc.evaluation import Evaluation
    from iqmpc.trainer import Trainer


class Callback:
    """What `Trainer(callbacks=[...])` takes: subclass it and override what is of interest.

    All are called on the thread that steps the environments, in the order of the list. `trainer` is
    the run as it is then (`env_steps`, `episodes`, `wall_s`, `run`, `agent`, `learner`, …). One
    that returns True ends the run as `train.stop_at` does, with a checkpoint and the last
    evaluation; the other callbacks are still told. An exception ends it like any error: the last
    whole episode is saved. What a callback keeps for itself is in no checkpoint. One that draws
    from the run's random streams or acts by its agent makes another run of it.
    """

    def on_step(self, trainer: Trainer, episodes: Sequence[EpisodeBuffer]) -> bool | None:
        """After every step of the environments, the tick's updates not yet made.

        `episodes` are those that were stepped, as far as they have come. Where this ends the run,
        unfinished episodes end too, as at `train.steps`. It makes a tick of `train.control_hz`
        longer.
        """

    def on_episode(self, trainer: Trainer, episode: Episode) -> bool | None:
        """After an episode of training, its updates made and its row of metrics written."""

    def on_evaluation(self, trainer: Trainer, evaluation: Evaluation) -> bool | None:
        """After every evaluation on the way and the one that ends the run."""

    def on_checkpoint(self, trainer: Trainer, path: Path) -> bool | None:
        """After a checkpoint has been written at `path`; not where an error ends the run."""
