"""Published kernels that are absent or damaged are told before anything asks for them."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.service.flashinfer.conftest import BMM, Home

from expertd.backends.flashinfer import kernels

NAMES = ("Bmm_one.cubin", "include/flashinferMetaInfo.h", "include/trtllmGen_bmm_export/Enums.h")


@pytest.fixture
def complete(home: Home, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a complete set, pinned by its list's hash."""
    pin = home.published(NAMES)
    monkeypatch.setattr("flashinfer.artifacts.CheckSumHash.TRTLLM_GEN_BMM", pin)
    return home.root / "cubins" / BMM


def test_a_complete_set(complete: Path) -> None:
    assert list(kernels.missing()) == []
    assert {kernel.path for kernel in kernels.every()} == {f"{BMM}/{name}" for name in NAMES}


def test_no_list(home: Home) -> None:
    (text,) = kernels.missing()
    assert str(home.root / "cubins" / BMM) in text and "expertd prebuild" in text


def test_a_list_of_other_kernels(complete: Path) -> None:
    """FlashInfer pins the list by its hash and would download it anew."""
    with (complete / "checksums.txt").open("a") as file:
        file.write("00 Bmm_two.cubin\n")
    (text,) = kernels.missing()
    assert "no list" in text and "expertd prebuild" in text


@pytest.mark.parametrize("name", NAMES)
def test_files_that_are_absent_or_damaged(complete: Path, name: str) -> None:
    path = complete / name
    content = path.read_bytes()
    path.unlink()
    (text,) = kernels.missing()
    assert text.startswith("1 of 3 kernels") and path.name in text and "expertd prebuild" in text
    path.write_bytes(content[:-1])
    assert [text] == list(kernels.missing())
    path.write_bytes(content)
    assert list(kernels.missing()) == []


def test_flashinfer_itself_looks_there(complete: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is complete here is what its loader finds without a download."""
    from flashinfer.jit import cubin_loader

    monkeypatch.setattr(cubin_loader, "FLASHINFER_CUBIN_DIR", kernels.root())
    monkeypatch.setenv("FLASHINFER_NO_DOWNLOAD", "1")
    text = cubin_loader.get_artifact(*kernels.listed())
    for kernel in kernels.every():
        assert cubin_loader.get_artifact(*kernel)
    assert cubin_loader.get_meta_hash(text) == kernels.every()[1].sha256
    (complete / NAMES[0]).unlink()
    with pytest.raises(RuntimeError, match="refusing to download"):
        cubin_loader.get_artifact(*kernels.every()[0])


def test_the_installed_flashinfer_pins_a_list() -> None:
    from tests.service.trtllm import flashinfer_cpu

    assert flashinfer_cpu
    listed = kernels.listed()
    assert listed.path.endswith("/checksums.txt") and "batched_gemm" in listed.path
    assert len(listed.sha256) == 64
