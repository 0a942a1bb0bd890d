"""Images as observations. What needs a graphics library runs in a process of its own."""

import os
import subprocess
import sys

import gymnasium
import gymnasium.utils.env_checker
import numpy as np
import pytest

from iqmpc.config import TaskConfig
from iqmpc.envs import check_spaces, make_env
from iqmpc.envs.pixels import resized
from iqmpc.errors import TaskError
from iqmpc.observation import ObservationSpec, stacked, unstacked


def child(code, **env):
    """Run `code` in a new process, without the variables that choose a graphics library."""
    kept = {k: v for k, v in os.environ.items() if k not in ("MUJOCO_GL", "PYOPENGL_PLATFORM")}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=kept | env, timeout=300
    )


@pytest.fixture(scope="module")
def gl():
    """Skips where nothing can be rendered, with the reason."""
    done = child("import iqmpc; iqmpc.make_env('walker-walk', obs='pixels').reset(seed=0)")
    if done.returncode:
        pytest.skip(done.stderr.strip().splitlines()[-1])


def test_frames_are_stacked(image_point_env):
    env = image_point_env
    gymnasium.utils.env_checker.check_env(env, skip_render_check=True)
    assert check_spaces(env, "point") == (ObservationSpec((3, 64, 64)), 2)
    runs = []
    for _ in range(2):
        rows = [env.reset(seed=3)[0]]
        rows += [env.step(np.array([0.5, -1.0]))[0] for _ in range(5)]
        runs.append(np.array(rows))
    assert runs[0].dtype == np.uint8 and env.observation_space.contains(runs[0][0])
    np.testing.assert_array_equal(runs[0], runs[1])  # the first episode left nothing behind
    single = unstacked(runs[0])
    np.testing.assert_array_equal(stacked(single), runs[0])
    assert not np.array_equal(single[0], single[1])


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        (np.float32, (9, 64, 64)),
        (np.uint8, (8, 64, 64)),
        (np.uint8, (9, 84, 84)),
        (np.uint8, (64, 64, 3)),
    ],
)
def test_other_images_are_refused(image_point_env, dtype, shape):
    image_point_env.observation_space = gymnasium.spaces.Box(0, 255, shape, dtype)
    with pytest.raises(TaskError, match=r"or one of uint8 images \[3C, 64, 64\], got Box"):
        check_spaces(image_point_env, "point")


def test_resizing():
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    np.testing.assert_array_equal(resized(image), image.transpose(2, 0, 1))
    # A slope stays one: away from its ends, where the filter is cut, it is exact at pixel centres.
    slope = np.broadcast_to(np.arange(128, dtype=np.uint8)[:, None, None], (128, 192, 1))
    small = resized(slope)
    assert small.shape == (1, 64, 64) and small.dtype == np.uint8
    centres = 2 * np.arange(64) + 0.5
    assert np.all(np.abs(small[0] - centres[:, None]) <= 0.5 + 1e-4)
    assert np.all(resized(np.full((20, 30, 3), 77, np.uint8)) == 77)


ROLL = """
import numpy as np, iqmpc, sys
def roll(**options):
    env = iqmpc.make_env("walker-walk", obs="pixels", episode_length=4, **options)
    actions = np.random.default_rng(0).uniform(-1, 1, (4, 6))
    rows = [env.reset(seed=7)[0]]
    for action in actions:
        obs, _, _, truncated, _ = env.step(action)
        rows.append(obs)
    assert truncated
    return np.array(rows)
"""


@pytest.mark.usefixtures("gl")
def test_dmcontrol_from_pixels(tmp_path):
    code = (
        ROLL
        + f"""
from iqmpc.envs.pixels import FrameRecorder
one, two, fast = roll(), roll(), roll(fast_render=True)
env = FrameRecorder(iqmpc.make_env("walker-walk", render_mode="rgb_array"))
assert env.reset(seed=7)[0].shape == (24,)
for action in np.random.default_rng(0).uniform(-1, 1, (4, 6)):
    env.step(action)
np.savez({str(tmp_path / "rows.npz")!r}, one=one, two=two, fast=fast, recorded=env.frames)
"""
    )
    done = child(code)
    assert done.returncode == 0, done.stderr
    rows = np.load(tmp_path / "rows.npz")
    assert rows["one"].shape == (5, 9, 64, 64) and rows["one"].dtype == np.uint8
    assert rows["one"].std() > 10
    np.testing.assert_array_equal(rows["one"], rows["two"])  # the same under a seed
    np.testing.assert_array_equal(unstacked(rows["one"]), rows["recorded"])
    assert rows["fast"].shape == rows["one"].shape and not np.array_equal(rows["fast"], rows["one"])


@pytest.mark.usefixtures("gl")
def test_a_trainer_process_renders_and_compiles():
    """Rendering, then torch.compile and an optimiser, which load Triton: in one process."""
    code = (
        ROLL
        + """
import torch
roll()
x = torch.ones(8, requires_grad=True)
f = torch.compile(lambda x: (x.sin() * x).sum())
f(x).backward()
torch.optim.Adam([x], fused=True).step()
print("alive", roll().shape)
"""
    )
    done = child(code)
    assert done.returncode == 0, done.stderr
    assert "alive (5, 9, 64, 64)" in done.stdout


def test_a_missing_graphics_library_is_named():
    code = (
        "import ctypes.util\n"
        "ctypes.util.find_library = lambda name: None\n"
        "import iqmpc; iqmpc.make_env('walker-walk', obs='pixels')"
    )
    done = child(code, DISPLAY="")
    assert done.returncode == 1
    assert "TaskError: no graphics library was found: " in done.stderr
    assert "apt-get install libegl1 libgl1-mesa-dri" in done.stderr


def test_a_broken_graphics_library_is_named():
    done = child("import iqmpc; iqmpc.make_env('walker-walk', obs='pixels')", MUJOCO_GL="nonsense")
    assert done.returncode == 1
    assert "TaskError: dm_control cannot be imported with MUJOCO_GL=nonsense: " in done.stderr


def test_suites_that_are_not_rendered_say_so():
    with pytest.raises(TaskError, match="obs=pixels is for .*'lift-cube' belongs to 'maniskill'"):
        make_env("lift-cube", obs="pixels")


def test_rendering_is_off_by_default():
    assert (TaskConfig().obs, TaskConfig().fast_render) == ("state", False)
