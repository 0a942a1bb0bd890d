"""Importing the suites, which are extras."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import warnings
from collections.abc import Iterator
from types import ModuleType

from iqmpc.errors import TaskError


def import_extra(module: str, suite: str, extra: str) -> ModuleType:
    """Import a suite's module without what it prints.

    Raises `TaskError`: with the extra to install where the package is missing, and with the
    import's own message where it is there and broken.
    """
    package = module.partition(".")[0]
    try:
        with quiet():
            return importlib.import_module(module)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            raise TaskError(
                f"{suite} needs the extra {extra!r}: pip install 'iqmpc[{extra}]'") from None
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
