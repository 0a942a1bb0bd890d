"""Runs that go on from a checkpoint: exactly, or refused."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from iqmpc import Agent, Trainer, evaluate
from iqmpc.episode import Episode
from iqmpc.errors import CheckpointError, ConfigError
from iqmpc.evaluation import Evaluation, reward_correlation
from iqmpc.observation import stacked
from iqmpc.run_folder import RunFolder
from tests.runs import assert_same_state, marked, rows_of, tensors_of, train


@pytest.mark.parametrize(
    "mode", ["eager", "fused", pytest.param("compile", marks=pytest.mark.slow)]
)
def test_resume_is_exact(tmp_path, small_config, point_env, point_demonstrations, mode):
    """40 + 60 steps are 100 steps, evaluations in between or not."""
    config = small_config.replace(
        {
            "planner.mode": "compile" if mode == "compile" else "eager",
            "planner.backend": "reference" if mode == "compile" else "auto",
            "learner.mode": mode,
            "agent.average": "always",
        }
    )
    train(config, point_env, point_demonstrations, tmp_path / "straight")
    first = config.replace({"train.steps": 40, "train.eval_every": 20})
    train(first, point_env, point_demonstrations, tmp_path / "parts")
    train(config, point_env, point_demonstrations, tmp_path / "parts", resume=True)
    one, two = (tensors_of(tmp_path / n)[0] for n in ("straight", "parts"))
    assert all(torch.equal(one[k], two[k]) for k in one)


_WORKER = """
import sys, time, yaml, importlib.util
spec = importlib.util.spec_from_file_location("shared", sys.argv[1])
shared = importlib.util.module_from_spec(spec); spec.loader.exec_module(shared)
import iqmpc
run, resume, slow = sys.argv[2], sys.argv[3] == "resume", float(sys.argv[4])
config = iqmpc.Config.from_dict(yaml.safe_load(open(sys.argv[5])))
class Slow(shared.PointEnv):
    def step(self, action):
        time.sleep(slow)
        return super().step(action)
iqmpc.Trainer(config, Slow(), iqmpc.Demonstrations.load(sys.argv[6]), run=run,
              resume=resume).train()
