"""What callbacks are told, how one ends a run, and what an error in one leaves."""

import json
import re
from pathlib import Path

import pytest

from iqmpc import Trainer
from iqmpc.callbacks import Callback
from iqmpc.errors import ConfigError
from iqmpc.run_folder import RunFolder

PAGE = Path(__file__).parents[1] / "docs" / "watching.md"


class Told(Callback):
    """Keeps what it is told; `on` = (event, step) says where it ends the run, or raises."""

    def __init__(self, on=None, raises=False):
        self.events, self.on, self.raises = [], on, raises

    def note(self, event, trainer, about):
        self.events.append((event, trainer.env_steps, about))
        if self.on == (event, trainer.env_steps):
            if self.raises:
                raise ZeroDivisionError
            return True
        return None

    def on_step(self, trainer, episodes):
        return self.note("step", trainer, [len(e.actions) for e in episodes])

    def on_episode(self, trainer, episode):
        return self.note("episode", trainer, len(episode.actions))

    def on_evaluation(self, trainer, evaluation):
        return self.note("evaluation", trainer, evaluation.return_mean)

    def on_checkpoint(self, trainer, path):
        return self.note("checkpoint", trainer, path)

    def steps_of(self, event):
        return [step for name, step, _ in self.events if name == event]


@pytest.fixture
def train(tmp_path, small_config, point_env, point_demonstrations):
    def run(*callbacks, **options):
        messages = []
        trainer = Trainer(
            small_config.replace(options.pop("changes", {})),
            point_env,
            point_demonstrations,
            run=tmp_path / "run",
            callbacks=callbacks,
            on_message=messages.append,
            **options,
        )
        return trainer.train(), messages

    return run


def test_everything_is_told(train, tmp_path):
    told = Told()
    summary, _ = train(Callback(), told)
    assert told.steps_of("step") == list(range(1, 101))
    assert [about for name, _, about in told.events if name == "step"][18:22] == [
        [19],
        [20],
        [1],
        [2],
    ]
    assert told.steps_of("episode") == [20, 40, 60, 80, 100]
    assert told.steps_of("evaluation") == [40, 80, 100]
    assert told.events[-1][2] == summary["return_mean"]
    (*_, last) = [path for name, _, path in told.events if name == "checkpoint"]
    assert last == sorted((tmp_path / "run" / "checkpoints").glob("step_*"))[-1]


@pytest.mark.parametrize("event, step", [("step", 47), ("episode", 60), ("evaluation", 40)])
def test_each_may_end_the_run_which_then_goes_on(train, tmp_path, event, step):
    told, other = Told((event, step)), Told()
    summary, messages = train(told, other)
    assert summary["env_steps"] == step == RunFolder(tmp_path / "run").newest()[2]["env_steps"]
    assert f"step {step}: Told.on_{event} ends the run" in messages
    assert other.events == told.events and told.steps_of("evaluation")[-1] == step
    assert told.steps_of("episode")[-1] == step  # an episode inside which it ends, too
    assert train(resume=True)[0]["env_steps"] == 100


def test_a_checkpoint_may_end_the_run(train):
    told = Told(("checkpoint", 40))
    summary, _ = train(told, changes={"train.checkpoint_every": 40})
    assert summary["env_steps"] == 40 and told.steps_of("checkpoint") == [40]


@pytest.mark.parametrize("event, step, saved", [("step", 47, 40), ("episode", 60, 60)])
def test_an_error_leaves_the_last_whole_episode(train, tmp_path, event, step, saved):
    with pytest.raises(ZeroDivisionError):
        train(Told((event, step), raises=True))
    assert RunFolder(tmp_path / "run").newest()[2]["env_steps"] == saved
    assert train(resume=True)[0]["env_steps"] == 100


def test_what_is_no_callback_is_named(train, tmp_path):
    with pytest.raises(ConfigError, match="instances of iqmpc.callbacks.Callback, got <class"):
        train(Callback)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not PAGE.exists(), reason="the documentation is not beside the tests")
def test_the_examples_of_the_page(train, tmp_path):
    names = {}
    for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S):
        exec(compile(code, PAGE.name, "exec"), names)
    away = tmp_path / "away"
    summary, messages = train(names["GoodForAWhile"](-1e9, 3), names["CopyAway"](away))
    assert summary["env_steps"] == 60
    assert "step 60: GoodForAWhile.on_episode ends the run" in messages
    assert (away / "step_000000060.safetensors").stat().st_size
    rows = [json.loads(line) for line in (away / "evaluations.jsonl").read_text().splitlines()]
    assert [row["env_steps"] for row in rows] == [40, 60]
    assert rows[-1]["return"] == summary["return_mean"]
