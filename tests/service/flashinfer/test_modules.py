"""Modules that would have to be built are told, wherever FlashInfer looks for them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from tests.service.flashinfer.conftest import Home

from expertd.backends.flashinfer import modules

NAME = "fused_moe_90"
UP_TO_DATE = modules._up_to_date
"""Itself, before a fabricated home replaces it."""


@pytest.mark.parametrize("disabled", ["", "0", "1"])
@pytest.mark.parametrize("where", ["aot", "jit", None])
def test_where_a_module_may_lie(
    home: Home, monkeypatch: pytest.MonkeyPatch, where: str | None, disabled: str
) -> None:
    """FLASHINFER_DISABLE_JIT hides FlashInfer's own builds, whatever it says."""
    monkeypatch.setenv("FLASHINFER_DISABLE_JIT", disabled)
    if where is not None:
        home.built(NAME, where)
    there = where == "aot" or (where == "jit" and not disabled)
    assert (modules.missing(NAME) == "") is there
    if not there:
        assert NAME in modules.missing(NAME) and "expertd prebuild" in modules.missing(NAME)


def test_an_own_build_is_loaded_through_ninja(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    home.built(NAME)
    monkeypatch.setenv("PATH", str(home.root))
    assert "pip install ninja" in modules.missing(NAME)
    home.built(NAME, "aot")
    assert modules.missing(NAME) == ""


def test_flashinfer_itself_looks_there(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """The paths are those of the specs that FlashInfer loads modules by."""
    from flashinfer.jit import core

    spec = core.JitSpecNvcc(NAME, [], None, None, None, None)
    assert not spec.is_compiled and modules.missing(NAME)
    assert spec.get_library_path() == home.built(NAME)
    assert spec.is_compiled and not modules.missing(NAME)
    assert home.built(NAME, "aot") == spec.get_library_path()


@pytest.mark.parametrize("fresh", [True, False])
def test_what_ninja_would_build_anew_is_not_there(
    home: Home, monkeypatch: pytest.MonkeyPatch, fresh: bool
) -> None:
    """Other settings or newer sources: FlashInfer would build for hours when it loads it."""
    monkeypatch.setattr(modules, "_up_to_date", UP_TO_DATE)
    path = home.built(NAME)
    ninja_path = path.with_name("build.ninja")
    spec = SimpleNamespace(
        build_dir=path.parent, ninja_path=ninja_path, write_ninja=lambda: ninja_path.touch()
    )
    monkeypatch.setattr(modules, "spec_of", lambda name: spec)
    says = "ninja: no work to do." if fresh else "[1/248] nvcc"
    wanted = f"-n -C {path.parent} -f {ninja_path}"
    script = f'#!/bin/sh\n[ "$*" = "{wanted}" ] && echo "{says}"\n'
    (home.root / "bin" / "ninja").write_text(script)
    said = modules.missing(NAME)
    assert (said == "") is fresh and ninja_path.exists()
    assert fresh or ("anew" in said and "run: expertd prebuild" in said)
    home.built(NAME, "aot")
    assert modules.missing(NAME) == "", "what FlashInfer brings itself is loaded as it is"


def test_a_module_that_flashinfer_cannot_describe(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a CUDA version, say, its load would raise: the plan is refused instead."""

    def spec_of(name: str) -> None:
        raise RuntimeError("Could not find nvcc")

    monkeypatch.setattr(modules, "_up_to_date", UP_TO_DATE)
    monkeypatch.setattr(modules, "spec_of", spec_of)
    home.built(NAME)
    assert "Could not find nvcc" in modules.missing(NAME)


def test_an_interface_of_flashinfers_specs() -> None:
    from flashinfer.jit import core

    spec = core.JitSpecNvcc(NAME, [], None, None, None, None)
    assert callable(spec.write_ninja) and spec.ninja_path.parent == spec.build_dir
