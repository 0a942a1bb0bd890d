"""When updates are made, on which thread, and that no schedule changes a run."""

import math
import signal
import threading
from fractions import Fraction

import gymnasium
import numpy as np
import pytest
import torch

from iqmpc import Trainer
from iqmpc.errors import ConfigError
from tests.runs import assert_same_state, marked, planned_steps, rows_of, tensors_of, train


def test_the_initial_updates_see_all_random_steps(
    tmp_path, small_config, point_env, point_demonstrations
):
    trainer = Trainer(small_config, point_env, point_demonstrations, run=tmp_path / "run")
    held = []
    update = trainer.learner.update
    trainer.learner.update = lambda batch: held.append(len(trainer.behaviour)) or update(batch)
    trainer.train()
    assert held[:6] == [40] * 6 and trainer.learner.updates == 5 + 60


def test_short_random_phases_lose_no_updates(
    tmp_path, small_config, point_env, point_demonstrations
):
    """Until an episode has ended there is nothing to learn from: act at random, then catch up."""
    config = small_config.replace({"train.random_steps": 5})
    trainer = Trainer(config, point_env, point_demonstrations, run=tmp_path / "run")
    assert planned_steps(trainer) == list(range(20, 100)) and trainer.learner.updates == 5 + 95


def test_updates_on_the_demonstrations_alone(
    tmp_path, small_config, point_env, point_demonstrations
):
    config = small_config.replace({"train.demo_updates": 7, "train.steps": 60})
    trainer = Trainer(config, point_env, point_demonstrations, run=tmp_path / "run")
    at = []
    update = trainer.learner.update
    trainer.learner.update = lambda batch: at.append(trainer.env_steps) or update(batch)
    trainer.train()
    assert at[:7] == [0] * 7 and trainer.learner.updates == 7 + 5 + 20
    with pytest.raises(ConfigError, match="demo_updates needs demonstrations"):
        config.replace({"learner.objective": "td"})


def test_skipped_updates_are_counted_and_said_once(
    tmp_path, small_config, point_env, point_demonstrations
):
    """In summary.json, metrics.csv and checkpoints, over a continuation."""
    trainer = Trainer(small_config, point_env, point_demonstrations, run=tmp_path / "run")
    update = trainer.learner.update

    def spoilt(batch):
        if trainer.learner.updates in (3, 10, 40):
            batch.obs[1, 2] = np.inf
        return update(batch)

    trainer.learner.update = spoilt
    with pytest.warns(RuntimeWarning, match="is not finite and was left out") as warned:
        summary = trainer.train()
    assert len([w for w in warned if "left out" in str(w.message)]) == 1
    assert summary["skipped_updates"] == 3 and summary["updates"] == 65
    tensors, _ = tensors_of(tmp_path / "run")
    assert tensors["learner.skipped_updates"] == 3
    assert all(v.isfinite().all() for k, v in tensors.items() if k.startswith("learner."))
    counted = [r["skipped_updates"] for r in rows_of(tmp_path / "run") if r["return"]]
    assert counted == ["", "1", "2", "3", "3"]  # after 5, 25, 45 and 65 updates
    with pytest.warns(RuntimeWarning, match="was left out"):
        resumed = train(
            small_config.replace({"train.steps": 120}),
            point_env,
            point_demonstrations,
            tmp_path / "run",
            resume=True,
        )
    assert resumed["skipped_updates"] == 3


def overlapping(config, schedule, **changes):
    return config.replace({"train.overlap": schedule, **changes})


