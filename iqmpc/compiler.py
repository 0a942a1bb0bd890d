"""The C++ compiler that torch.compile needs when a program runs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import wraps
from typing import Any

from iqmpc.config import Config
from iqmpc.errors import ConfigError, one_line


def cpp_compiler() -> str | None:
    """The path of the one that torch.compile would call on a CPU (CXX, or g++); None without."""
    return shutil.which(os.environ.get("CXX", "").split(" ")[0] or "g++")


def check_compiler(config: Config, device: str, learner: str) -> None:
    """`ConfigError`, where torch.compile would run on a CPU without a C++ compiler.

    `learner` is the mode that `learner.mode` comes to.
    """
    modes = {"learner": learner, "planner": config.planner.mode}
    asked = [f"{section}.mode=compile" for section, mode in modes.items() if mode == "compile"]
    if asked and device == "cpu" and cpp_compiler() is None:
        raise ConfigError(
            f"{' and '.join(asked)} needs a C++ compiler while it runs, and neither CXX nor g++ is "
            "one (Debian: apt-get install g++); without, give "
            + " ".join(text.replace("compile", "eager") for text in asked)
        )


def compiled(function: Callable[..., Any], setting: str) -> Callable[..., Any]:
    """The function under torch.compile, for the sizes of its first call.

    Raises `ConfigError` that names `setting`, and the way around it, where it cannot be compiled:
    a compiler that fails, a disk that is full.
    """
    import torch
    from torch._dynamo.exc import BackendCompilerFailed

    fast = torch.compile(function, dynamic=False)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return fast(*args, **kwargs)
        except BackendCompilerFailed as error:
            # What the compiler said stands behind its command, of pages.
            said = str(error.inner_exception).rpartition("Output:")[2]
            raise ConfigError(
                f"{setting}=compile cannot be compiled here ({one_line(RuntimeError(said))}); "
                f"without, give {setting}=eager"
            ) from error

    return call
