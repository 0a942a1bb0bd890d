"""A run's agent as one file, for robots: `iqmpc export RUN agent.iqmpc`."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import iqmpc
from iqmpc import agent_file
from iqmpc.agent import Agent
from iqmpc.agent_file import AgentFile
from iqmpc.envs import make_env
from iqmpc.envs.description import describe, indexed
from iqmpc.errors import ConfigError, IqmpcError
from iqmpc.files import strict_json, write_atomically
from iqmpc.onnx_model import prior_model
from iqmpc.run_folder import RunFolder
from iqmpc.seeding import stream_seed
from iqmpc.task_interface import TaskInterface


def export(
    run: str | Path,
    out: str | Path,
    *,
    checkpoint: str = "newest",
    changes: Mapping[str, Any] | None = None,
    interface: TaskInterface | None = None,
) -> AgentFile:
    """Write the agent of a run folder to `out`, as it was evaluated there.

    `checkpoint` is the one to take, as of `Agent.load`.
    `changes` replaces settings, as of `Agent.load`: `planner.budget_us`, `planner.samples`. The
    environment's interface is the one that the run kept, else (of runs of 0.1) the one of the task
    made anew, else numbers; `interface` is taken in its place. Returns what was written.

    Raises `CheckpointError` for what is no run, `ConfigError` for wrong changes.
    """
    folder = RunFolder(run)
    agent = _load(run, checkpoint, changes)
    interface = interface or folder.load_interface() or _made_anew(agent)
    provenance = {
        "run": folder.path.resolve().name,
        "iqmpc": iqmpc.__version__,
        **agent.facts,
        **_evaluated(folder),
    }
    found = exported(agent, interface, provenance)
    agent_file.save(out, found)
    return found


def export_onnx(
    run: str | Path,
    out: str | Path,
    *,
    checkpoint: str = "newest",
    changes: Mapping[str, Any] | None = None,
) -> None:
    """Write encoder and policy prior as an ONNX model: `iqmpc.onnx_model.prior_model`.

    Raises as `export` does, and `ConfigError` where the package onnx is not installed.
    """
    agent = _load(run, checkpoint, changes)
    interface = RunFolder(run).load_interface() or _made_anew(agent)
    metadata = {"iqmpc": iqmpc.__version__, "interface": strict_json(interface.to_dict())}
    write_atomically(Path(out), prior_model(agent.model.weights(), metadata))


def _load(run: str | Path, checkpoint: str, changes: Mapping[str, Any] | None) -> Agent:
    agent = Agent.load(run, checkpoint=checkpoint, changes={"device": "cpu", **(changes or {})})
    agent.require_world_model("iqmpc export")
    return agent


def exported(agent: Agent, interface: TaskInterface, provenance: Mapping[str, Any]) -> AgentFile:
    """What a file of this agent holds; `provenance` has the `FACTS` of `iqmpc.agent_file` at least.

    Raises `ConfigError` for an interface of another size.
    """
    tensors = {k: v.detach().cpu().float() for k, v in agent.model.state_dict().items()}
    return AgentFile(agent.config, tensors, _about(agent, interface), dict(provenance))


def _about(agent: Agent, interface: TaskInterface) -> dict[str, Any]:
    """The metadata's `agent`."""
    config, model = agent.config, agent.model
    planner = dataclasses.asdict(config.planner)
    if config.planner.precision not in ("float32", "bf16"):  # the others are of other backends
        planner["precision"] = "float32"
    planner["iterations"] = config.planner.iterations_for(model.action_dim)
    planner["discount"] = config.discount
    planner["seed"] = stream_seed(config.seed, "planner")
    observed = agent.model.observation_spec
    if not observed.images:
        _check_names("observation", interface.observation_names, *observed.shape)
    _check_names("action", interface.action_names, model.action_dim)
    return {
        "task": config.task.name,
        "model": {
            **dataclasses.asdict(model.config),
            "termination": bool(len(model.termination)),
        },
        "planner": planner,
        "discount": config.discount,
        "beta": agent.entropy_coef,
        "observation": {
            "names": list(interface.observation_names),
            "shape": list(observed.shape),
            "dtype": np.dtype(observed.dtype).name,
            # The encoder's own LayerNorm is all there is: numbers are taken as they are observed.
            "scaling": None,
        },
        "action": {
            "names": list(interface.action_names),
            "low": list(interface.action_low),
            "high": list(interface.action_high),
        },
        "action_repeat": interface.action_repeat,
        "control_period_s": interface.control_period_s,
    }


def _check_names(what: str, names: tuple[str, ...], size: int) -> None:
    if len(names) != size:
        raise ConfigError(
            f"the interface names {len(names)} numbers of an {what}, the agent has {size}"
        )


def _made_anew(agent: Agent) -> TaskInterface:
    task = agent.config.task
    try:
        env = make_env(task)
        try:
            return describe(env, task)
        finally:
            env.close()
    except IqmpcError as error:
        warnings.warn(
            f"the run keeps no names and bounds of its task, and the task cannot be made here "
            f"({error}): the file has numbers in place of names, bounds of [-1, 1] and no period",
            RuntimeWarning,
            stacklevel=3,
        )
    observed, actions = agent.model.observation_spec, agent.model.action_dim
    return TaskInterface(
        () if observed.images else indexed("obs", observed.shape),
        indexed("action", (actions,)),
        (-1.0,) * actions,
        (1.0,) * actions,
        task.action_repeat,
        None,
    )


def _evaluated(folder: RunFolder) -> dict[str, Any]:
    """What the run was evaluated to, where it has ended."""
    found = folder.load_figures(folder.summary, ())
    keys = ("episodes", "return_mean", "return_std", "success_rate", "success_any_rate", "ratio")
    evaluation = {key: found.get(key) for key in keys} if found else None
    return {"evaluation": evaluation, "commit": found.get("commit")}