def test_overlapped_is_the_same_schedule_in_line(
    tmp_path, small_config, point_env, point_demonstrations
):
    """`async` is `sync` bit for bit, resumed or not; `off` is another schedule, and the default."""

    def go(name, schedule, steps=100, **options):
        config = overlapping(small_config, schedule, **{"train.steps": steps})
        train(config, point_env, point_demonstrations, tmp_path / name, **options)

    for name in ("sync", "async", "off"):
        go(name, name)
    assert_same_state(tmp_path / "sync", tmp_path / "async")
    assert rows_of(tmp_path / "sync") == rows_of(tmp_path / "async")
    for first, then in (("async", "async"), ("sync", "async")):
        go(f"{first}-{then}", first, 60)
        go(f"{first}-{then}", then, 100, resume=True)
        one, two = (tensors_of(tmp_path / n)[0] for n in ("sync", f"{first}-{then}"))
        assert all(torch.equal(one[k], two[k]) for k in one)
    go("default", None)
    assert_same_state(tmp_path / "default", tmp_path / "off")
    one, two = (tensors_of(tmp_path / n)[0] for n in ("sync", "off"))
    assert not torch.equal(one["behaviour.action"], two["behaviour.action"])


def test_overlapped_is_the_same_schedule_with_three_environments(
    tmp_path, three, point_env, point_demonstrations
):
    """Also where episodes end at different times, with two updates a step and none at first."""
    for name in ("sync", "async"):
        config = overlapping(
            three,
            name,
            **{"train.updates_per_step": 2, "train.initial_updates": 0, "train.demo_updates": 3},
        )
        train(config, marked(), point_demonstrations, tmp_path / name, eval_env=point_env)
    assert_same_state(tmp_path / "sync", tmp_path / "async")
    assert rows_of(tmp_path / "sync") == rows_of(tmp_path / "async")


@pytest.mark.parametrize("rate", [0.25, 0.3, 1.5])
def test_a_fraction_of_an_update_for_each_step(
    tmp_path, small_config, point_env, point_demonstrations, rate
):
    """As many as are due at each tick, by each schedule, resumed or not."""
    for schedule in ("off", "sync", "async"):
        config = overlapping(small_config, schedule, **{"train.updates_per_step": rate})
        trainer = Trainer(config, point_env, point_demonstrations, run=tmp_path / schedule)
        tick, made, messages = trainer._tick, [], []
        trainer._reporter.message = messages.append
        trainer._tick = lambda tick=tick, made=made, trainer=trainer: (
            tick(),
            made.append(trainer.learner.updates),
        )[0]
        trainer.train()
        # 40 random steps, then 5 updates and those for each step since
        due = [0] * 39 + [5 + math.floor((n - 40) * Fraction(str(rate))) for n in range(40, 101)]
        late = [n for n, (d, m) in enumerate(zip(due, made, strict=True), 1) if d != m]
        assert all(due[n - 1] - made[n - 1] <= math.ceil(rate) and n % 20 for n in late)
        assert bool(late) == (schedule != "off") and made[-1] == due[-1]
        assert len([m for m in messages if "updates on the first" in m]) == 1
        first = config.replace({"train.steps": 60})
        train(first, point_env, point_demonstrations, tmp_path / f"{schedule}-parts")
        train(config, point_env, point_demonstrations, tmp_path / f"{schedule}-parts", resume=True)
        assert_same_state(tmp_path / schedule, tmp_path / f"{schedule}-parts")
    assert_same_state(tmp_path / "sync", tmp_path / "async")


@pytest.mark.parametrize("schedule", ["off", "sync", "async"])
def test_a_plan_lacks_the_updates_of_one_tick_at_most(
    tmp_path, small_config, point_env, point_demonstrations, schedule
):
    trainer = Trainer(
        overlapping(small_config, schedule), point_env, point_demonstrations, run=tmp_path / "run"
    )
    planner, lacking, saved = trainer.agent.planner, {}, []
    plan, publish, save = planner.plan, planner.publish, trainer._save
    published = 0

    def publish_(weights):
        nonlocal published
        published = trainer.learner.updates
        publish(weights)

    def plan_(obs, explore=False):
        if explore:  # not an evaluation
            lacking[trainer.env_steps] = 5 + trainer.env_steps - 40 - published
        return plan(obs, explore=explore)

    planner.publish, planner.plan = publish_, plan_
    trainer._save = lambda: saved.append((trainer.learner.updates, published)) or save()
    trainer.train()
    # the initial updates (step 40) and those of an episode's last step are waited for
    late = 0 if schedule == "off" else 1
    assert lacking == {step: late if step % 20 else 0 for step in range(40, 100)}
    assert saved == [(5, 5), (45, 45), (65, 65)]


