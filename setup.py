"""Build of iqmpc: setuptools drives CMake. The metadata is in pyproject.toml."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, SetupError

ROOT = Path(__file__).resolve().parent

# Directories installed inside iqmpc/: links to what is beside it; in an sdist, themselves.
LINKED = ("kernels", "configs")


def check_links() -> None:
    """Stop where the links were lost on the way, before packages are looked for without them."""
    for name in LINKED:
        if not (ROOT / "iqmpc" / name / "__init__.py").is_file():
            raise SystemExit(
                f"iqmpc/{name} must be a symbolic link to ../{name}, which some archives (.zip) "
                "and Git for Windows do not make: clone with core.symlinks=true, or make the link"
            )


def program(name: str) -> str:
    """Path of a build tool: PATH first, which isolated builds lead, then our own scripts."""
    search = os.pathsep.join((os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")))
    found = shutil.which(name, path=search)
    if found is None:
        raise SetupError(f"{name} is missing: {sys.executable} -m pip install {name}")
    return found


def check_toolchain() -> None:
    """Name what is missing in one line, where CMake's answer would be a page."""
    candidates = os.environ.get("CXX", "").split()[:1] or ["c++", "g++", "clang++"]
    if not any(shutil.which(candidate) for candidate in candidates):
        raise SetupError(
            f"no C++ compiler found (looked for {', '.join(candidates)}): install GCC or Clang "
            "(Debian: apt-get install g++) or set CXX"
        )
    headers = [Path(sysconfig.get_path(key)) for key in ("include", "platinclude")]
    if not any((directory / "Python.h").is_file() for directory in headers):
        raise SetupError(
            f"Python.h is missing from {headers[0]}: install the headers of "
            f"Python {sysconfig.get_python_version()} (Debian: apt-get install python3-dev)"
        )


class CMakeBuild(build_ext):
    """Builds iqmpc's libraries with CMake in build/, which the next build reuses."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11  # here: an sdist is made without it

        check_toolchain()
        cmake = program("cmake")
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        configure = [
            cmake,
            *("-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            # Given on every run, since a cached answer may lie in an earlier run's isolated
            # environment, which is gone.
            f"-DCMAKE_MAKE_PROGRAM={program('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            # AUTO adds some 15 seconds where a CUDA toolkit is found, and nothing elsewhere. Given
            # on every run, so that what an earlier one asked for does not stay in CMake's cache.
            f"-DIQMPC_CUDA={os.environ.get('IQMPC_CUDA', 'AUTO').upper()}",
            "-DIQMPC_BUILD_PYTHON=ON",
            "-DCMAKE_INSTALL_LIBDIR=lib",
        ]
        name = ext.name.rpartition(".")[2]
        commands = [configure, [cmake, "--build", str(build), "--target", name]]
        if name == "_C":  # and the library for C and C++, which iqmpc.paths finds
            inside = ROOT / "iqmpc" if self.inplace or self.editable_mode else target.parent
            native = inside / "native"
            shutil.rmtree(native, ignore_errors=True)
            commands.append([cmake, "--build", str(build), "--target", "iqmpc"])
            commands.append(
                [cmake, "--install", str(build), "--prefix", str(native), "--component", "iqmpc"]
            )
        for command in commands:
            try:
                subprocess.run(command, check=True)
            except subprocess.CalledProcessError as error:
                raise CompileError(
                    f"building {ext.name} failed; the compiler's or CMake's message is above. "
                    f"After moving the tree or changing compilers, remove {build} and try again"
                ) from error
        target.parent.mkdir(parents=True, exist_ok=True)
        # The name CMake gives is asked of the same interpreter and so is the one setuptools wants.
        shutil.copy2(build / target.name, target)


extensions = [Extension("iqmpc._C", sources=[])]
if sys.platform == "linux":  # not a module: a library that iqmpc.envs.maniskill loads
    extensions.append(Extension("iqmpc._null_vulkan", sources=[]))

# A page without an address of the project's cannot follow the README's links: their text names the
# file, which the sdist has.
readme = (ROOT / "README.md").read_text(encoding="utf-8")
readme = re.sub(r"\[([^\]]+)\]\((?!https?:)[^)]+\)", r"\1", readme)

check_links()
setup(
    long_description=readme,
    long_description_content_type="text/markdown",
    ext_modules=extensions,
    cmdclass={"build_ext": CMakeBuild},
)
