"""Where a run was made: on which machine, from which source."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import torch

import iqmpc

# Of the source tree: what a run is computed with.
_CODE = ("iqmpc", "kernels", "csrc", "configs")


def processor() -> str:
    """The processor's model name."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()


def machine(device: str = "cpu") -> str:
    """The processor, the instruction set that is used of it, and the GPU where `device` is one."""
    try:
        from iqmpc import _C

        level = _C.isa()
    except (ImportError, ValueError):  # not built, or IQMPC_ISA names none
        level = torch.backends.cpu.get_cpu_capability().lower()
    gpu = f", {torch.cuda.get_device_name(device)}" if device.startswith("cuda") else ""
    return f"{processor()}, {level}{gpu}"


def commit(root: Path = Path(iqmpc.__file__).parents[1]) -> str:
    """The first 12 digits of the commit checked out at `root`, with `-dirty` if code was changed.

    The package's version where `root` is no git checkout of it, or git is missing.
    """

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *words],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        ).stdout.strip()

    try:
        # An installed copy may lie within some other project's checkout, which does not track it.
        git("ls-files", "--error-unmatch", "iqmpc/__init__.py")
        head = git("rev-parse", "--short=12", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *_CODE)
    except (OSError, subprocess.CalledProcessError):
        return iqmpc.__version__
    return f"{head}-dirty" if changed else head
