"""Every defect of a demonstration set, each with its place, what was found and expected."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from iqmpc.config import names_task
from iqmpc.demos.types import Defect, Draft
from iqmpc.observation import LARGEST, SIZE, ObservationSpec


def find_defects(
    draft: Draft | Defect,
    *,
    task: str | None = None,
    obs_dim: int | None = None,
    action_dim: int | None = None,
) -> Iterator[Defect]:
    """Yield every defect of a set as read, once each; nothing when the set is sound.

    draft: what a reader returned; a Defect stands for a file that could not be read at all.
    task, obs_dim, action_dim: what the set must be for; None accepts anything consistent.
    """
    # A reader puts the same Defect in every episode that it spoils.
    seen: set[Defect] = set()
    found = iter([draft]) if isinstance(draft, Defect) else _find(draft, task, obs_dim, action_dim)
    for defect in found:
        if defect not in seen:
            seen.add(defect)
            yield defect


def describe(value: object) -> str:
    """What a value is, in the words of a defect's `found`."""
    if value is None:
        return "nothing"
    if isinstance(value, np.ndarray):
        return f"{value.dtype} array of shape {list(value.shape)}"
    text = repr(value.item() if isinstance(value, np.generic) else value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _find(
    draft: Draft, task: str | None, obs_dim: int | None, action_dim: int | None
) -> Iterator[Defect]:
    at = partial(Defect, draft.source)

    if isinstance(draft.task, Defect):
        yield draft.task
    elif not isinstance(draft.task, str) or not draft.task:
        yield at("task", describe(draft.task), "the task's name")
    elif task is not None and not names_task(draft.task, task):
        hint = "iqmpc demos convert --task renames it, a run's own is task.name"
        yield at("task", repr(draft.task), f"{task!r} ({hint})")

    if isinstance(draft.provenance, Defect):
        yield draft.provenance
    elif not isinstance(draft.provenance, Mapping) or not all(
        isinstance(text, str) for item in draft.provenance.items() for text in item
    ):
        yield at("provenance", describe(draft.provenance), "a mapping of text to text")

    if not draft.episodes:
        yield at("episodes", "none", "at least one")
    episodes = [episode for episode in draft.episodes if not isinstance(episode, Defect)]
    widths = {}
    for key, expected in (("observations", obs_dim), ("actions", action_dim)):
        counts = Counter(e[key].shape[1] for e in episodes if _is_matrix(e[key]))
        # Most episodes set the width, so that the odd one out is named even when it comes first.
        widths[key] = width = (
            expected if expected in counts else max(counts, key=counts.__getitem__, default=None)
        )
        if width == 0 or (width is not None and expected not in (None, width)):
            yield at(key, f"{width} values a step", str(expected or "at least 1"))
    # Images where most episodes have them; then the odd ones out are the others.
    frames = [e["observations"] for e in episodes if _is_frames(e["observations"])]
    layout = ("[T+1, O]", (widths["observations"],), np.float32)
    if 2 * len(frames) > len(episodes):
        channels = Counter(array.shape[1] for array in frames).most_common(1)[0][0]
        spec = ObservationSpec.of_frames(channels)
        layout = (f"[T+1, C, {SIZE}, {SIZE}]", spec.row_shape, spec.dtype)
        if channels == 0:
            yield at("observations", "images without channels", "at least 1")
        if obs_dim is not None:
            yield at("observations", "images", f"{obs_dim} values a step")

    for index, episode in enumerate(draft.episodes):
        if isinstance(episode, Defect):
            yield episode
        else:
            yield from _episode_defects(
                partial(at, episode=index), episode, layout, widths["actions"], draft.range_hint
            )

    for key in ("rewards", "success"):
        present = sum(episode[key] is not None for episode in episodes)
        if 0 < present < len(episodes):
            yield at(key, f"{present} of {len(episodes)} episodes with it", "all of them or none")


def _is_matrix(value: object) -> bool:
    return isinstance(value, np.ndarray) and value.ndim == 2


def _is_frames(value: object) -> bool:
    return isinstance(value, np.ndarray) and value.ndim == 4


def _episode_defects(
    at: Callable[..., Defect],
    episode: Mapping[str, Any],
    layout: tuple[str, tuple[int | None, ...], type],
    action_dim: int | None,
    range_hint: str,
) -> Iterator[Defect]:
    """layout: of observations, the symbols of their shape, the shape of one and their dtype."""
    steps = len(episode["actions"]) if _is_matrix(episode["actions"]) else None
    rows = None if steps is None else steps + 1
    if steps == 0:
        yield at("actions", "no steps", "at least one")
    for key, symbols, shape, dtype in (
        ("observations", layout[0], (rows, *layout[1]), layout[2]),
        ("actions", "[T, A]", (steps, action_dim), np.float32),
        ("rewards", "[T]", (steps,), np.float32),
    ):
        value = episode[key]
        if isinstance(value, Defect):
            yield value
        elif isinstance(value, np.ndarray):
            yield from _array_defects(partial(at, key), value, symbols, shape, dtype)
        elif value is not None or key != "rewards":
            yield at(key, describe(value), f"a {np.dtype(dtype)} array {symbols}")

    if isinstance(episode["actions"], np.ndarray) and episode["actions"].dtype.kind in "fiu":
        actions = episode["actions"]
        outside = np.isfinite(actions) & ((actions < -1) | (actions > 1))
        if outside.any():
            yield at("actions", _first(actions, outside), f"values in [-1, 1]{range_hint}")

    for key in ("terminated", "success"):
        value = episode[key]
        if isinstance(value, Defect):
            yield value
        elif not isinstance(value, (bool, np.bool_)) and (value is not None or key != "success"):
            yield at(key, describe(value), "true or false")


def _array_defects(
    at: Callable[[str, str], Defect],
    array: np.ndarray,
    symbols: str,
    shape: tuple[int | None, ...],
    dtype: type,
) -> Iterator[Defect]:
    if array.dtype != dtype:
        yield at(f"dtype {array.dtype}", str(np.dtype(dtype)))
    fits = array.ndim == len(shape) and all(
        want in (None, have) for have, want in zip(array.shape, shape, strict=True)
    )
    if not fits:
        numbers = ", ".join("any" if size is None else str(size) for size in shape)
        yield at(f"shape {list(array.shape)}", f"shape {symbols} = [{numbers}]")
    if array.dtype.kind == "f":
        bad, far = ~np.isfinite(array), np.abs(array) > LARGEST
        if bad.any():
            yield at(_first(array, bad), "finite values")
        elif far.any():
            yield at(_first(array, far), f"values within ±{LARGEST:g}")


def _first(array: np.ndarray, bad: np.ndarray) -> str:
    index = np.argwhere(bad)[0].tolist()
    count = np.count_nonzero(bad)
    more = f" and {count - 1} more" if count > 1 else ""
    return f"{array[tuple(index)]} at {index}{more}"
