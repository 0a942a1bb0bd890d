"""Record an episode as MP4."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from iqmpc.envs.extras import cannot_render
from iqmpc.errors import IqmpcError, TaskError
from iqmpc.files import naming


class Recorder:
    """Collects frames: pass it as `on_step` to an evaluation, then `save`.

    Raises `IqmpcError` at once where `path` cannot become a video, and `TaskError` at the first
    frame where the environment cannot render here.
    """

    def __init__(self, path: Path):
        if path.suffix != ".mp4":
            raise IqmpcError(f"--video must name an .mp4 file, got {path}")
        if not path.resolve().parent.is_dir():
            raise IqmpcError(f"--video: the folder {path.resolve().parent} does not exist")
        for module in ("imageio", "imageio_ffmpeg"):
            if importlib.util.find_spec(module) is None:
                raise IqmpcError("--video needs the extra 'video': pip install 'iqmpc[video]'")
        self.path = path
        self._frames: list[Any] = []  # uint8 [H, W, 3]
        self._fps = 30

    def __call__(self, env: gymnasium.Env) -> None:
        self._fps = env.metadata.get("render_fps") or self._fps
        try:
            frame: Any = env.render()
        except TaskError:
            raise
        except Exception as error:
            raise cannot_render(error) from error
        if (
            not isinstance(frame, np.ndarray)
            or frame.dtype != np.uint8
            or frame.ndim != 3
            or frame.shape[2] != 3
        ):
            given = (
                f"{frame.dtype} {list(frame.shape)}"
                if isinstance(frame, np.ndarray)
                else f"a {type(frame).__name__}"
            )
            raise TaskError(
                f"the environment's render() gave {given}, expected an image uint8 [H, W, 3]: a "
                "video needs an environment that takes render_mode='rgb_array' and draws itself"
            )
        if self._frames and frame.shape != self._frames[0].shape:
            raise TaskError(
                f"the environment's render() gave an image {list(frame.shape)} after "
                f"those of {list(self._frames[0].shape)}"
            )
        self._frames.append(frame.copy())  # it may draw the next one there

    def save(self) -> None:
        import imageio.v2 as imageio

        with naming(self.path):
            imageio.mimwrite(
                self.path, self._frames, fps=self._fps, codec="libx264", macro_block_size=None
            )
