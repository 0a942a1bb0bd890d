"""What trackers are given, and that a fault of one costs a run nothing."""

import csv
import sys

import pytest

from iqmpc import Config, Trainer
from iqmpc.errors import ConfigError
from iqmpc.run_folder import RunFolder
from iqmpc.trackers import Trackers, check_loggers

ROW = {"env_steps": 10, "updates": 1, "episodes": 1, "wall_s": 1.0}


def config_of(*loggers, **changes):
    return Config().replace({"train.loggers": list(loggers), **changes})


@pytest.fixture
def wandb(monkeypatch, tmp_path):
    """Offline, and with nobody logged in."""
    module = pytest.importorskip("wandb")
    for name in ("HOME", "NETRC", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    yield module
    module.teardown()


def sessions(run):
    return sorted((run / "wandb").glob("offline-run-*/run-*.wandb"))


def test_figures_and_settings_are_in_tensorboard(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    trackers = Trackers(config_of("tensorboard", **{"learner.batch": 64}), RunFolder(tmp_path))
    trackers.write({**ROW, "return": 2.0, "plan_ms": 3.0, "q_expert": float("nan")})
    trackers.write({**ROW, "env_steps": 20, "return": 4.0, "eval_return_mean": None})
    trackers.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(events.Tags()["scalars"]) == ["results/return", "timing/plan_ms"]
    assert [(e.step, e.value) for e in events.Scalars("results/return")] == [(10, 2.0), (20, 4.0)]
    told = HParamsPluginData.FromString(
        events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    ).session_start_info.hparams
    assert told["learner.batch"].number_value == 64
    assert told["task.name"].string_value == "walker-walk"
    assert told["planner.iterations"].string_value == "None"


def test_one_that_fails_is_left_out(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    trackers = Trackers(config_of("tensorboard"), RunFolder(tmp_path))
    trackers._open["tensorboard"]._board.add_scalar = full
    with pytest.warns(RuntimeWarning, match="tensorboard is not written any more .*No space left"):
        trackers.write({**ROW, "return": 1.0})
    trackers.write({**ROW, "return": 1.0})  # without another warning
    trackers.close()
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", full)
    with pytest.warns(RuntimeWarning, match="tensorboard is not written"):
        Trackers(config_of("tensorboard", "csv"), RunFolder(tmp_path)).close()


@pytest.mark.parametrize("fails", ["init", "log", "finish"])
def test_a_run_survives_its_tracker(
    tmp_path, small_config, point_env, point_demonstrations, wandb, monkeypatch, fails
):
    def unreachable(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(wandb if fails == "init" else wandb.Run, fails, unreachable)
    config = small_config.replace({"train.loggers": ["wandb"]})
    trainer = Trainer(config, point_env, point_demonstrations, run=tmp_path / "run")
    with pytest.warns(RuntimeWarning, match="wandb is not written any more .no route to host.;"):
        summary = trainer.train()
    assert summary["env_steps"] == 100 and not (tmp_path / "run" / "tensorboard").exists()
    rows = list(csv.DictReader(open(tmp_path / "run" / "metrics.csv", newline="")))
    assert rows[-1]["eval_return_mean"]


def test_weights_and_biases_offline(tmp_path, wandb):
    config, said = config_of("csv", "wandb", **{"learner.batch": 64}), []
    video = tmp_path / "evaluation.mp4"
    video.write_bytes(b"frames")
    trackers = Trackers(config, RunFolder(tmp_path), on_message=said.append)
    trackers.write({**ROW, "return": 2.0, "plan_ms": 3.0})
    trackers.video(10, video)
    trackers.close()
    assert said == [
        f"wandb is offline; to send this run: wandb sync {tmp_path}/wandb/offline-run-*"
    ]
    (session,) = sessions(tmp_path)
    content = session.read_bytes()
    assert all(key in content for key in (b"results/return", b"timing/plan_ms", b"learner.batch"))
    (kept,) = session.parent.rglob("*.mp4")
    assert kept.read_bytes() == b"frames"


def test_a_continuation_is_the_same_run_there(tmp_path, wandb):
    ids = set()
    for folder in (tmp_path, tmp_path, tmp_path / "other"):
        folder.mkdir(exist_ok=True)
        trackers = Trackers(config_of("wandb"), RunFolder(folder))
        ids.add((folder, wandb.run.id))
        trackers.close()
    assert len(ids) == len({i for _, i in ids}) == 2


def test_without_credentials_it_is_kept_for_later(tmp_path, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    said = []
    trackers = Trackers(config_of("wandb"), RunFolder(tmp_path), on_message=said.append)
    trackers.write({**ROW, "return": 2.0})
    trackers.close()
    assert "wandb login" in said[0] and "wandb sync" in said[1] and len(said) == 2
    assert b"results/return" in sessions(tmp_path)[0].read_bytes()


def test_what_is_not_installed_is_said_first(monkeypatch, tmp_path, small_config, point_env):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"extra 'wandb': pip install 'iqmpc\[wandb\]'"):
        Trainer(small_config.replace({"train.loggers": ["wandb"]}), point_env, run=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    check_loggers(config_of("tensorboard", "csv"))


@pytest.mark.parametrize(
    "given, said",
    [
        (["tensorbord"], r"train.loggers\[0\] must be one of .*did you mean 'tensorboard'"),
        ("wandb", r"train.loggers must be a list, such as \[a,b\], got 'wandb'"),
    ],
)
def test_other_loggers_are_refused(given, said):
    with pytest.raises(ConfigError, match=said):
        Config().replace({"train.loggers": given})
