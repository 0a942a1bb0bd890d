"""What importing the kernels brings with it, each time in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

PACKAGES = ("iqmpc.kernels", "iqmpc.kernels.mppi_plan", "iqmpc.kernels.iq_update")
RUNS_ONLY = ("hydra", "omegaconf", "gymnasium", "h5py", "rich", "typer")


@pytest.mark.parametrize("package", PACKAGES)
def test_the_kernels_need_nothing_that_only_runs_need(package: str) -> None:
    code = f"import sys, {package}; print([m for m in {RUNS_ONLY} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stdout + result.stderr


def test_importing_the_operations_does_not_import_triton() -> None:
    """Importing Triton's library after Mesa's has ended processes."""
    code = (
        "import sys, torch; before = 'triton' in sys.modules;"
        "import iqmpc, iqmpc.kernels.mppi_plan, iqmpc.kernels.mppi_rollout;"
        "import iqmpc.kernels.mppi_refit;"
        "assert before or 'triton' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
