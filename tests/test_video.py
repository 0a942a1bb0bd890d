"""What cannot be filmed is one line at the first frame."""

import gymnasium
import numpy as np
import pytest

from iqmpc.config import TaskConfig
from iqmpc.envs import make_env
from iqmpc.errors import TaskError
from iqmpc.video import Recorder

pytest.importorskip("imageio_ffmpeg")


class Drawn(gymnasium.Env):
    metadata = {"render_modes": ["rgb_array"], "render_fps": None}
    image = np.zeros((8, 8, 3), np.uint8)

    def __init__(self, value):
        self.value = value

    def render(self):
        if isinstance(self.value, Exception):
            raise self.value
        return self.value


class EGLError(Exception):
    pass


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, r"render\(\) gave a NoneType, expected an image uint8 \[H, W, 3\]"),
        ([Drawn.image], "gave a list"),
        (Drawn.image / 255.0, r"gave float64 \[8, 8, 3\]"),
        (Drawn.image[:, :, 0], r"gave uint8 \[8, 8\]"),
        (NotImplementedError(), "NotImplementedError$"),
        (KeyError("camera"), "cannot render here: 'camera'$"),
        (ValueError("no such angle"), "no such angle$"),
        (EGLError(), r"EGLError \(without a screen, rendering needs EGL or OSMesa"),
        (
            RuntimeError("an OpenGL context could not be made"),
            "could not be made .without a screen",
        ),
    ],
)
def test_what_is_no_frame_is_said_at_once(tmp_path, value, said):
    with pytest.raises(TaskError, match=said):
        Recorder(tmp_path / "a.mp4")(Drawn(value))


def test_frames_are_copied_and_alike(tmp_path):
    recorder = Recorder(tmp_path / "a.mp4")
    frame = np.zeros((16, 16, 3), np.uint8)
    recorder(Drawn(frame))
    frame[:] = 9
    recorder(Drawn(frame))
    with pytest.raises(TaskError, match=r"an image \[8, 8, 3\] after those of \[16, 16, 3\]"):
        recorder(Drawn(Drawn.image))
    recorder.save()
    assert (tmp_path / "a.mp4").stat().st_size and recorder._frames[0].max() == 0


class Blind(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)


def test_an_environment_without_a_render_mode():
    gymnasium.register("Blind-v0", entry_point=Blind)
    try:
        task = TaskConfig(name="gym", suite="gym", env_id="Blind-v0")
        with pytest.raises(TaskError, match="Blind-v0 takes no render_mode"):
            make_env(task, render_mode="rgb_array")
    finally:
        del gymnasium.registry["Blind-v0"]
