"""Fresh demonstration sets and files; session scope, so that hypothesis may use the makers too.

The formats of others are written by hand from their documentation, Minari's by Minari.
"""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest

from iqmpc import Demonstrations, Episode


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
                assert x.dtype == y.dtype == (np.uint8 if x.ndim == 4 else np.float32)
                np.testing.assert_array_equal(x, y, err_msg=key)
        assert type(b.terminated) is bool and a.terminated == b.terminated
        assert a.success is b.success


def _fill(group: h5py.Group, members: dict) -> None:
    for key, value in members.items():
        if isinstance(value, dict):
            _fill(group.create_group(key), value)
        else:
            group[key] = value


def _write_d4rl(folder: Path, demos: Demonstrations) -> Path:
    """Flat arrays with next_observations; the last step of each episode is a time limit."""
    path = folder / "expert.hdf5"
    ends = [t == len(e.actions) - 1 for e in demos.episodes for t in range(len(e.actions))]
    with h5py.File(path, "w") as file:
        _fill(
            file,
            {
                "observations": np.concatenate([e.observations[:-1] for e in demos.episodes]),
                "next_observations": np.concatenate([e.observations[1:] for e in demos.episodes]),
                "actions": np.concatenate([e.actions for e in demos.episodes]),
                "rewards": np.concatenate([e.rewards for e in demos.episodes]),
                "terminals": np.zeros(len(ends), bool),
                "timeouts": np.array(ends),
                "infos": {"qpos": np.zeros((len(ends), 2))},
            },
        )
    return path


def _write_robomimic(folder: Path, demos: Demonstrations) -> Path:
    """Observations in two members, next_obs beside them, and a mask of two demonstrations."""
    path = folder / "low_dim.hdf5"
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["total"] = demos.transitions
        data.attrs["env_args"] = json.dumps(
            {"env_name": demos.task, "env_type": 1, "env_kwargs": {}}
        )
        for i, e in enumerate(demos.episodes):
            group = data.create_group(f"demo_{i}")
            group.attrs["num_samples"] = len(e.actions)
            _fill(
                group,
                {
                    # robomimic keeps float64
                    "actions": e.actions.astype("f8"),
                    "rewards": e.rewards.astype("f8"),
                    "dones": np.arange(len(e.actions)) == len(e.actions) - 1,
                    "states": np.zeros((len(e.actions), 5)),
                    "obs": {"eef": e.observations[:-1, :1], "object": e.observations[:-1, 1:]},
                    "next_obs": {"eef": e.observations[1:, :1], "object": e.observations[1:, 1:]},
                },
            )
        file["mask/train"] = np.array([b"demo_2", b"demo_0"])
    return path


def _write_maniskill(folder: Path, demos: Demonstrations) -> Path:
    """ManiSkill2's layout, observations in nested members."""
    path = folder / "trajectory.h5"
    with h5py.File(path, "w") as file:
        for i, e in enumerate(demos.episodes):
            success = np.arange(len(e.actions)) == len(e.actions) - 1
            obs = {"agent": {"qpos": e.observations[:, :2]}, "extra": e.observations[:, 2:]}
            _fill(
                file.create_group(f"traj_{i}"),
                {
                    "obs": obs,
                    "actions": e.actions,
                    "rewards": e.rewards,
                    "success": success,
                    "env_states": np.zeros((len(success) + 1, 4), "f4"),
                },
            )
    info = {"env_id": demos.task, "env_kwargs": {"control_mode": "pd_ee_delta_pos"}}
    path.with_suffix(".json").write_text(json.dumps({"env_info": info, "episodes": []}))
    return path


