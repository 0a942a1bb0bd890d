import dataclasses
import math

import pytest
import yaml

from iqmpc.composition import SUITES, ablation, compose, departures, options, parse
from iqmpc.config import Config, all_keys, names_task
from iqmpc.envs import TASKS, dmcontrol, maniskill, myosuite
from iqmpc.errors import ConfigError


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["task=walker-wlak"], "unknown task 'walker-wlak'; did you mean 'walker-walk'?"),
        (["preset=gpu"], "unknown preset 'gpu'"),
        (["learner.bach=3"], "unknown setting 'learner.bach'; did you mean 'learner.batch'?"),
        (["batch=3"], "unknown setting 'batch'; did you mean 'learner.batch'?"),
        (["lerner.batch=3"], "unknown setting 'lerner.batch'; did you mean 'learner.batch'?"),
        (["learner.batch.size=3"], "unknown setting 'learner.batch.size'"),
        (["learner.batch=many"], "learner.batch must be int, got 'many' (str)"),
        (["learner.batch=2.5"], "learner.batch must be int, got 2.5 (float)"),
        (["learner.batch=true"], "learner.batch must be int, got True (bool)"),
        (["learner.lr=fast"], "learner.lr must be float, got 'fast' (str)"),
        (["learner.lr=inf"], "learner.lr must be finite, got inf"),
        (["planner.enabled=1"], "planner.enabled must be bool, got 1 (int)"),
        (["learner.objective=tdd"], "must be one of iq, v_diff, td, got 'tdd'; did you mean 'td'?"),
        (["learner=5"], "unknown learner '5' (known: iq, td, v_diff)"),
        (["train=5"], "train must be a mapping, got 5"),
        (
            ["planner.elites=600", "planner.samples=500"],
            "planner.elites must be at most planner.samples, got 600 and 500",
        ),
        (["model.latent_dim=100"], "must be a multiple of model.simnorm_dim, got 100 and 8"),
        (["train.steps=0"], "train.steps must be at least 1, got 0"),
        (["train.steps=3000000000"], "train.steps must be at most 2147483647, got 3000000000"),
        (["planner.samples=99999999999999999999"], "planner.samples must be at most 2147483647"),
        (["planner.threads=5000000000"], "planner.threads must lie in [1, 1024], got 5000000000"),
        (["learner.rho=1.5"], "learner.rho must lie in [0, 1], got 1.5"),
        (
            ["agent.average=ever"],
            "agent.average must be one of off, evaluation, always, got 'ever'",
        ),
        (["agent.average_rate=0"], "agent.average_rate must be positive, got 0.0"),
        (["agent.average_rate=1.5"], "agent.average_rate must lie in [0, 1], got 1.5"),
        (
            ["learner.entropy=squash"],
            "learner.entropy must be one of exact, presquash, got 'squash'",
        ),
        (
            ["learner.dropout=never"],
            "learner.dropout must be one of regression, always, got 'never'",
        ),
        (["learner.lr=0"], "learner.lr must be positive, got 0.0"),
        (["train.updates_per_step=0"], "train.updates_per_step must be positive, got 0"),
        (["train.updates_per_step=-0.5"], "train.updates_per_step must be positive, got -0.5"),
        (["train.updates_per_step=inf"], "train.updates_per_step must be finite, got inf"),
        (["train.updates_per_step=nan"], "train.updates_per_step must be finite, got nan"),
        (["train.updates_per_step=true"], "train.updates_per_step must be float, got True (bool)"),
        (["train.updates_per_step=few"], "train.updates_per_step must be float, got 'few' (str)"),
        (["steps"], "expected key=value, got 'steps'"),
        (["+train.steps=3"], "expected key=value, got '+train.steps=3'"),
        (["seed=1,2"], "expected key=value, got 'seed=1,2'"),
        (["train.steps=[1"], "cannot read 'train.steps=[1'"),
    ],
)
def test_what_is_wrong_is_named(words, message):
    with pytest.raises(ConfigError) as caught:
        compose(words)
    assert message in str(caught.value)


