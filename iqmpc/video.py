"""Record episodes as MP4."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from iqmpc.envs.extras import cannot_render
from iqmpc.errors import ConfigError, IqmpcError, TaskError, one_line
from iqmpc.files import naming


def check_writer(asked: str) -> None:
    """`IqmpcError` where what writes videos is not installed; `asked` is what wants one."""
    for module in ("imageio", "imageio_ffmpeg"):
        if importlib.util.find_spec(module) is None:
            raise IqmpcError(f"{asked} needs the extra 'video': pip install 'iqmpc[video]'")


class Recorder:
    """Collects frames: pass it as `on_step` to an evaluation, then `save`.

    `asked` is what asked for it, for messages. Raises `IqmpcError` at once where `path` cannot
    become a video, and `TaskError` at the first frame where the environment cannot render here.
    """

    def __init__(self, path: Path, asked: str = "--video"):
        if path.suffix != ".mp4":
            raise IqmpcError(f"{asked} must name an .mp4 file, got {path}")
        if not path.resolve().parent.is_dir():
            raise IqmpcError(f"{asked}: the folder {path.resolve().parent} does not exist")
        check_writer(asked)
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


class EvaluationVideos:
    """Videos of a run's evaluations, by `train.video_every`; none costs the run more than its time.

    What cannot be drawn or written is told to `on_message`, and nothing is filmed from then on.
    """

    def __init__(self, every: int | None, on_message: Callable[[str], None]):
        self._every, self._on_message = every, on_message
        self._recorder: Recorder | None = None

    def check(self, eval_env: gymnasium.Env | None) -> None:
        """`IqmpcError` where videos are asked for and cannot be made of this environment."""
        if self._every is None:
            return
        check_writer("train.video_every")
        if eval_env is None or eval_env.render_mode != "rgb_array":
            raise ConfigError(
                "train.video_every needs an eval_env with render_mode='rgb_array', got "
                + ("none" if eval_env is None else f"render_mode={eval_env.render_mode!r}")
            )

    def begin(self, path: Path, *, after: int, step: int, last: bool) -> None:
        """Film the evaluation at `step` into `path` if a video is due since the one `after`."""
        if self._every is not None and (last or step // self._every > after // self._every):
            try:
                path.parent.mkdir(exist_ok=True)
                self._recorder = Recorder(path, "train.video_every")
            except (OSError, IqmpcError) as error:
                self._give_up(error)

    def on_step(self, env: gymnasium.Env) -> None:
        """What `evaluate` calls before a step."""
        if self._recorder is not None:
            try:
                self._recorder(env)
            except TaskError as error:
                self._give_up(error)

    def finish(self) -> Path | None:
        """Write what was filmed. Returns its path; None where nothing was."""
        recorder, self._recorder = self._recorder, None
        if recorder is None:
            return None
        try:
            recorder.save()
        except Exception as error:  # of the encoder's process, too
            self._give_up(error)
            return None
        return recorder.path

    def _give_up(self, error: Exception) -> None:
        self._recorder = self._every = None
        self._on_message(f"warning: no videos of evaluations any more: {one_line(error)}")
