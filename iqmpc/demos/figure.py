"""What a demonstration set looks like: how its returns, lengths, successes and actions spread."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from iqmpc.demos.demonstrations import Demonstrations
from iqmpc.plot import new_figure, save_figure

_BINS = 41


def draw(demos: Demonstrations, out: Path) -> None:
    """Write the four distributions of a set to `out` (.png, .pdf or .svg).

    A histogram of actions is drawn a dimension, as a column whose shade is the share of steps.
    Raises IqmpcError for another suffix and without matplotlib.
    """
    figure = new_figure(out, figsize=(10, 6.4))
    (returns, lengths), (success, actions) = figure.subplots(2, 2)
    figure.suptitle(f"{demos.task}: {len(demos)} episodes, {demos.transitions} steps")

    found = demos.returns()
    returns.set(xlabel="return", ylabel="episodes")
    if found is None:
        _say(returns, "not recorded")
    else:
        returns.hist(found, bins="auto")
    steps = [len(episode.actions) for episode in demos.episodes]
    lengths.hist(steps, bins=min(_BINS, max(steps) - min(steps) + 1))
    lengths.set(xlabel="steps", ylabel="episodes")
    lengths.xaxis.get_major_locator().set_params(integer=True)
    rate = demos.success_rate
    success.set(ylabel="episodes", title="at the last step", xticks=[])
    if rate is None:
        _say(success, "success not defined")
    else:
        solved = round(rate * len(demos))
        success.set(xticks=[0, 1], xticklabels=["not solved", "solved"])
        success.bar([0, 1], [len(demos) - solved, solved], width=0.6)

    shares = np.zeros((_BINS, demos.action_dim))
    for episode in demos.episodes:
        for a in range(demos.action_dim):
            shares[:, a] += np.histogram(episode.actions[:, a], bins=_BINS, range=(-1, 1))[0]
    image = actions.imshow(
        shares / demos.transitions,
        origin="lower",
        aspect="auto",
        extent=(-0.5, demos.action_dim - 0.5, -1, 1),
        cmap="Blues",
    )
    actions.set(xlabel="dimension", ylabel="action")
    actions.xaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=actions, label="share of steps")
    save_figure(figure, out)


def _say(axis: Any, text: str) -> None:
    axis.text(0.5, 0.5, text, ha="center", va="center", transform=axis.transAxes)
    axis.set(xticks=[], yticks=[])