def test_what_the_command_line_names_wins():
    assert compose(["model=paper"]).model.latent_dim == 512  # over the preset's choice
    config = compose(
        [
            "task=cheetah-run",
            "learner.lr=1e-3",
            "train.steps=1e5",
            "seed=3",
            "demos.path=a.h5",
            "planner.iterations=null",
        ]
    )
    assert config.task.name == "cheetah-run" and config.learner.lr == 1e-3
    assert config.train.steps == 100_000 and config.seed == 3
    assert config.demos.path == "a.h5" and config.planner.iterations is None


def test_the_paper_preset_is_the_papers_settings():
    paper = compose(["preset=paper"])
    assert paper.model == Config().model and paper.learner.batch == 256
    planner = dataclasses.replace(paper.planner, mode="eager")
    assert planner == Config().planner


@pytest.mark.parametrize("group", ["task", "model", "planner", "learner", "agent", "preset"])
def test_every_option_composes(group):
    for option in options(group):
        compose([f"{group}={option}"])


def test_every_task_file_is_a_task_of_its_suite():
    assert set(options("task")) == set(TASKS) | {"gym"}
    suites = {"dmcontrol": dmcontrol, "myosuite": myosuite, "maniskill": maniskill}
    assert {name: TASKS[name].suite for name in TASKS} == {
        name: suite for suite, module in suites.items() for name in module.TASKS
    }
    for name in TASKS:
        assert compose([f"task={name}"]).task == TASKS[name]


@pytest.mark.parametrize(
    ("word", "value", "kind", "rate"),
    [
        ("2", 2, int, (2, 1)),
        ("0.25", 0.25, float, (1, 4)),
        ("0.1", 0.1, float, (1, 10)),
        ("1e-3", 1e-3, float, (1, 1000)),
        ("1.5", 1.5, float, (3, 2)),
        ("3.0", 3.0, float, (3, 1)),
    ],
)
def test_updates_per_step_is_a_number_as_it_is_written(word, value, kind, rate):
    config = compose([f"train.updates_per_step={word}"])
    again = Config.from_dict(yaml.safe_load(yaml.safe_dump(config.to_dict())))
    for train in (config.train, again.train):
        assert train.updates_per_step == value and type(train.updates_per_step) is kind
        assert train.update_rate.as_integer_ratio() == rate
    assert again == config


