"""What runs here: versions, devices and kernel backends."""

from __future__ import annotations

import importlib.metadata
import platform

import torch
from rich.table import Table

from iqmpc import update_backends
from iqmpc.compiler import cpp_compiler
from iqmpc.config import Config
from iqmpc.kernels import mppi_plan, mppi_refit, mppi_rollout
from iqmpc.kernels.backends import available_backends
from iqmpc.observation import ObservationSpec

_PACKAGES = (
    "iqmpc",
    "torch",
    "numpy",
    "gymnasium",
    "hydra-core",
    "triton",
    "dm-control",
    "mujoco",
    "myosuite",
    "mani_skill2",
    "h5py",
    "safetensors",
    "tensorboard",
    "imageio-ffmpeg",
    "wandb",
)
_OPERATIONS = {
    "mppi_plan": mppi_plan.BACKENDS,
    "mppi_rollout": mppi_rollout.BACKENDS,
    "mppi_refit": mppi_refit.BACKENDS,
}


def report() -> list[Table]:
    """Four tables: versions, devices, backends of the kernels and of the updates."""
    versions = Table("package", "version", title=f"Python {platform.python_version()}")
    for name in _PACKAGES:
        try:
            versions.add_row(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            versions.add_row(name, "not installed")
    devices = Table("device", "what", title=f"{platform.system()} {platform.machine()}")
    devices.add_row(
        "cpu", f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    )
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        devices.add_row(f"cuda:{index}", f"{torch.cuda.get_device_name(index)}, sm_{major}{minor}")
    devices.add_row(
        "C++ compiler",
        cpp_compiler()
        or "none: torch.compile (learner.mode=compile, planner.mode=compile) needs one on a CPU",
    )
    reasons = available_backends()
    backends = Table("operation", *reasons, title="kernel backends: which can run, or why not")
    for name, implemented in _OPERATIONS.items():
        backends.add_row(
            name,
            *(
                why or ("yes" if b in implemented else "not implemented")
                for b, why in reasons.items()
            ),
        )
    if reasons["cpu"] is None:
        devices.add_row("iqmpc._C", _instruction_sets())
    return [versions, devices, backends, _updates()]


def _updates() -> Table:
    """What can make a run's updates on each device, or why not."""
    table = Table("device", *update_backends.BACKENDS, title="learner.mode: which can be, or why")
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        reasons = (
            backend.unfit(Config(), torch.device(device), ObservationSpec((1,)))
            for backend in update_backends.BACKENDS.values()
        )
        table.add_row(device, *(why or "yes" for why in reasons))
    return table


def _instruction_sets() -> str:
    from iqmpc import _C

    try:
        return f"{_C.isa()} of {', '.join(_C.isa_levels())}"
    except ValueError as error:  # IQMPC_ISA names none
        return str(error)
