"""The C++ compiler that torch.compile needs when a program runs."""

from __future__ import annotations

import os
import shutil

from iqmpc.config import Config
from iqmpc.errors import ConfigError


def cpp_compiler() -> str | None:
    """The path of the one that torch.compile would call on a CPU (CXX, or g++); None without."""
    return shutil.which(os.environ.get("CXX", "").split(" ")[0] or "g++")


def check_compiler(config: Config, device: str) -> None:
    """`ConfigError`, where settings ask for torch.compile on a CPU without a C++ compiler."""
    asked = [f"{section}.mode=compile" for section in ("learner", "planner")
             if getattr(config, section).mode == "compile"]
    if asked and device == "cpu" and cpp_compiler() is None:
        raise ConfigError(
            f"{' and '.join(asked)} needs a C++ compiler while it runs, and neither CXX nor g++ is "
            "one (Debian: apt-get install g++); without, give "
            + " ".join(text.replace("compile", "eager") for text in asked))
