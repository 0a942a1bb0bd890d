"""Which kernel backends can run here, and which one an operation uses."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Collection

import torch

from iqmpc.errors import BackendError

# "auto" takes the first that the operation implements and the machine can run.
_AUTO = ("triton", "cpu", "reference")


def available_backends() -> dict[str, str | None]:
    """Every backend by name: None where it can run, else the reason why it cannot.

    The answer is found once per process.
    """
    return dict(_availability())


def resolve_backend(name: str, implemented: Collection[str]) -> str:
    """The backend to use for an operation that has the backends `implemented`.

    A name other than "auto" is returned as it is, or `BackendError` says what is missing. "auto" is
    Triton on a machine with a CUDA device, else the C++ kernel, else the reference, which is slow
    and therefore warned about, once. Where the environment variable TRITON_INTERPRET is 1, "triton"
    by name is Triton's interpreter on the CPU, which "auto" never takes.
    """
    reasons = {
        backend: reason if backend in implemented else "not implemented for this operation"
        for backend, reason in _availability().items()
    }
    if name == "auto":
        chosen = next((backend for backend in _AUTO if reasons[backend] is None), None)
        if chosen is None:
            missing = "; ".join(f"{backend}: {reasons[backend]}" for backend in _AUTO)
            raise BackendError(f"no backend can run ({missing})")
        if chosen == "reference":
            missing = "; ".join(f"{b}: {reasons[b]}" for b in _AUTO if b != "reference")
            _warn_once(f"using the slow reference in plain torch ({missing})")
        return chosen
    if name not in reasons:
        raise BackendError(f"unknown backend {name!r}, expected auto, {', '.join(reasons)}")
    if name == "triton" and name in implemented and interpreted():
        return name
    if reasons[name] is not None:
        raise BackendError(f"backend {name!r} cannot run: {reasons[name]}")
    return name


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter: what Triton itself would answer."""
    asked = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
    return asked and importlib.util.find_spec("triton") is not None


@functools.cache
def _availability() -> dict[str, str | None]:
    no_gpu = None if torch.cuda.is_available() else "torch sees no CUDA device"
    # Found, not imported: importing Triton's library after Mesa's has ended processes.
    no_triton = None if importlib.util.find_spec("triton") else "triton is not installed"
    try:
        extension = importlib.import_module("iqmpc._C")
        no_extension = None
    except ImportError as error:
        no_extension = f"iqmpc._C is not built: {error}"
    return {
        "reference": None,
        "cpu": no_extension,
        "triton": no_gpu or no_triton,
        "cuda": no_gpu or no_extension or extension.cuda_unavailable_reason() or None,
    }


@functools.cache
def _warn_once(message: str) -> None:
    # Level 4 passes this function, resolve_backend and the operation, so that the caller is shown.
    warnings.warn(message, RuntimeWarning, stacklevel=4)
