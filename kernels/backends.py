"""Which kernel backends can run here, and the one rule by which a backend is chosen.

A backend speaks for itself: whoever has several of them asks each why it cannot serve, and gives
the answers to `resolve`, which takes the one that was named or says what is against it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Collection, Mapping, Sequence

import torch

from iqmpc.errors import BackendError, IqmpcError

# "auto" takes the first that can serve.
AUTO = ("triton", "cpu", "reference")


def available_backends() -> dict[str, str | None]:
    """Every backend by name: None where it can run, else the reason why it cannot.

    The answer is found once per process.
    """
    return dict(_availability())


def cannot_run(backend: str, asked: str) -> str | None:
    """What keeps a backend from running on this machine where `asked` is asked for, or None.

    Where the environment variable TRITON_INTERPRET is 1, "triton" by name is Triton's interpreter
    on the CPU, which "auto" never takes.
    """
    reason = _availability()[backend]
    if reason is None or (asked == backend == "triton" and interpreted()):
        return None
    return f"cannot run: {reason}"


def resolve(
    asked: str,
    unfit: Mapping[str, str | None],
    *,
    order: Sequence[str],
    setting: str,
    error: type[IqmpcError] = BackendError,
) -> str:
    """The choice that a setting comes to: `asked`, or for "auto" the first of `order` that serves.

    `unfit` says of every choice why it cannot serve, or None. A named choice is never replaced.
    Raises `error` with the reason where the named one cannot serve, or with everyone's where none
    can. "auto" warns, once, where it comes to the slow reference.
    """
    if asked == "auto":
        chosen = next((name for name in order if unfit.get(name, "") is None), None)
        against = "; ".join(f"{name} {unfit[name]}" for name in order if unfit.get(name))
        if chosen is None:
            raise error(f"no {setting} can serve: {against}")
        if chosen == "reference":
            _warn_once(f"using the slow reference in plain torch ({against})")
        return chosen
    if asked not in unfit:
        raise error(f"unknown {setting} {asked!r}, expected auto, {', '.join(unfit)}")
    if unfit[asked] is not None:
        raise error(f"{setting}={asked} {unfit[asked]}")
    return asked


def resolve_backend(name: str, implemented: Collection[str]) -> str:
    """The backend to use for an operation that has the backends `implemented`.

    A name other than "auto" is returned as it is, or `BackendError` says what is missing. "auto" is
    Triton on a machine with a CUDA device, else the C++ kernel, else the reference.
    """
    unfit = {
        backend: cannot_run(backend, name)
        if backend in implemented
        else "cannot run: not implemented for this operation"
        for backend in _availability()
    }
    return resolve(name, unfit, order=AUTO, setting="backend")


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
    # Level 5 passes this function, the two that resolve and the operation: its caller is shown.
    warnings.warn(message, RuntimeWarning, stacklevel=5)
