"""Without a C++ compiler torch.compile is refused before the first step."""

import pytest
import torch

from iqmpc import Trainer
from iqmpc.compiler import check_compiler, compiled, cpp_compiler
from iqmpc.doctor import report
from iqmpc.errors import ConfigError


@pytest.fixture
def without(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)


def test_compile_is_refused_at_once(
    without, tmp_path, small_config, point_env, point_demonstrations
):
    config = small_config.replace({"learner.mode": "compile"})
    with pytest.raises(
        ConfigError,
        match=r"learner.mode=compile needs a C\+\+ compiler .*without, "
        "give learner.mode=eager$",
    ):
        Trainer(config, point_env, point_demonstrations, run=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    check_compiler(small_config, "cpu", "eager")
    check_compiler(config, "cuda", "compile")
    cells = [cell for table in report() for column in table.columns for cell in column.cells]
    assert any(str(cell).startswith("none: torch.compile") for cell in cells)


def test_the_environment_names_one(monkeypatch, tmp_path):
    compiler = tmp_path / "mine"
    compiler.write_text("")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", f"{compiler} -O2")
    assert cpp_compiler() == str(compiler)


def test_a_compiler_that_fails_is_said_with_the_way_around_it(monkeypatch, tmp_path):
    failing = tmp_path / "failing-g++"
    failing.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exec g++ --version\n'
        "echo no space left on device >&2\nexit 1\n"
    )
    failing.chmod(0o755)
    function = compiled(lambda x: (x.sin() + 0.8125).sum(), "planner.mode")
    inductor = pytest.importorskip("torch._inductor.config")
    # Torch tries the instruction sets once a process, and would keep the failing compiler's answer.
    pytest.importorskip("torch._inductor.cpu_vec_isa").pick_vec_isa()
    with (
        inductor.patch({"cpp.cxx": (None, str(failing)), "force_disable_caches": True}),
        pytest.raises(
            ConfigError,
            match=r"planner.mode=compile cannot be compiled here \(.*no space left on device.*\); "
            "without, give planner.mode=eager",
        ),
    ):
        function(torch.ones(7))