"""


def test_kill_and_resume_is_exact(tmp_path, small_config, point_demonstrations):
    """SIGKILL in the middle of an episode: the continuation equals the run that was never cut."""
    import yaml

    (tmp_path / "config.yaml").write_text(yaml.safe_dump(small_config.to_dict()))
    point_demonstrations.save(tmp_path / "demos.h5")
    shared = os.path.join(os.path.dirname(__file__), "conftest.py")

    def start(run, mode, slow):
        return subprocess.Popen(
            [
                sys.executable,
                "-c",
                _WORKER,
                shared,
                str(tmp_path / run),
                mode,
                str(slow),
                str(tmp_path / "config.yaml"),
                str(tmp_path / "demos.h5"),
            ]
        )

    assert start("straight", "new", 0).wait(120) == 0
    cut = start("cut", "new", 0.05)
    first = tmp_path / "cut" / "checkpoints" / "step_000000040.safetensors"
    deadline = time.monotonic() + 60
    while not first.exists() and time.monotonic() < deadline and cut.poll() is None:
        time.sleep(0.01)
    time.sleep(0.3)  # some steps into the next episode
    cut.send_signal(signal.SIGKILL)
    assert cut.wait(10) == -signal.SIGKILL and first.exists()
    assert not (tmp_path / "cut" / "summary.json").exists()
    assert start("cut", "resume", 0).wait(120) == 0
    assert_same_state(tmp_path / "straight", tmp_path / "cut")
    assert rows_of(tmp_path / "straight") == rows_of(tmp_path / "cut")


def test_a_damaged_newest_checkpoint_falls_back(
    tmp_path, small_config, point_env, point_demonstrations
):
    train(small_config, point_env, point_demonstrations, tmp_path / "run")
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    newest.write_bytes(newest.read_bytes()[:-10])
    with pytest.warns(RuntimeWarning, match=newest.name):
        trainer = Trainer(
            small_config, point_env, point_demonstrations, run=tmp_path / "run", resume=True
        )
    assert trainer.env_steps == 80
    with pytest.warns(RuntimeWarning, match=newest.name):
        Agent.load(tmp_path / "run")


def test_a_run_is_not_overwritten(tmp_path, small_config, point_env, point_demonstrations):
    config = small_config.replace({"train.steps": 20})
    train(config, point_env, point_demonstrations, tmp_path / "run")
    with pytest.raises(ConfigError, match="already holds a run: continue it with resume="):
        Trainer(config, point_env, point_demonstrations, run=tmp_path / "run")
    # two that start at once: only one gets the folder
    one, two = (
        Trainer(config, point_env, point_demonstrations, run=tmp_path / "both") for _ in range(2)
    )
    one.train()
    with pytest.raises(ConfigError, match="already holds a run"):
        two.train()


def test_another_models_checkpoint_is_refused(
    tmp_path, small_config, point_env, point_demonstrations
):
    train(
        small_config.replace({"train.steps": 20}), point_env, point_demonstrations, tmp_path / "run"
    )
    wider = small_config.replace({"model.hidden_dim": 40})
    with pytest.raises(
        ConfigError,
        match="what a run learns cannot change when it is resumed: model.hidden_dim is 40, was 32",
    ):
        Trainer(wider, point_env, point_demonstrations, run=tmp_path / "run", resume=True)


def test_a_run_cut_before_its_first_checkpoint_starts_again(
    tmp_path, small_config, point_env, point_demonstrations
):
    run = tmp_path / "run"
    run.mkdir()
    RunFolder(run).save_config(small_config, new=True)
    train(small_config, point_env, point_demonstrations, run, resume=True)
    train(small_config, point_env, point_demonstrations, tmp_path / "straight")
    assert_same_state(run, tmp_path / "straight")


def test_resume_refuses_what_is_no_continuation(
    tmp_path, small_config, point_env, point_demonstrations
):
    run = tmp_path / "run"
    train(small_config, point_env, point_demonstrations, run)
    with pytest.raises(CheckpointError, match="was trained on other demonstrations"):
        Trainer(small_config, point_env, point_demonstrations.select(5), run=run, resume=True)
    with pytest.raises(ConfigError, match="train.steps must be at least the 100"):
        Trainer(
            small_config.replace({"train.steps": 60}),
            point_env,
            point_demonstrations,
            run=run,
            resume=True,
        )


def test_a_finished_run_resumed_says_the_same_again(
    tmp_path, small_config, point_env, point_demonstrations
):
    """Also with a line of metrics.csv that a crash left incomplete."""
    run = tmp_path / "run"
    first = train(small_config, point_env, point_demonstrations, run)
    rows = (run / "metrics.csv").read_text()
    (run / "metrics.csv").write_text(rows + "100,6")
    second = train(small_config, point_env, point_demonstrations, run, resume=True)
    again = (run / "metrics.csv").read_text().splitlines()
    assert [r.split(",")[0] for r in again] == [r.split(",")[0] for r in rows.splitlines()]
    del first["wall_s"], second["wall_s"]
    assert first == second


@pytest.mark.parametrize("average", ["evaluation", "always"])
def test_a_run_with_an_average_continues_exactly(
    tmp_path, small_config, point_env, point_demonstrations, average
):
    config = small_config.replace({"agent.average": average, "agent.average_rate": 0.1})
    train(config, point_env, point_demonstrations, tmp_path / "straight")
    train(
        config.replace({"train.steps": 60, "train.eval_every": 20}),
        point_env,
        point_demonstrations,
        tmp_path / "parts",
    )
    train(config, point_env, point_demonstrations, tmp_path / "parts", resume=True)
    one, two = (tensors_of(tmp_path / n)[0] for n in ("straight", "parts"))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    averages, live = (
        {k.removeprefix(prefix) for k in one if k.startswith(prefix)}
        for prefix in ("learner.average.", "learner.model.")
    )
    assert averages == live and averages
    if average == "evaluation":  # it leaves no trace in training
        train(small_config, point_env, point_demonstrations, tmp_path / "off")
        off = tensors_of(tmp_path / "off")[0]
        assert {k for k in one if not k.startswith("learner.average.")} == off.keys()
        assert all(torch.equal(one[k], off[k]) for k in off)


def test_a_checkpoint_from_before_updates_were_skipped_is_continued(
    tmp_path, small_config, point_env, point_demonstrations
):
    train(small_config, point_env, point_demonstrations, tmp_path / "run")
    path, tensors, meta = RunFolder(tmp_path / "run").newest()
    del tensors["learner.skipped_updates"]
    RunFolder(tmp_path / "run").save(100, tensors, meta)
    trainer = Trainer(
        small_config, point_env, point_demonstrations, run=tmp_path / "run", resume=True
    )
    assert trainer.learner.skipped_updates == 0 and trainer.learner.updates == 65


def test_resume_is_exact_where_episodes_end_together(
    tmp_path, three, point_env, point_demonstrations
):
    config = three.replace({"train.steps": 180})

    def go(config, run, **options):
        train(
            config,
            [type(point_env)() for _ in range(3)],
            point_demonstrations,
            tmp_path / run,
            eval_env=point_env,
            **options,
        )

    go(config, "straight")
    go(config.replace({"train.steps": 120}), "parts")
    go(config, "parts", resume=True)
    one, two = (tensors_of(tmp_path / n)[0] for n in ("straight", "parts"))
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_resume_drops_unfinished_episodes_of_the_others(
    tmp_path, three, point_env, point_demonstrations
):
    """Cut in tick 31; the checkpoint of tick 28 holds what had ended by then."""
    config = three.replace({"train.checkpoint_every": 80})
    before, after = marked(fails_at=30), marked()
    killed = Trainer(config, before, point_demonstrations, run=tmp_path / "run", eval_env=point_env)
    killed._rescue = lambda: None  # which a killed process has no time for
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    trainer = Trainer(
        config, after, point_demonstrations, run=tmp_path / "run", eval_env=point_env, resume=True
    )
    assert trainer.env_steps == 84 and len(trainer.behaviour) == 25 + 28 + 22
    assert trainer.episodes == 5 + 4 + 2
    # by the checkpoint: the first two have begun one more since
    used = {seed for env in before for seed in env.seeds[:-1]} | {before[2].seeds[-1]}
    summary = trainer.train()
    assert summary["env_steps"] == 100 and summary["updates"] == 5 + 60
    # 6, 5 and 5 steps more; the sixth begins an episode that is too short for a slice
    assert len(trainer.behaviour) == 25 + 28 + 22 + 5 + 5 + 5
    assert not used & {seed for env in after for seed in env.seeds}


@pytest.mark.parametrize("num_envs", [1, 2])
def test_images_train_resume_and_act(
    tmp_path, small_config, make_image_point, image_demonstrations, num_envs
):
    """40 + 40 steps are 80, from frames; the loaded agent acts and decodes rewards."""
    config = small_config.replace({"train.steps": 80, "train.num_envs": num_envs})

    def go(config, run, **options):
        envs = [make_image_point() for _ in range(num_envs + 1)]
        return train(
            config,
            envs[1:] if num_envs > 1 else envs[0],
            image_demonstrations,
            tmp_path / run,
            eval_env=envs[0],
            **options,
        )

    summary = go(config, "straight")
    go(config.replace({"train.steps": 40}), "parts")
    go(config, "parts", resume=True)
    one, two = (tensors_of(tmp_path / n)[0] for n in ("straight", "parts"))
    assert one["behaviour.obs"].dtype == torch.uint8
    assert one["behaviour.obs"].shape == (84, 1, 64, 64)  # four episodes, every frame once
    assert all(torch.equal(one[k], two[k]) for k in one)

    agent = Agent.load(tmp_path / "straight")
    result = evaluate(agent, make_image_point(), episodes=2, seed=0)
    assert result.return_mean == pytest.approx(summary["return_mean"])
    assert result.episodes[0].observations.shape == (21, 1, 64, 64)
    assert -1 <= reward_correlation(agent, result.episodes) <= 1
    obs = stacked(result.episodes[0].observations)
    agent.reset()
    assert agent.act(obs[0]).shape == (2,)
    with pytest.raises(ValueError, match="images must be uint8, got torch.float32"):
        agent.act(obs[0] / np.float32(255))
    with pytest.raises(ValueError, match="next_obs must be uint8"):
        agent.decode_reward(obs[0], np.zeros(2), obs[1].astype(np.float32))


def test_a_replay_that_was_overwritten_is_not_saved_as_it_was(
    tmp_path, small_config, point_env, point_demonstrations
):
    """The interruption comes when the next episode has taken the place of an older one."""
    config = small_config.replace(
        {"train.capacity": 64, "train.checkpoint_every": 1000, "train.eval_every": 1000}
    )
    trainer = Trainer(config, point_env, point_demonstrations, run=tmp_path / "run")
    keep = trainer.updates.keep

    def keeping(*arguments):
        keep(*arguments)
        if trainer.env_steps == 80:
            raise KeyboardInterrupt

    trainer.updates.keep = keeping
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.behaviour.overwritten == 1 and not RunFolder(tmp_path / "run").has_checkpoint


def test_weights_that_are_not_finite_are_not_saved(
    tmp_path, small_config, point_env, point_demonstrations
):
    trainer = Trainer(small_config, point_env, point_demonstrations, run=tmp_path / "run")
    update = trainer.learner.update

    def spoil(batch):
        metrics = update(batch)
        if trainer.env_steps == 70:
            with torch.no_grad():
                trainer.learner.model.encoder[0].weight[0, 0] = torch.nan
        return metrics

    trainer.learner.update = spoil
    with (
        pytest.raises(CheckpointError, match="step_000000080.*: .* tensors of the learner are not"),
        pytest.warns(RuntimeWarning, match="no trajectory of a plan"),
    ):
        trainer.train()
    assert RunFolder(tmp_path / "run").newest()[2]["env_steps"] == 40


def test_two_processes_do_not_resume_one_run(
    tmp_path, small_config, point_env, point_demonstrations
):
    run = tmp_path / "run"
    train(small_config.replace({"train.steps": 40}), point_env, point_demonstrations, run)
    one, two = (
        Trainer(small_config, point_env, point_demonstrations, run=run, resume=True)
        for _ in range(2)
    )
    with (
        RunFolder(run).locked(),
        pytest.raises(ConfigError, match="run is being trained by another process"),
    ):
        one.train()
    one.train()
    with pytest.raises(ConfigError, match="was continued by another process since step_000000040"):
        two.train()


def test_what_a_kill_has_left_is_removed_at_resume(
    tmp_path, small_config, point_env, point_demonstrations
):
    run = tmp_path / "run"
    train(small_config, point_env, point_demonstrations, run)
    folder = run / "checkpoints"
    first = folder / "step_000000080.safetensors"
    kept = [folder / "step_best.safetensors", folder / "mine.tmp"]
    left = [
        folder / ".step_000000120.safetensors.0123abcd.tmp",
        run / ".config.yaml.00000000.tmp",
        folder / "step_000000020.safetensors",
    ]
    for path in (*kept, *left):
        path.write_bytes(first.read_bytes())
    train(
        small_config.replace({"train.steps": 120}),
        point_env,
        point_demonstrations,
        run,
        resume=True,
    )
    assert all(path.exists() for path in kept) and not any(path.exists() for path in left)
    assert RunFolder(run).newest()[2]["env_steps"] == 120


def test_settings_that_differ_from_the_checkpoints_are_named(
    tmp_path, small_config, point_env, point_demonstrations
):
    run = tmp_path / "run"
    train(small_config, point_env, point_demonstrations, run)
    path = run / "config.yaml"
    path.write_text(path.read_text().replace("rho: 0.5", "rho: 0.7"))
    said = "config.yaml is not what step_000000100.safetensors was made with: learner.rho is 0.7, "
    with pytest.raises(CheckpointError, match=said + "was 0.5"):
        Agent.load(run)
    with pytest.raises(CheckpointError, match=said):
        Trainer(small_config, point_env, point_demonstrations, run=run, resume=True)
    path.write_text(
        path.read_text()
        .replace("rho: 0.7", "rho: 0.5")
        .replace("checkpoint_every: 40", "checkpoint_every: 41")
    )
    messages = []
    Trainer(
        small_config.replace({"train.checkpoint_every": 41, "demos.path": "elsewhere.h5"}),
        point_env,
        point_demonstrations,
        run=run,
        resume=True,
        on_message=messages.append,
    )
    assert messages[0].endswith("train.checkpoint_every is 41, was 40")


def test_another_way_of_computing_is_said_and_another_agent_refused(
    tmp_path, small_config, point_env, point_demonstrations
):
    run = tmp_path / "run"
    train(small_config, point_env, point_demonstrations, run)

    def resumed(changes):
        messages = []
        Trainer(
            small_config.replace(changes),
            point_env,
            point_demonstrations,
            run=run,
            resume=True,
            on_message=messages.append,
        )
        return messages

    assert resumed({"threads": 1}) == ["continuing from step_000000100.safetensors"]
    fused = "the run was made with learner.mode=eager and goes on with fused: not bit for bit"
    assert fused in resumed({"learner.mode": "fused"})
    assert fused in resumed({"learner.mode": "auto"})  # what it comes to here
    assert resumed({"learner.mode": "fused", "learner.precision": "bf16"})[:2] == [
        fused,
        "the run was made with learner.precision=float32 and goes on with bf16: not bit for bit",
    ]
    for changes in ({"agent.average": "always"}, {"agent.average_rate": 0.5}):
        with pytest.raises(ConfigError, match="cannot change when it is resumed: agent.average"):
            resumed(changes)


@pytest.mark.parametrize("mode", ["auto", "fused"])
def test_what_auto_comes_to_stands_in_the_checkpoint(
    tmp_path, small_config, point_env, point_demonstrations, mode
):
    config = small_config.replace({"learner.mode": mode, "train.steps": 60})
    train(config, point_env, point_demonstrations, tmp_path / "run")
    assert RunFolder(tmp_path / "run").newest()[2]["mode"] == "fused"
    messages = []
    Trainer(
        config.replace({"learner.mode": "auto"}),
        point_env,
        point_demonstrations,
        run=tmp_path / "run",
        resume=True,
        on_message=messages.append,
    )
    assert messages == ["continuing from step_000000060.safetensors"]


def test_a_run_of_another_device_goes_on_and_acts_here(
    tmp_path, small_config, point_env, point_demonstrations, monkeypatch
):
    run = tmp_path / "run"
    train(small_config.replace({"train.steps": 40}), point_env, point_demonstrations, run)
    path, tensors, meta = RunFolder(run).newest()
    meta["device"], meta["settings"]["device"] = "cuda", "cuda"
    meta["settings"]["planner"]["precision"] = "tf32"
    for name in ("learner.generator", "trainer.generator"):
        tensors[name] = torch.zeros(16, dtype=torch.uint8)
    RunFolder(run).save(40, tensors, meta)
    changed = small_config.replace({"device": "cuda", "planner.precision": "tf32"})
    RunFolder(run).save_config(changed, new=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with (
        pytest.warns(RuntimeWarning, match="which is not here: acting on the CPU"),
        pytest.warns(RuntimeWarning, match="acting with planner.backend=auto in float32"),
    ):
        agent = Agent.load(run)
    assert evaluate(agent, point_env, episodes=1).returns.shape == (1,)
    with pytest.raises(ConfigError, match="device=cuda was asked for"):
        Agent.load(run, changes={"device": "cuda"})
    messages = []
    train(
        small_config, point_env, point_demonstrations, run, resume=True, on_message=messages.append
    )
    assert any("made on cuda and goes on on cpu: not bit for bit" in m for m in messages)


def scripted(monkeypatch, returns):
    """Evaluations with these returns, success being that of the last 0.5; and what they saw."""
    seen, left = [], iter(returns)

    def evaluate(agent, env, **_):
        value = next(left)
        seen.append({k: v.clone() for k, v in agent.model.state_dict().items()})
        episode = Episode(
            np.zeros((2, 2), np.float32),
            np.zeros((1, 2), np.float32),
            np.array([value], np.float32),
            False,
            None,
        )
        return Evaluation((episode,), (None,))

    monkeypatch.setattr("iqmpc.trainer.evaluate", evaluate)
    return seen


def test_the_best_agent_is_kept(
    tmp_path, small_config, point_env, point_demonstrations, monkeypatch
):
    """Evaluations at 40, 60, 80 and the end; the second is the best, and survives a resumption."""
    config = small_config.replace({"train.eval_every": 20, "train.checkpoint_every": 20})
    run = tmp_path / "run"
    seen = scripted(monkeypatch, [1.0, 2.0, 5.0, 4.0, 3.0])
    train(config, point_env, point_demonstrations, run)
    best = Agent.load(run, checkpoint="best")
    assert best.facts["checkpoint"] == "best.safetensors" and best.facts["env_steps"] == 60
    assert all(torch.equal(v, seen[2][k]) for k, v in best.model.state_dict().items())
    newest = Agent.load(run)
    assert newest.facts["env_steps"] == 100
    assert not all(torch.equal(v, seen[2][k]) for k, v in newest.model.state_dict().items())
    assert Agent.load(run, checkpoint="80").facts["env_steps"] == 80
    with pytest.raises(CheckpointError, match=r"no checkpoint '70': it has 80, 100, best \(newest"):
        Agent.load(run, checkpoint="70")
    # 4.5 is no better than what the run had before it was continued; 6 is.
    scripted(monkeypatch, [4.5, 4.5])
    longer = config.replace({"train.steps": 120})
    train(longer, point_env, point_demonstrations, run, resume=True)
    assert Agent.load(run, checkpoint="best").facts["env_steps"] == 60
    scripted(monkeypatch, [6.0, 6.0])
    longer = config.replace({"train.steps": 140})
    train(longer, point_env, point_demonstrations, run, resume=True)
    assert Agent.load(run, checkpoint="best").facts["env_steps"] == 140
    RunFolder(run).best.unlink()
    with pytest.raises(CheckpointError, match="has no best agent"):
        Agent.load(run, checkpoint="best")


def test_success_comes_before_return_in_what_is_best():
    def of(success, value):
        episode = Episode(
            np.zeros((2, 2), np.float32),
            np.zeros((1, 2), np.float32),
            np.array([value], np.float32),
            False,
            success,
        )
        return Evaluation((episode,), (success,)).score

    assert of(True, -50.0) > of(False, 900.0) > of(False, 1.0) > of(False, np.nan)
    assert of(None, 2.0) > of(None, 1.0)


def test_a_run_stops_at_a_share_of_the_demonstrator(
    tmp_path, small_config, point_env, point_demonstrations, monkeypatch
):
    mean = point_demonstrations.return_mean
    scripted(monkeypatch, [0.5 * mean, 0.91 * mean, 0.8 * mean])
    config = small_config.replace({"train.eval_every": 20, "train.stop_at": 0.9})
    messages = []
    summary = train(
        config, point_env, point_demonstrations, tmp_path / "run", on_message=messages.append
    )
    assert summary["env_steps"] == 40 and summary["ratio"] == pytest.approx(0.8)
    assert "ending here: train.stop_at=0.9 is reached" in messages
    assert RunFolder(tmp_path / "run").newest()[2]["env_steps"] == 40


def test_as_many_checkpoints_as_asked_for_are_kept(
    tmp_path, small_config, point_env, point_demonstrations
):
    config = small_config.replace({"train.keep": 3, "train.checkpoint_every": 20})
    train(config, point_env, point_demonstrations, tmp_path / "run")
    names = sorted(p.name for p in (tmp_path / "run" / "checkpoints").glob("step_*"))
    assert [int(name[5:14]) for name in names] == [60, 80, 100]
