"""Small sound files of every format that the program reads, of which damaged ones are made."""

from __future__ import annotations

import collections
import io
import json
import pickle
import sys
import types
import zipfile
from pathlib import Path
from typing import Any
from unittest import mock

import gymnasium
import h5py
import numpy as np
import torch

import iqmpc
from tests.fuzz.damage import Files

TASK = "point"
OBS, ACTIONS = 3, 2


def _episodes(seed: int = 0) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [
        {
            "observations": rng.normal(size=(steps + 1, OBS)).astype(np.float32),
            "actions": rng.uniform(-1, 1, (steps, ACTIONS)).astype(np.float32),
            "rewards": rng.normal(size=steps).astype(np.float32),
        }
        for steps in (4, 6)
    ]


def _hdf5(groups: dict[str, Any], attrs: dict[str, Any] | None = None, **how: Any) -> bytes:
    """Groups and datasets as nested dictionaries, attributes by path."""
    buffer = io.BytesIO()

    def fill(group: h5py.Group, members: dict[str, Any]) -> None:
        for key, value in members.items():
            if isinstance(value, dict):
                fill(group.create_group(key), value)
            elif how and np.ndim(value):
                group.create_dataset(key, data=value, **how)
            else:
                group[key] = value

    with h5py.File(buffer, "w") as file:
        fill(file, groups)
        for path, value in (attrs or {}).items():
            place, _, key = path.rpartition("/")
            file[place or "/"].attrs[key] = value
    return buffer.getvalue()


def own(folder: Path) -> list[Files]:
    files = []
    for seed in range(2):
        demos = iqmpc.Demonstrations(
            TASK, tuple(iqmpc.Episode(**e) for e in _episodes(seed)), {"demonstrator": "a test"}
        )
        demos.save(folder / "set.h5")
        files.append({"set.h5": (folder / "set.h5").read_bytes()})
    return files


def npz(folder: Path) -> list[Files]:
    episodes, files = _episodes(), []
    members = {
        **{
            k: np.concatenate([e[k] for e in episodes])
            for k in ("observations", "actions", "rewards")
        },
        "episode_lengths": np.array([len(e["actions"]) for e in episodes]),
        "success": np.array([0, 1], np.float32),
        "terminated": np.array([False, True]),
        "task": np.array(TASK),
    }
    for save in (np.savez, np.savez_compressed):
        buffer = io.BytesIO()
        save(buffer, **members)
        files.append({"set.npz": buffer.getvalue()})
    return files


def d4rl(folder: Path) -> list[Files]:
    episodes, files = _episodes(), []
    ends = np.concatenate([np.arange(len(e["actions"])) == len(e["actions"]) - 1 for e in episodes])
    flat = {
        "observations": np.concatenate([e["observations"][:-1] for e in episodes]),
        "next_observations": np.concatenate([e["observations"][1:] for e in episodes]),
        "actions": np.concatenate([e["actions"] for e in episodes]),
        "rewards": np.concatenate([e["rewards"] for e in episodes]),
        "terminals": np.zeros(len(ends), bool),
        "timeouts": ends,
        "infos": {"qpos": np.zeros((len(ends), 2))},
    }
    for how in ({}, {"compression": "gzip", "chunks": True}):
        files.append({"expert.hdf5": _hdf5(flat, **how)})
    return files


def robomimic(folder: Path) -> list[Files]:
    groups: dict[str, Any] = {"data": {}, "mask": {"train": np.array([b"demo_1", b"demo_0"])}}
    attrs: dict[str, Any] = {
        "data/env_args": json.dumps({"env_name": TASK, "env_type": 1, "env_kwargs": {}}),
        "data/total": 10,
    }
    for i, e in enumerate(_episodes()):
        obs = e["observations"]
        groups["data"][f"demo_{i}"] = {
            "actions": e["actions"].astype("f8"),
            "rewards": e["rewards"].astype("f8"),
            "dones": np.zeros(len(e["actions"])),
            "states": np.zeros((len(e["actions"]), 5)),
            "obs": {"eef": obs[:-1, :1], "object": obs[:-1, 1:]},
            "next_obs": {"eef": obs[1:, :1], "object": obs[1:, 1:]},
        }
        attrs[f"data/demo_{i}/num_samples"] = len(e["actions"])
    return [{"low_dim.hdf5": _hdf5(groups, attrs)}]


def maniskill(folder: Path) -> list[Files]:
    groups = {
        f"traj_{i}": {
            "obs": {"agent": {"qpos": e["observations"][:, :2]}, "extra": e["observations"][:, 2:]},
            "actions": e["actions"],
            "rewards": e["rewards"],
            "success": np.arange(len(e["actions"])) == len(e["actions"]) - 1,
        }
        for i, e in enumerate(_episodes())
    }
    info = {"env_info": {"env_id": TASK, "env_kwargs": {"control_mode": "pd_ee"}}, "episodes": []}
    return [{"trajectory.h5": _hdf5(groups), "trajectory.json": json.dumps(info).encode()}]


