"""Sets in memory and on disk: what is saved is what is loaded, and nothing unsound is either."""

import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iqmpc.demos import DemonstrationError, Demonstrations, Episode
from iqmpc.demos.demonstrations import packaged_path, packaged_tasks

DOCS = Path(__file__).parents[2] / "docs" / "demonstrations.md"


def make_episode(steps=4, obs_dim=3, action_dim=2, seed=0, rewards=True, **fields) -> Episode:
    rng = np.random.default_rng(seed)
    arrays = {
        "observations": rng.normal(size=(steps + 1, obs_dim)).astype(np.float32),
        "actions": rng.uniform(-1, 1, size=(steps, action_dim)).astype(np.float32),
        "rewards": rng.normal(size=steps).astype(np.float32) if rewards else None,
    }
    return Episode(**{**arrays, "terminated": False, "success": None, **fields})


def assert_same(one: Demonstrations, other: Demonstrations) -> None:
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


@st.composite
def sets(draw) -> Demonstrations:
    obs_dim, action_dim = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    rewards, success = draw(st.booleans()), draw(st.booleans())
    episodes = [
        make_episode(
            steps,
            obs_dim,
            action_dim,
            seed,
            rewards,
            terminated=draw(st.booleans()),
            success=draw(st.booleans()) if success else None,
        )
        for seed, steps in enumerate(draw(st.lists(st.integers(1, 12), min_size=1, max_size=4)))
    ]
    text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
    name = draw(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=8))
    return Demonstrations(name, tuple(episodes), draw(st.dictionaries(text, text, max_size=3)))


def write_npz(path: Path, demos: Demonstrations, **changes) -> Path:
    """Write the flat layout; a change to None leaves the member out."""
    episodes = demos.episodes
    members = {
        "observations": np.concatenate([e.observations for e in episodes]),
        "actions": np.concatenate([e.actions for e in episodes]),
        "rewards": None
        if episodes[0].rewards is None
        else np.concatenate([e.rewards for e in episodes]),
        "episode_lengths": np.array([len(e.actions) for e in episodes]),
        "success": np.array([np.nan if e.success is None else e.success for e in episodes], "f4"),
        "terminated": np.array([e.terminated for e in episodes]),
        "task": np.array(demos.task),
    }
    members = {k: v for k, v in {**members, **changes}.items() if v is not None}
    np.savez(path, **members)
    return path


@settings(max_examples=60, deadline=None)
@given(demos=sets())
def test_hdf5_round_trip(tmp_path_factory, demos):
    path = tmp_path_factory.mktemp("h5") / "set.h5"
    demos.save(path)
    assert_same(demos, Demonstrations.load(path))


@settings(max_examples=60, deadline=None)
@given(demos=sets())
def test_npz_is_read_as_documented(tmp_path_factory, demos):
    path = write_npz(tmp_path_factory.mktemp("npz") / "set.npz", demos)
    assert_same(replace(demos, provenance={}), Demonstrations.load(path))


def test_an_episode_longer_than_a_chunk(tmp_path):
    demos = Demonstrations("t", (make_episode(2500),))
    demos.save(tmp_path / "set.hdf5")
    assert_same(demos, Demonstrations.load(tmp_path / "set.hdf5"))


def test_figures_of_a_set():
    episodes = (
        make_episode(2, rewards=False, rewards_=None)
        if False
        else replace(make_episode(2), rewards=np.array([1, 2], "f4"), success=True),
        replace(make_episode(3), rewards=np.array([1, 1, 3], "f4"), success=False),
    )
    demos = Demonstrations("t", episodes)
    assert (demos.obs_dim, demos.action_dim, len(demos), demos.transitions) == (3, 2, 2, 5)
    np.testing.assert_array_equal(demos.returns(), [3.0, 5.0])
    assert (demos.return_mean, demos.success_rate) == (4.0, 0.5)


