"""Recording a demonstrator: what is kept, what is counted, and that it can be repeated."""

import numpy as np
import pytest

from iqmpc import make_env
from iqmpc.demonstrators import DEMONSTRATORS, Demonstrator, record
from iqmpc.demos import DemonstrationError


class Straight:
    """Walks to the origin, except in every third episode, where it stands still."""

    def __init__(self):
        self.episodes = 0

    def reset(self, env):
        self.start = env.unwrapped.position.copy()  # a demonstrator may look into its task
        self.episodes += 1

    def __call__(self, obs):
        return -obs / 0.2 if self.episodes % 3 else np.zeros(2)


def make(env, **options):
    demonstrator = Demonstrator(Straight(), provenance={"demonstrator": "straight line"})
    return record(demonstrator, env, **{"task": "point", "max_tries": 20, **options})


def test_episodes_are_kept_until_there_are_enough(point_env):
    seen = []
    found = make(
        point_env, episodes=4, successes_only=True, progress=lambda *values: seen.append(values)
    )
    assert len(found) == 4 and found.success_rate == 1.0 and found.task == "point"
    assert found.provenance["kept"] == "4 of 5 with success"
    assert found.provenance["demonstrator"] == "straight line"
    assert found.provenance["seed"] == "0" and "iqmpc 0" in found.provenance["versions"]
    assert f"numpy {np.__version__}" in found.provenance["versions"]
    assert [kept for kept, _, _ in seen] == [1, 2, 2, 3, 4]
    assert [tried for _, tried, _ in seen] == [1, 2, 3, 4, 5]
    assert [r for (k, *_, r), e in zip(seen[:2], found.episodes[:2], strict=True)] == [
        pytest.approx(e.rewards.sum()) for e in found.episodes[:2]
    ]


def test_the_demonstrator_says_whether_successes_are_kept_and_how_noisy_it_is(point_env):
    demonstrator = Demonstrator(Straight(), successes_only=True, noise=0.5)
    options = {"task": "point", "episodes": 3, "max_tries": 9}
    found = record(demonstrator, point_env, **options)
    assert found.provenance["kept"].endswith("with success")
    assert found.provenance["action_noise"] == "0.5"
    found = record(demonstrator, point_env, **options, successes_only=False, noise=0.0)
    assert found.provenance["kept"] == "3 of 3" and "action_noise" not in found.provenance


def test_the_same_arguments_give_the_same_episodes(point_env, assert_same):
    one, other = (make(point_env, episodes=4, noise=0.3, seed=5) for _ in range(2))
    assert_same(one, other)
    different = make(point_env, episodes=4, noise=0.3, seed=6)
    assert not np.array_equal(one.episodes[0].actions, different.episodes[0].actions)


def test_noise_has_its_spread_and_actions_stay_in_range(point_env):
    noisy = make(point_env, episodes=20, noise=0.2)
    still = [e.actions for i, e in enumerate(noisy.episodes) if i % 3 == 2]  # noise alone
    assert np.std(still) == pytest.approx(0.2, rel=0.1)
    assert abs(np.concatenate([e.actions for e in noisy.episodes])).max() == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"episodes": 5, "max_tries": 6, "successes_only": True},
            "4 of 5 episodes were kept after 6 tries: 4 succeeded",
        ),
        (
            {"episodes": 2, "max_tries": 3, "min_return": 1e6},
            r"0 of 2 episodes were kept after 3 tries: 0 reached a return of 1e\+06",
        ),
        (
            {"episodes": 3, "max_tries": 3, "min_return": 1.0, "successes_only": True},
            "2 of 3 episodes were kept after 3 tries: 2 reached a return of 1, 2 succeeded",
        ),
        ({"episodes": 5, "max_tries": 4}, "5 episodes cannot be kept from 4 tries"),
    ],
)
def test_too_few_are_an_error_that_counts(point_env, options, message):
    with pytest.raises(DemonstrationError, match=f"^{message}$"):
        make(point_env, **options)


def test_fewer_may_do(point_env):
    found = make(point_env, episodes=6, max_tries=6, successes_only=True, fewer=True)
    assert found.provenance["kept"] == "4 of 6 with success"
    with pytest.raises(DemonstrationError, match="0 of 6 episodes were kept after 6 tries"):
        make(point_env, episodes=6, max_tries=6, min_return=1e6, fewer=True)


def test_success_cannot_be_asked_of_a_task_that_tells_none(point_env, monkeypatch):
    step = type(point_env).step
    monkeypatch.setattr(type(point_env), "step", lambda self, a: (*step(self, a)[:4], {}))
    with pytest.raises(DemonstrationError, match="point tells no success, so none can be selected"):
        make(point_env, episodes=1, successes_only=True)


def test_actions_beyond_finite_numbers_are_not_saved(point_env):
    class Broken(Straight):
        def __call__(self, obs):
            return np.full(2, np.nan)

    with pytest.raises(DemonstrationError, match="actions: found nan"):
        record(Demonstrator(Broken()), point_env, task="point", episodes=1, max_tries=1)


def test_a_plain_function_demonstrates(point_env):
    kept = record(lambda obs: -obs, point_env, task="point", episodes=2, max_tries=2)
    assert len(kept) == 2


def test_a_task_with_a_demonstrator_of_its_own_is_made_by_it():
    pytest.importorskip("myosuite")
    env, seeds = make_env("myo-obj-hold"), (0, 0, 1)
    made = [
        record(
            DEMONSTRATORS["myo-obj-hold"](env, seed),
            env,
            task="myo-obj-hold",
            episodes=1,
            max_tries=20,
            seed=seed,
        )
        for seed in seeds
    ]
    assert made[0].success_rate == 1 and made[0].provenance["kept"].endswith("with success")
    np.testing.assert_array_equal(made[0].episodes[0].actions, made[1].episodes[0].actions)
    assert not np.array_equal(made[0].episodes[0].actions, made[2].episodes[0].actions)
    assert set(DEMONSTRATORS) == {"myo-key-turn", "myo-obj-hold", "lift-cube", "pick-cube"}
