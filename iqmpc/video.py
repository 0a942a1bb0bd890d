"""Record an episode as MP4."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import gymnasium
import numpy as np

from iqmpc.errors import IqmpcError, TaskError


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
        self._frames: list[np.ndarray] = []
        self._fps = 30

    def __call__(self, env: gymnasium.Env) -> None:
        self._fps = env.metadata.get("render_fps", self._fps)
        try:
            self._frames.append(env.render())
        except TaskError:
            raise
        except Exception as error:  # every GL backend raises its own type
            raise TaskError(
                f"the environment cannot render here: {error or type(error).__name__} (without a "
                "screen, install EGL or OSMesa: apt-get install libegl1 libgl1-mesa-dri "
                "libosmesa6, and set MUJOCO_GL=egl or MUJOCO_GL=osmesa)") from error

    def save(self) -> None:
        import imageio.v2 as imageio

        imageio.mimwrite(
            self.path, self._frames, fps=self._fps, codec="libx264", macro_block_size=None)
