"""iqmpc.kernels.backends: what "auto" chooses and what an impossible choice says."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from iqmpc.errors import BackendError, ConfigError
from iqmpc.kernels import backends
from iqmpc.kernels.backends import available_backends, resolve, resolve_backend

EVERY = ("reference", "cpu", "triton", "cuda")


@pytest.fixture(autouse=True)
def fresh_caches() -> Iterator[None]:
    caches = (backends._availability, backends._warn_once)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def pretend(
    monkeypatch: pytest.MonkeyPatch,
    *,
    gpu: bool = False,
    triton: bool = True,
    extension: bool = True,
    cuda: str = "",
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if triton else None)

    def import_module(name: str) -> SimpleNamespace:
        if not extension:
            raise ImportError(f"No module named {name!r}")
        return SimpleNamespace(cuda_unavailable_reason=lambda: cuda)

    monkeypatch.setattr(importlib, "import_module", import_module)


def test_reasons_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, extension=False)
    assert available_backends() == {
        "reference": None,
        "cpu": "iqmpc._C is not built: No module named 'iqmpc._C'",
        "triton": "torch sees no CUDA device",
        "cuda": "torch sees no CUDA device",
    }


def test_reasons_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, gpu=True, triton=False, cuda="built without CUDA")
    assert available_backends() == {
        "reference": None,
        "cpu": None,
        "triton": "triton is not installed",
        "cuda": "built without CUDA",
    }


def test_the_extension_knows_whether_cuda_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, gpu=True)
    assert available_backends()["cuda"] is None


def test_the_answer_is_the_callers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    available_backends()["reference"] = "changed"
    assert available_backends()["reference"] is None


def test_the_extension_is_built() -> None:
    assert available_backends()["cpu"] is None


def test_auto_prefers_triton_then_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, gpu=True)
    assert resolve_backend("auto", EVERY) == "triton"
    assert resolve_backend("auto", ("reference", "cpu")) == "cpu"
    pretend(monkeypatch)
    backends._availability.cache_clear()
    assert resolve_backend("auto", EVERY) == "cpu"


def test_auto_falls_back_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, extension=False)
    message = (
        r"using the slow reference in plain torch \(triton cannot run: torch sees no CUDA device; "
        r"cpu cannot run: iqmpc\._C is not built: .*\)"
    )
    with pytest.warns(RuntimeWarning, match=message):
        assert resolve_backend("auto", EVERY) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve_backend("auto", EVERY) == "reference"


def test_a_named_backend_is_never_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    for name in ("reference", "cpu"):
        assert resolve_backend(name, EVERY) == name
    for name, implemented, message in (
        ("triton", EVERY, "backend=triton cannot run: torch sees no CUDA device"),
        ("cpu", ("reference",), "backend=cpu cannot run: not implemented for this operation"),
        ("metal", EVERY, "unknown backend 'metal', expected auto, reference, cpu, triton, cuda"),
    ):
        with pytest.raises(BackendError) as raised:
            resolve_backend(name, implemented)
        assert str(raised.value) == message


def test_nothing_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    with pytest.raises(
        BackendError, match="^no backend can serve: triton cannot run: torch sees no CUDA"
    ):
        resolve_backend("auto", ("triton",))


def test_every_choice_is_asked_and_the_first_that_serves_is_taken() -> None:
    def choose(asked: str, **unfit: str | None) -> str:
        return resolve(asked, unfit, order=("quick", "slow"), setting="mode", error=ConfigError)

    assert choose("auto", slow=None, quick=None, last=None) == "quick"
    assert choose("auto", slow=None, quick="is not here") == "slow"
    assert choose("last", slow=None, last=None) == "last"  # which auto never takes
    for asked, message in (
        ("auto", "no mode can serve: quick is not here; slow has no time"),
        ("slow", "mode=slow has no time"),
        ("lost", "unknown mode 'lost', expected auto, quick, slow, last"),
    ):
        with pytest.raises(ConfigError) as raised:
            choose(asked, quick="is not here", slow="has no time", last=None)
        assert str(raised.value) == message