def minari(folder: Path) -> list[Files]:
    groups = {
        f"episode_{i}": {
            "observations": e["observations"],
            "actions": e["actions"],
            "rewards": e["rewards"].astype("f8"),
            "terminations": np.zeros(len(e["actions"]), bool),
            "truncations": np.arange(len(e["actions"])) == len(e["actions"]) - 1,
            "infos": {"success": np.ones(len(e["actions"]) + 1, bool)},
        }
        for i, e in enumerate(_episodes())
    }
    box = {"type": "Box", "low": [-1.0] * ACTIONS, "high": [1.0] * ACTIONS, "dtype": "float32"}
    metadata = {
        "env_spec": json.dumps({"id": TASK}),
        "action_space": json.dumps(box),
        "total_episodes": 2,
        "dataset_id": "point/expert-v0",
        "data_format": "hdf5",
    }
    new = {
        "set/data/main_data.hdf5": _hdf5(groups),
        "set/data/metadata.json": json.dumps(metadata).encode(),
    }
    return [new, {"set/data/main_data.hdf5": _hdf5(groups, metadata)}]


def lerobot(folder: Path) -> list[Files]:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    vector = {"dtype": "float32", "names": None}
    features: dict[str, Any] = {
        "observation.state": {**vector, "shape": [OBS]},
        "action": {**vector, "shape": [ACTIONS]},
        "next.reward": {**vector, "shape": [1]},
    }
    for key in ("frame_index", "episode_index", "index", "task_index"):
        features[key] = {"dtype": "int64", "shape": [1], "names": None}
    tables = []
    for i, e in enumerate(_episodes()):
        steps = len(e["actions"])
        tables.append(
            pa.table(
                {
                    "observation.state": pa.array(list(e["observations"][:-1])),
                    "action": pa.array(list(e["actions"])),
                    "next.reward": e["rewards"],
                    "frame_index": np.arange(steps),
                    "episode_index": np.full(steps, i),
                }
            )
        )

    def parquet_of(table: pa.Table) -> bytes:
        buffer = io.BytesIO()
        parquet.write_table(table, buffer)
        return buffer.getvalue()

    def info(version: str) -> bytes:
        return json.dumps(
            {"codebase_version": version, "total_episodes": 2, "fps": 10, "features": features}
        ).encode()

    words = pa.table({"task_index": [0], "task": ["push the block"]})
    return [
        {
            **{
                f"set/data/chunk-000/episode_{i:06d}.parquet": parquet_of(t)
                for i, t in enumerate(tables)
            },
            "set/meta/info.json": info("v2.1"),
            "set/meta/tasks.jsonl": b'{"task_index": 0, "task": "push the block"}\n',
        },
        {
            "set/data/chunk-000/file-000.parquet": parquet_of(pa.concat_tables(tables)),
            "set/meta/info.json": info("v3.0"),
            "set/meta/tasks.parquet": parquet_of(words),
        },
    ]


def legacy(folder: Path) -> list[Files]:
    episodes = _episodes()
    columns = {
        "states": [e["observations"][:-1].astype("f8") for e in episodes],
        "next_states": [e["observations"][1:] for e in episodes],
        "actions": [e["actions"] for e in episodes],
        "rewards": [e["rewards"].tolist() for e in episodes],
        "dones": [[False] * len(e["actions"]) for e in episodes],
        "lengths": [len(e["actions"]) for e in episodes],
    }
    listed = [{"observations": e["observations"], "actions": e["actions"]} for e in episodes]
    pairs = [(e["observations"], e["actions"], e["rewards"]) for e in episodes]
    nested = collections.OrderedDict(columns)
    return [
        {"expert.pkl": pickle.dumps(content, protocol)}
        for content, protocol in (
            (columns, 4),
            (columns, 2),
            (columns, 0),
            (listed, 5),
            (pairs, 3),
            (nested, 1),
        )  # fmt: skip
    ]