def test_the_environment_steps_while_the_learner_learns(
    tmp_path, small_config, point_env, point_demonstrations
):
    began, stepped = threading.Event(), threading.Event()

    class Waits(gymnasium.Wrapper):
        def step(self, action):
            if trainer.env_steps == 50:
                assert began.wait(60), "no update has begun beside this step"
                stepped.set()
            return self.env.step(action)

    trainer = Trainer(
        overlapping(small_config, "async"),
        Waits(point_env),
        point_demonstrations,
        run=tmp_path / "run",
    )
    update, names = trainer.learner.update, set()

    def update_(batch):
        names.add(threading.current_thread().name)
        if trainer.learner.updates == 14:  # the one of the step before
            began.set()
            assert stepped.wait(60), "the environment waits for the learner"
        return update(batch)

    trainer.learner.update = update_
    trainer.train()
    assert stepped.is_set() and names == {"iqmpc-learner_0"}
    assert not [t for t in threading.enumerate() if t.name.startswith("iqmpc-learner")]


def test_an_error_in_the_learners_thread_is_raised(
    tmp_path, small_config, point_env, point_demonstrations
):
    trainer = Trainer(
        overlapping(small_config, "async"), point_env, point_demonstrations, run=tmp_path / "run"
    )
    update = trainer.learner.update

    def fail(batch):
        if trainer.learner.updates == 20:
            raise FloatingPointError("at update 20")
        return update(batch)

    trainer.learner.update = fail
    with pytest.raises(FloatingPointError, match="at update 20"):
        trainer.train()
    assert trainer.env_steps == 56  # raised in the tick beside which it happened
    assert not [t for t in threading.enumerate() if t.name.startswith("iqmpc-learner")]


@pytest.mark.parametrize("initial", [5, 10**9])
def test_interrupting_an_overlapped_run(
    tmp_path, small_config, point_env, point_demonstrations, initial
):
    """Ctrl-C beside a step, or while the initial updates are waited for: it ends, and resumes."""
    config = overlapping(small_config, "async", **{"train.initial_updates": initial})
    trainer = Trainer(config, point_env, point_demonstrations, run=tmp_path / "run")
    update = trainer.learner.update

    def interrupting(batch):
        if trainer.learner.updates == 14:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        return update(batch)

    trainer.learner.update = interrupting
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.learner.updates < 1000
    assert not [t for t in threading.enumerate() if t.name.startswith("iqmpc-learner")]
    if initial == 5:
        train(config, point_env, point_demonstrations, tmp_path / "run", resume=True)
        train(config, point_env, point_demonstrations, tmp_path / "straight")
        assert_same_state(tmp_path / "run", tmp_path / "straight")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("mode", ["compile", "graph"])
def test_overlapped_is_the_same_schedule_on_a_gpu(
    tmp_path, small_config, point_env, point_demonstrations, mode
):
    config = small_config.replace({"device": "cuda", "learner.mode": mode})
    assert Trainer(config, point_env, point_demonstrations, run=tmp_path).overlap == "async"
    for name in ("sync", "async"):
        train(overlapping(config, name), point_env, point_demonstrations, tmp_path / name)
    train(
        overlapping(config, "async", **{"train.steps": 60}),
        point_env,
        point_demonstrations,
        tmp_path / "parts",
    )
    train(
        overlapping(config, "async"),
        point_env,
        point_demonstrations,
        tmp_path / "parts",
        resume=True,
    )
    assert_same_state(tmp_path / "sync", tmp_path / "async")
    one, two = (tensors_of(tmp_path / n)[0] for n in ("sync", "parts"))
    assert all(torch.equal(one[k], two[k]) for k in one)
