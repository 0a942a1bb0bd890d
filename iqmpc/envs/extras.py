"""Importing the suites, which are extras."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import platform
import re
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType

from iqmpc.errors import TaskError, one_line

GL_ADVICE = (
    "without a screen, rendering needs EGL or OSMesa: apt-get install libegl1 libgl1-mesa-dri, or "
    "libosmesa6, and MUJOCO_GL=egl or MUJOCO_GL=osmesa to choose one"
)
# Extras that newer Pythons cannot have: labmaze, NumPy below 1.24 (pyproject.toml).
NEWEST_PYTHON = {"dmcontrol": (3, 12), "myosuite": (3, 12), "maniskill": (3, 11)}
# Every graphics library raises its own type.
_GRAPHICS = re.compile(
    r"gl\b|^gl|egl|osmesa|glfw|glx|x11|display|framebuffer|vulkan", re.IGNORECASE
)


def cannot_render(error: Exception) -> TaskError:
    """The error to raise for what rendering raised, with advice where it is about graphics."""
    kind = type(error)
    said = one_line(error) or kind.__name__
    about = f"{kind.__module__.replace('.', ' ')} {kind.__name__} {said}"
    advice = f" ({GL_ADVICE})" if _GRAPHICS.search(about) else ""
    return TaskError(f"the environment cannot render here: {said}{advice}")


def import_extra(module: str, suite: str, extra: str) -> ModuleType:
    """Import a suite's module without what it prints.

    Raises `TaskError`: with the extra to install where the package is missing, or the Python that
    it needs, and with the import's own message where it is there and broken.
    """
    package = module.partition(".")[0]
    try:
        with quiet():
            return importlib.import_module(module)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            newest = NEWEST_PYTHON.get(extra, sys.version_info)
            if sys.version_info[:2] > newest:
                raise TaskError(
                    f"{suite} needs Python 3.{newest[1]} or older, this is "
                    f"{platform.python_version()}"
                ) from None
            raise TaskError(
                f"{suite} needs the extra {extra!r}: pip install 'iqmpc[{extra}]'"
            ) from None
        raise TaskError(f"{suite} is installed but cannot be imported: {error}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide banners and warnings of third-party code; an exception passes, with its own message."""
    level = logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)