def sb3(folder: Path) -> list[Files]:
    def layer(name: str, out: int, inputs: int) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": torch.ones(out, inputs), f"{name}.bias": torch.zeros(out)}

    sac = {
        **layer("actor.latent_pi.0", 4, OBS),
        **layer("actor.mu", ACTIONS, 4),
        **layer("actor.log_std", ACTIONS, 4),
        **layer("critic.qf0.0", 4, OBS + ACTIONS),
    }
    ppo = {
        "log_std": torch.zeros(ACTIONS),
        **layer("mlp_extractor.policy_net.0", 4, OBS),
        **layer("action_net", ACTIONS, 4),
        **layer("value_net", 1, 4),
    }
    space = {
        ":type:": "<class 'gymnasium.spaces.box.Box'>",
        ":serialized:": "gASVAAAA",
        "low": "[-1. -1.]",
        "high": "[1. 1.]",
    }
    files = []
    for weights, settings in (
        (sac, {"policy_kwargs": {}, "action_space": space}),
        (ppo, {"policy_kwargs": {"activation_fn": "<class 'torch.nn.modules.activation.Tanh'>"},
               "action_space": space, "_last_original_obs": None}),
    ):  # fmt: skip
        state, buffer = io.BytesIO(), io.BytesIO()
        torch.save(weights, state)
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("data", json.dumps(settings))
            archive.writestr("policy.pth", state.getvalue())
            archive.writestr("pytorch_variables.pth", b"")
        files.append({"model.zip": buffer.getvalue()})
    return files


def npg(folder: Path) -> list[Files]:
    """As mjrl pickles its policies; its classes stand for a moment in modules of their names."""
    made: dict[str, Any] = {}
    for module, name in (
        ("mjrl.policies.gaussian_mlp", "MLP"),
        ("mjrl.utils.fc_network", "FCNetwork"),
        ("torch.nn.modules.container", "ModuleList"),
        ("torch.nn.modules.linear", "Linear"),
    ):
        made[name] = type(name, (), {"__module__": module})

    def linear(inputs: int, out: int) -> object:
        parameters = {
            "weight": torch.nn.Parameter(torch.ones(out, inputs)),
            "bias": torch.nn.Parameter(torch.zeros(out)),
        }
        layer = made["Linear"]()
        vars(layer)["_parameters"] = parameters
        return layer

    with mock.patch.dict(sys.modules):
        for name, kind in made.items():
            module = kind.__module__
            for part in (module.split(".")[0], module.rpartition(".")[0], module):
                if part == module or part not in sys.modules:
                    sys.modules[part] = types.ModuleType(part)
            setattr(sys.modules[module], name, kind)
        policy, network = made["MLP"](), made["FCNetwork"]()
        layers = made["ModuleList"]()
        vars(layers)["_modules"] = {"0": linear(OBS, 4), "1": linear(4, ACTIONS)}
        vars(network).update(
            _modules={"fc_layers": layers},
            in_shift=np.zeros(OBS), in_scale=np.ones(OBS), out_shift=np.zeros(ACTIONS),
            out_scale=np.ones(ACTIONS),
        )  # fmt: skip
        vars(policy).update(model=network, log_std_val=np.zeros(ACTIONS))
        return [{"best_policy.pickle": pickle.dumps(policy, protocol)} for protocol in (3, 4)]


class Point(gymnasium.Env):
    """A point on a line that is pushed, for twelve steps."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (OBS,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (ACTIONS,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.steps, self.at = 0, self.np_random.normal(size=OBS).astype(np.float32)
        return self.at.copy(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.steps += 1
        self.at[:ACTIONS] += 0.1 * action
        near = bool(np.abs(self.at).max() < 0.5)
        return (
            self.at.copy(),
            float(-np.abs(self.at).sum()),
            False,
            self.steps >= 12,
            {"success": near},
        )


def demonstrations() -> iqmpc.Demonstrations:
    return iqmpc.Demonstrations(TASK, tuple(iqmpc.Episode(**e) for e in _episodes()))


def config(**changes: Any) -> iqmpc.Config:
    return iqmpc.Config.from_dict(
        {
            "task": {"name": TASK, "suite": "own", "episode_length": 12},
            "model": {"encoder_dim": 8, "hidden_dim": 8, "latent_dim": 8, "critics": 2},
            "planner": {"samples": 8, "elites": 4, "policy_trajectories": 2, "iterations": 1},
            "learner": {"batch": 4, "mode": "eager"},
            "train": {
                "steps": 60,
                "random_steps": 24,
                "initial_updates": 2,
                "eval_every": 24,
                "eval_episodes": 1,
                "final_episodes": 1,
                "checkpoint_every": 24,
            },
        }  # fmt: skip
    ).replace(changes)


_made: list[Files] = []


def run(folder: Path) -> list[Files]:
    """A run folder, its only checkpoint first; made once in a process."""
    if _made:
        return list(_made)
    place = folder / "run"
    iqmpc.Trainer(config(), Point(), demonstrations(), run=place).train()
    checkpoint = max((place / "checkpoints").glob("*.safetensors"))
    names = (checkpoint, *(place / n for n in ("config.yaml", "metrics.csv", "summary.json")))
    files = {f"run/{path.relative_to(place)}": path.read_bytes() for path in names}
    measured = {"env_steps": 60, "episodes": 1, "seed": 10_000, "reward_correlation": 0.5}
    _made.append({**files, "run/evaluation-planner.json": json.dumps(measured).encode()})
    return list(_made)
