"""Record an episode as MP4."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import gymnasium

from iqmpc.agent import Agent
from iqmpc.errors import IqmpcError, TaskError
from iqmpc.evaluation import rollout


def check_video(path: Path) -> None:
    """Raise `IqmpcError` where `path` cannot become a video."""
    if path.suffix != ".mp4":
        raise IqmpcError(f"--video must name an .mp4 file, got {path}")
    if not path.resolve().parent.is_dir():
        raise IqmpcError(f"--video: the folder {path.resolve().parent} does not exist")
    for module in ("imageio", "imageio_ffmpeg"):
        if importlib.util.find_spec(module) is None:
            raise IqmpcError("--video needs the extra 'video': pip install 'iqmpc[video]'")


def record_video(agent: Agent, env: gymnasium.Env, path: Path, *, seed: int) -> None:
    """Write the episode from `env.reset(seed=seed)` to `path`.

    Raises `TaskError` where the environment cannot render here.
    """
    import imageio.v2 as imageio

    frames = []

    def grab(env: gymnasium.Env) -> None:
        try:
            frames.append(env.render())
        except Exception as error:  # every GL backend raises its own type
            raise TaskError(
                f"the environment cannot render here: {error or type(error).__name__} (without a "
                "screen, install EGL or OSMesa: apt-get install libegl1 libgl1-mesa-dri "
                "libosmesa6, and set MUJOCO_GL=egl or MUJOCO_GL=osmesa)") from error

    rollout(agent, env, seed=seed, on_step=grab)
    fps = env.metadata.get("render_fps", 30)
    imageio.mimwrite(path, frames, fps=fps, codec="libx264", macro_block_size=None)
