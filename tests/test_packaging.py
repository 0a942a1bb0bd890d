"""What is shipped: source distribution, wheel, tree and metadata. Nothing is compiled here."""

from __future__ import annotations

import email
import importlib.machinery
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import iqmpc
from iqmpc.envs.extras import NEWEST_PYTHON

ROOT = Path(__file__).parents[1]
if not (ROOT / "setup.py").exists():
    pytest.skip("the build is not beside the tests", allow_module_level=True)
UNTRACKED = shutil.ignore_patterns(
    *(".git", ".venv*", ".*_cache", ".hypothesis", ".benchmarks", "__pycache__"),
    *("build", "dist", "outputs", "runs", "native", "*.egg-info", "*.so"),
)


def python(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], cwd=cwd, capture_output=True, text=True)


def modules(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*.py")}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """The tree as git has it: with links, without what was built."""
    copy = tmp_path_factory.mktemp("checkout") / "iqmpc"
    shutil.copytree(ROOT, copy, symlinks=True, ignore=UNTRACKED)
    return copy


@pytest.fixture(scope="module")
def sdist(checkout, tmp_path_factory) -> Path:
    """An unpacked source distribution."""
    folder = tmp_path_factory.mktemp("sdist")
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    made = python("-c", code, cwd=checkout)
    assert made.returncode == 0, made.stderr
    (archive,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(archive, folder)
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.mark.parametrize("name", ["kernels", "configs"])
def test_the_tree_itself_has_the_modules_that_lie_beside_the_package(name):
    """As a type checker and an IDE look for them: by files, without what an install arranges."""
    package = importlib.machinery.PathFinder.find_spec("iqmpc", [str(ROOT)])
    found = importlib.machinery.PathFinder.find_spec(
        f"iqmpc.{name}", package.submodule_search_locations
    )
    assert Path(found.origin) == ROOT / "iqmpc" / name / "__init__.py"
    if (ROOT / name).exists():  # in a checkout
        assert Path(found.origin).samefile(ROOT / name / "__init__.py")


def test_a_source_distribution_is_the_tree_without_links(sdist):
    assert not [path for path in sdist.rglob("*") if path.is_symlink()]
    assert modules(sdist / "iqmpc") == modules(ROOT / "iqmpc") | {
        f"{name}/{module}"
        for name in ("kernels", "configs")
        for module in modules(ROOT / "iqmpc" / name)
    }
    top = "CHANGELOG.md CITATION.cff CMakeLists.txt CONTRIBUTING.md LICENSE Makefile README.md"
    for name in (
        *top.split(),
        "SECURITY.md",
        "constraints.txt",
        "docs/method.md",
        "tests/conftest.py",
    ):
        assert (sdist / name).read_bytes() == (ROOT / name).read_bytes()
    assert not (sdist / "kernels").exists()  # would be a second copy


def test_a_wheel_holds_the_same_from_both(sdist, checkout, tmp_path):
    def built(tree: Path) -> set[str]:
        out = tmp_path / tree.name
        done = python("setup.py", "-q", "build_py", "--build-lib", str(out), cwd=tree)
        assert done.returncode == 0, done.stderr
        return {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}

    files = built(sdist)
    assert files == built(checkout)
    assert {name.partition("/")[0] for name in files} == {"iqmpc"}
    assert {
        "iqmpc/py.typed",
        "iqmpc/kernels/mppi_plan/reference.py",
        "iqmpc/configs/preset/cpu.yaml",
        "iqmpc/demos/data/walker-walk.h5",
        "iqmpc/agents/walker-walk.iqmpc",
    } <= files


def test_the_metadata_is_true_without_the_tree(sdist):
    metadata = email.message_from_string((sdist / "PKG-INFO").read_text(encoding="utf-8"))
    assert metadata["Version"] == iqmpc.__version__
    assert metadata["License-Expression"] == "MIT"
    assert metadata["License-File"] == "LICENSE"
    page = metadata.get_payload()
    assert "iqmpc train" in page
    assert re.findall(r"\]\((?!https?:)", page) == []  # links that only the tree can follow


@pytest.mark.parametrize("name", ["kernels", "configs"])
def test_a_link_that_an_archive_lost_is_said(checkout, tmp_path, name):
    tree = tmp_path / "unzipped"
    shutil.copytree(checkout, tree, symlinks=True)
    link = tree / "iqmpc" / name
    link.unlink() if link.is_symlink() else shutil.rmtree(link)
    link.write_text(f"../{name}")
    done = python("setup.py", "--name", cwd=tree)
    assert done.returncode != 0
    assert done.stderr.startswith(f"iqmpc/{name} must be a symbolic link to ../{name}")


def test_the_version_is_one(tmp_path):
    done = python(
        *("-m", "cmake", "-S", str(ROOT), "-B", str(tmp_path)),
        *("-DIQMPC_BUILD_PYTHON=OFF", "-DIQMPC_CUDA=OFF"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    cache = (tmp_path / "CMakeCache.txt").read_text(encoding="utf-8")
    assert f"CMAKE_PROJECT_VERSION:STATIC={iqmpc.__version__}\n" in cache
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {iqmpc.__version__}\n" in citation
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## (\S+)", changes, re.MULTILINE).group(1) == iqmpc.__version__


def test_extras_are_limited_to_the_pythons_that_their_errors_name(sdist):
    metadata = email.message_from_string((sdist / "PKG-INFO").read_text(encoding="utf-8"))
    limits = {
        extra: (3, int(minor) - 1)
        for minor, extra in re.findall(
            r"python_version < \"3\.(\d+)\".* extra == \"(\w+)\"",
            "\n".join(metadata.get_all("Requires-Dist")),
        )
    }
    assert limits == NEWEST_PYTHON
