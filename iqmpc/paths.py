"""Where the library for C and C++ is: `python -m iqmpc.paths [--include | --library | --cmake]`.

    cmake -S . -B build -Diqmpc_DIR=$(python -m iqmpc.paths --cmake)
    cc robot.c $(PKG_CONFIG_PATH=$(python -m iqmpc.paths --library)/pkgconfig \\
        pkg-config --cflags --libs --static iqmpc)
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

_NATIVE = Path(__file__).resolve().parent / "native"


def include() -> Path:
    """The folder of headers: `iqmpc.h`, `iqmpc/agent.hpp`."""
    return _existing("include")


def library() -> Path:
    """The folder of `libiqmpc.a`."""
    return _existing("lib")


def cmake() -> Path:
    """The folder of `iqmpcConfig.cmake`, what `find_package` calls iqmpc_DIR."""
    return _existing("lib/cmake/iqmpc")


def _existing(name: str) -> Path:
    path = _NATIVE / name
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is missing: the package was installed without its library")
    return path


def main(words: list[str] | None = None) -> None:
    folders = {"include": include, "library": library, "cmake": cmake}
    parser = argparse.ArgumentParser(
        prog="python -m iqmpc.paths", description="Where the library for C and C++ is."
    )
    one = parser.add_mutually_exclusive_group()
    for name in folders:
        one.add_argument(f"--{name}", action="store_true", help="this folder alone")
    asked = [name for name, given in vars(parser.parse_args(words)).items() if given]
    try:
        for name in asked or folders:
            print(folders[name]() if asked else f"{name}: {folders[name]()}")
    except FileNotFoundError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
