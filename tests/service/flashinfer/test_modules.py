"""Modules that would have to be built are told, wherever FlashInfer looks for them."""

from __future__ import annotations

import pytest
from tests.service.flashinfer.conftest import Home

from expertd.backends.flashinfer import modules

NAME = "fused_moe_90"


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