def test_a_tenth_of_a_million_steps_is_a_hundred_thousand_updates():
    """Where floats would be one short now and then, as 0.29 · 100 is."""
    rate = compose(["train.updates_per_step=0.1"]).train.update_rate
    assert all(math.floor(steps * rate) == steps // 10 for steps in range(0, 1_000_001, 7))
    assert math.floor(1_000_000 * rate) == 100_000
    rate = compose(["train.updates_per_step=0.29"]).train.update_rate
    assert math.floor(100 * rate) == 29 != math.floor(100 * 0.29)


def test_off_is_a_word_and_not_a_boolean():
    config = compose(["train.overlap=off", "agent.average=off", "learner.mode=graph"])
    assert config.train.overlap == config.agent.average == "off" and config.learner.mode == "graph"
    assert Config.from_dict(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config


def test_round_trip_through_a_dictionary():
    config = compose(["task=dog-run", "learner.gradient_penalty=true", "threads=2"])
    assert Config.from_dict(config.to_dict()) == config


def test_derived_values():
    config = Config()
    assert config.discount == pytest.approx(0.99)  # L = 500: (100 - 1) / 100
    assert Config.from_dict({"task": {"episode_length": 100}}).discount == pytest.approx(0.95)
    assert Config.from_dict({"task": {"episode_length": 10_000}}).discount == 0.995
    assert config.random_steps == config.initial_updates == 2500
    assert Config.from_dict({"task": {"episode_length": 100}}).random_steps == 1000
    assert not config.gradient_penalty
    assert config.replace({"task.gradient_penalty": True}).gradient_penalty
    assert not config.replace(
        {"task.gradient_penalty": True, "learner.gradient_penalty": False}
    ).gradient_penalty


def test_the_entropy_coefficient_grows_with_the_actions():
    config = Config().replace({"learner.beta": 0.02})
    assert Config().learner.entropy_scale == "action_dim"
    assert config.entropy_coefficient(39) == pytest.approx(0.78)
    one = config.replace({"learner.entropy_scale": "one"})
    assert one.entropy_coefficient(39) == one.entropy_coefficient(6) == 0.02
    assert Config().entropy_coefficient(6) == pytest.approx(6e-4)


def test_a_configuration_from_before_a_section_is_read():
    values = Config().to_dict()
    del values["agent"], values["learner"]["entropy"], values["learner"]["dropout"]
    assert Config.from_dict(values) == Config()
    assert Config().agent.average == "off" and Config().agent.average_rate == 0.005


def test_compose_inside_a_hydra_program():
    """`@hydra.main` holds Hydra's one instance; composing must neither fail nor take it away."""
    from hydra import initialize_config_module
    from hydra.core.global_hydra import GlobalHydra

    with initialize_config_module("iqmpc.configs", version_base="1.3"):
        theirs = GlobalHydra.instance().hydra
        assert compose(["seed=3"]).seed == 3
        assert GlobalHydra.instance().hydra is theirs
    assert not GlobalHydra.instance().is_initialized()


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 3
    assert "learner.batch" in all_keys() and "run_dir" in all_keys()


def test_the_task_decides_on_the_termination_head():
    assert not compose(["task=walker-walk"]).termination
    gym = compose(["task=gym", "env_id=Hopper-v4"])
    assert gym.termination and gym.task.terminates
    assert not gym.replace({"task.terminates": False}).termination
    assert not gym.replace({"model.termination": False}).termination
    assert compose(["task=walker-walk", "model.termination=true"]).termination
    with pytest.raises(ConfigError, match="learner.termination_weight must be positive, got 0"):
        gym.replace({"learner.termination_weight": 0})


@pytest.mark.parametrize(
    "value",
    [
        "é.h5",
        "a,b",
        "a=b",
        "~/x",
        "(a",
        "[a",
        "a b",
        "{a",
        "$x",
        "2020-10-10",
        "123",
        "a'b",
        "a: b",
    ],
)
def test_text_is_taken_as_it_stands(value):
    config = compose([f"demos.path={value}", f"run_dir={value}", "task=gym", f"env_id={value}"])
    assert (config.demos.path, config.run_dir, config.task.env_id) == (value,) * 3
    assert parse([f"resume={value}"]) == {"resume": value}


def test_text_may_be_quoted_or_null():
    assert compose(["demos.path='a b'", 'run_dir="null"']).demos.path == "a b"
    assert compose(['run_dir="null"']).run_dir == "null"
    assert compose(["demos.path=null"]).demos.path is None
    assert compose(["demos.path="]).demos.path == ""


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "word",
    [
        "seed=" + "9" * 5000,
        "seed=" + "9" * 90,
        "seed=" + "[" * 99,
        "learner.lr=(" * 9,
        "k" * 60000 + "=1",
        "seed=" + "x" * 60000,
        "x" * 60000,
        "learner.mode=" + "é" * 90,
        "task=" + "x" * 60000,
    ],
)
def test_hostile_words_are_refused_in_one_line(word):
    with pytest.raises(ConfigError) as caught:
        compose([word])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("word", "near"),
    [
        ("tsk=walker-walk", "task"),
        ("env=x", "env_id"),
        ("presets=cpu", "preset"),
        ("resum=runs/x", "resume"),
    ],
)
def test_groups_and_short_names_are_suggested(word, near):
    with pytest.raises(ConfigError, match=f"did you mean '{near}'"):
        compose([word])


