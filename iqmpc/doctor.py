"""What runs here: versions, devices and kernel backends."""

from __future__ import annotations

import importlib.metadata
import platform
import sys

import torch
from rich.table import Table

from iqmpc.kernels.backends import available_backends

_PACKAGES = (
    "iqmpc", "torch", "numpy", "gymnasium", "hydra-core", "triton", "dm-control", "mujoco",
    "myosuite", "mani_skill2", "h5py", "safetensors", "tensorboard", "imageio-ffmpeg",
)


def report() -> list[Table]:
    """Three tables: versions, devices, backends."""
    versions = Table("package", "version", title=f"Python {platform.python_version()}")
    for name in _PACKAGES:
        try:
            versions.add_row(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            versions.add_row(name, "not installed")
    devices = Table("device", "what", title=f"{platform.system()} {platform.machine()}")
    devices.add_row(
        "cpu", f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        devices.add_row(
            f"cuda:{index}", f"{torch.cuda.get_device_name(index)}, sm_{major}{minor}")
    backends = Table("backend", "can run", "why not", title="kernel backends")
    for name, reason in available_backends().items():
        backends.add_row(name, "no" if reason else "yes", reason or "")
    if "iqmpc._C" in sys.modules:
        extension = sys.modules["iqmpc._C"]
        devices.add_row("iqmpc._C", f"{extension.isa()} of {', '.join(extension.isa_levels())}")
    return [versions, devices, backends]
