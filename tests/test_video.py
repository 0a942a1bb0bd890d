"""What cannot be filmed is one line at the first frame."""

import gymnasium
import numpy as np
import pytest

from iqmpc import Trainer
from iqmpc.config import TaskConfig
from iqmpc.envs import make_env
from iqmpc.errors import ConfigError, TaskError
from iqmpc.video import EvaluationVideos, Recorder

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


class Filmed(gymnasium.Wrapper):
    """Draws itself, until `fails` says not to."""

    fails = None

    @property
    def render_mode(self):
        return "rgb_array"

    def render(self):
        if self.fails is not None:
            raise self.fails
        return np.full((16, 16, 3), 9, np.uint8)


@pytest.fixture
def train(tmp_path, small_config, point_env, point_demonstrations):
    def run(env=None, **changes):
        config = small_config.replace(
            {"train.loggers": ["csv"], "train.eval_every": 20, "train.video_every": 50, **changes}
        )
        said = []
        Trainer(
            config,
            env or Filmed(point_env),
            point_demonstrations,
            run=tmp_path / "run",
            on_message=said.append,
        ).train()
        return sorted(p.name for p in (tmp_path / "run").glob("videos/*")), said

    return run


def test_evaluations_are_filmed(train, tmp_path):
    """The first at or after each multiple, and the last."""
    import imageio.v2 as imageio

    videos, _ = train()
    assert videos == ["step_000000060.mp4", "step_000000100.mp4"]
    with imageio.get_reader(tmp_path / "run" / "videos" / videos[0]) as reader:
        assert reader.count_frames() == 20  # the first episode alone


def test_without_it_nothing_is_filmed(train):
    assert train(**{"train.video_every": None})[0] == []


def test_what_cannot_be_drawn_costs_no_run(train, point_env):
    env = Filmed(point_env)
    env.fails = RuntimeError("no OpenGL context")
    videos, said = train(env)
    (warning,) = [text for text in said if "videos" in text]
    assert videos == [] and warning.startswith("warning: no videos of evaluations any more: the en")


def test_what_cannot_be_written_costs_no_run(tmp_path, point_env):
    said = []
    videos = EvaluationVideos(1, said.append)
    (tmp_path / "videos").write_text("a file")
    videos.begin(tmp_path / "videos" / "a.mp4", after=0, step=1, last=False)
    assert videos.finish() is None and "no videos" in said[0]


def test_an_environment_that_does_not_draw_is_named(train, point_env):
    with pytest.raises(ConfigError, match="eval_env with render_mode='rgb_array', got render_mode"):
        train(point_env)


def test_a_task_gets_an_environment_that_draws(tmp_path, small_config):
    """One of its own to evaluate in."""
    changes = {
        "task.name": "gym",
        "task.suite": "gym",
        "task.env_id": "Pendulum-v1",
        "train.video_every": 50,
        "learner.objective": "td",
    }
    trainer = Trainer(small_config.replace(changes), run=tmp_path / "run")
    assert trainer.eval_env.render_mode == "rgb_array"
    assert trainer.envs.envs[0].render_mode is None
    trainer.envs.close()