@pytest.mark.parametrize(
    ("given", "env_id", "same"),
    [
        ("HalfCheetah-v4", "HalfCheetah-v4", True),
        ("Cart-v0", "dictenv:Cart-v0", True),
        ("dictenv:Cart-v0", "dictenv:Cart-v0", True),
        ("Cart-v1", "dictenv:Cart-v0", False),
        ("gym-cart-v0", "dictenv:Cart-v0", True),
        ("gym-envs-make", "envs:make", True),
        ("make", "envs:make", False),
    ],
)
def test_a_package_does_not_count_in_the_name_of_a_gym_task(given, env_id, same):
    assert names_task(given, compose(["task=gym", f"env_id={env_id}"]).task.name) is same


def test_a_task_of_ones_own_has_nothing_of_the_default_tasks():
    own = compose(["task.name=pendulum", "task.suite=own"]).task
    assert (own.action_repeat, own.gradient_penalty, own.terminates) == (1, False, False)
    assert compose(["task.suite=own", "task.action_repeat=3"]).task.action_repeat == 3
    assert compose(["task=walker-walk"]).task.action_repeat == 2


def test_suites_are_those_whose_environments_are_made():
    from iqmpc.envs import _SUITES

    assert set(SUITES) == set(_SUITES)


def test_a_run_knows_its_preset():
    assert compose().preset == "cpu" and compose(["preset=pixels"]).preset == "pixels"
    assert Config().preset is None


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], ""),
        (["task=dog-run", "preset=paper", "seed=3", "train.steps=7", "threads=1"], ""),
        (["preset=pixels", "task=cheetah-run"], ""),
        (["task=gym", "env_id=HalfCheetah-v4"], ""),
        (["task=gym", "env_id=my.module:make", "task.terminates=false"], "task.terminates=false"),
        (
            ["learner.batch=128", "learner.lr=1e-3", "learner.gradient_penalty=null"],
            "learner.batch=128 learner.gradient_penalty=null learner.lr=0.001",
        ),
        (["learner=td", "planner.iterations=null"], "planner.iterations=null learner.objective=td"),
        (["demos.path=/data/mine.h5", "demos.episodes=5"], "demos.path=mine.h5 demos.episodes=5"),
        (
            ["task.name=own", "task.suite=own", "task.episode_length=9", "model.critics=3"],
            "model.critics=3",
        ),
    ],
)
def test_what_departs_from_task_and_preset(words, text):
    assert ablation(compose(words)) == text
    if "demos.path" not in text and "terminates" not in text:
        again = compose(text.split())
        assert departures(again) == departures(compose(words))


def test_departures_are_from_the_default_preset_where_none_is_named():
    config = compose(["learner.batch=128"]).replace({"preset": None})
    assert departures(config) == {"learner.batch": 128}
    with pytest.raises(ConfigError, match="unknown preset 'gone'"):
        departures(config.replace({"preset": "gone"}))


@pytest.mark.parametrize(
    ("planner", "expected"),
    [
        (dict(mode="compile"), ("eager", None)),  # what the preset cpu said before 0.2
        (dict(mode="compile", backend="cpu", threads=2), ("eager", 2)),
        (dict(mode="compile", backend="reference", threads=2), ("compile", None)),
        (dict(backend="triton", threads=2), ("eager", None)),
        (dict(threads=2), ("eager", 2)),
    ],
)
def test_settings_that_a_backend_ignored_are_not_restored(planner, expected):
    config = Config.restored({"planner": planner, "seed": 3})
    assert (config.planner.mode, config.planner.threads) == expected and config.seed == 3
    assert Config.restored(config.to_dict()) == config
    with pytest.raises(ConfigError, match="planner must be a mapping, got 7"):
        Config.restored({"planner": 7})
