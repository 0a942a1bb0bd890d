"""Fresh demonstration sets and files; session scope, so that hypothesis may use the makers too."""

from pathlib import Path

import numpy as np
import pytest

from iqmpc.demos import Demonstrations, Episode


def _episode(steps=4, obs_dim=3, action_dim=2, seed=0, **fields) -> Episode:
    rng = np.random.default_rng(seed)
    arrays = {
        "observations": rng.normal(size=(steps + 1, obs_dim)).astype(np.float32),
        "actions": rng.uniform(-1, 1, size=(steps, action_dim)).astype(np.float32),
        "rewards": rng.normal(size=steps).astype(np.float32),
    }
    return Episode(**{**arrays, "terminated": False, "success": None, **fields})


def _write_npz(path: Path, demos: Demonstrations, **changes) -> Path:
    """Write the documented flat layout; a change to None leaves the member out."""
    episodes = demos.episodes
    rewards = [e.rewards for e in episodes]
    members = {
        "observations": np.concatenate([e.observations for e in episodes]),
        "actions": np.concatenate([e.actions for e in episodes]),
        "rewards": None if rewards[0] is None else np.concatenate(rewards),
        "episode_lengths": np.array([len(e.actions) for e in episodes]),
        "success": np.array([np.nan if e.success is None else e.success for e in episodes], "f4"),
        "terminated": np.array([e.terminated for e in episodes]),
        "task": np.array(demos.task),
    }
    members = {key: value for key, value in {**members, **changes}.items() if value is not None}
    np.savez(path, **members)
    return path


def _assert_same(one: Demonstrations, other: Demonstrations) -> None:
    assert (one.task, one.provenance, len(one)) == (other.task, other.provenance, len(other))
    for a, b in zip(one.episodes, other.episodes, strict=True):
        for key in ("observations", "actions", "rewards"):
            x, y = getattr(a, key), getattr(b, key)
            assert (x is None) == (y is None), key
            if x is not None:
                assert x.dtype == y.dtype == np.float32
                np.testing.assert_array_equal(x, y, err_msg=key)
        assert type(b.terminated) is bool and a.terminated == b.terminated
        assert a.success is b.success


@pytest.fixture(scope="session")
def make_episode():
    return _episode


@pytest.fixture(scope="session")
def write_npz():
    return _write_npz


@pytest.fixture(scope="session")
def assert_same():
    return _assert_same


@pytest.fixture
def demos() -> Demonstrations:
    """Three episodes of 4, 5 and 6 steps, O = 3, A = 2."""
    episodes = tuple(_episode(4 + i, seed=i) for i in range(3))
    return Demonstrations("walker-walk", episodes, {"demonstrator": "a test"})