def _write_minari(folder: Path, demos: Demonstrations) -> Path:
    """Minari's own storage writes it."""
    minari = pytest.importorskip("minari")
    import gymnasium
    from minari.data_collector import EpisodeBuffer
    from minari.dataset.minari_storage import MinariStorage

    assert minari.__version__
    path = folder / "task" / "expert-v0"
    (path / "data").mkdir(parents=True)
    box = gymnasium.spaces.Box
    storage = MinariStorage.new(
        path / "data",
        observation_space=box(-np.inf, np.inf, demos.obs_shape, np.float32),
        action_space=box(-1, 1, (demos.action_dim,), np.float32),
        env_spec=gymnasium.envs.registration.EnvSpec(demos.task, entry_point="module:Env"),
    )
    storage.update_episodes(
        EpisodeBuffer(
            id=None,
            seed=i,
            observations=e.observations,
            actions=e.actions,
            rewards=e.rewards.tolist(),
            terminations=[False] * (len(e.actions) - 1) + [e.terminated],
            truncations=[False] * (len(e.actions) - 1) + [not e.terminated],
            infos={},
        )
        for i, e in enumerate(demos.episodes)
    )
    storage.update_metadata({"dataset_id": "task/expert-v0"})
    return path


def _write_lerobot(folder: Path, demos: Demonstrations, version: str = "v2.1") -> Path:
    """v2: a file an episode; v3: all in one. By hand from its documentation."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    path = folder / "dataset"
    (path / "meta").mkdir(parents=True)
    (path / "data/chunk-000").mkdir(parents=True)
    vector = {"dtype": "float32", "names": None}
    features = {
        "observation.state": {**vector, "shape": [*demos.obs_shape]},
        "observation.images.top": {"dtype": "video", "shape": [96, 96, 3], "names": None},
        "action": {**vector, "shape": [demos.action_dim]},
    } | {
        key: {"dtype": dtype, "shape": [1], "names": None}
        for key, dtype in (
            ("next.reward", "float32"),
            ("next.done", "bool"),
            ("timestamp", "float32"),
            ("frame_index", "int64"),
            ("episode_index", "int64"),
            ("index", "int64"),
            ("task_index", "int64"),
        )
    }
    v3 = version.startswith("v3")
    info = {
        "codebase_version": version,
        "total_episodes": len(demos),
        "total_frames": demos.transitions,
        "fps": 10,
        "features": features,
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
        if v3
        else "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
    }
    (path / "meta/info.json").write_text(json.dumps(info))
    tables, index = [], 0
    for i, e in enumerate(demos.episodes):
        steps = len(e.actions)
        state = e.observations[:-1].astype("f4")
        tables.append(
            pa.table(
                {
                    "observation.state": pa.FixedSizeListArray.from_arrays(
                        state.ravel(), demos.obs_shape[0]
                    )
                    if v3
                    else pa.array(list(state)),
                    "action": pa.array(list(e.actions)),
                    "next.reward": e.rewards,
                    "next.done": np.arange(steps) == steps - 1,
                    "timestamp": np.arange(steps, dtype="f4") / 10,
                    "frame_index": np.arange(steps),
                    "episode_index": np.full(steps, i),
                    "index": index + np.arange(steps),
                    "task_index": np.zeros(steps, int),
                }
            )
        )
        index += steps
    if v3:
        parquet.write_table(pa.concat_tables(tables), path / "data/chunk-000/file-000.parquet")
        parquet.write_table(
            pa.table({"task_index": [0], "task": ["push the block"]}), path / "meta/tasks.parquet"
        )
    else:
        for i, table in enumerate(tables):
            parquet.write_table(table, path / f"data/chunk-000/episode_{i:06d}.parquet")
        task = json.dumps({"task_index": 0, "task": "push the block"})
        (path / "meta/tasks.jsonl").write_text(task + "\n")
    return path


WRITERS = {
    "hdf5": lambda folder, demos: (demos.save(folder / "set.h5"), folder / "set.h5")[1],
    "npz": lambda folder, demos: _write_npz(folder / "set.npz", demos),
    "minari": _write_minari,
    "d4rl": _write_d4rl,
    "robomimic": _write_robomimic,
    "maniskill": _write_maniskill,
    "lerobot": _write_lerobot,
}


@pytest.fixture(scope="session")
def write_format():
    """write_format(name, folder, demos, …): the set in that format; the file's or folder's path."""
    return lambda name, folder, *rest: WRITERS[name](folder, *rest)


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
