"""A layer that FlashInfer could run only after a build or a download is refused with what to do."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tests.service.flashinfer.conftest import Home
from tests.service.trtllm.layers import layer, row_of

from expertd.backends.flashinfer import modules
from expertd.backends.flashinfer.backend import FlashInferBackend
from expertd.backends.flashinfer_cutlass.backend import Cutlass
from expertd.backends.flashinfer_trtllm.backend import Bf16
from expertd.capability.rows.flashinfer_cutlass import ROWS as CUTLASS
from expertd.core import PlanMode, QuantScheme
from expertd_wire.errors import Refusal

CARD = torch.device("cuda:0")


def cutlass(quant: QuantScheme, device: torch.device = CARD) -> FlashInferBackend:
    row = next(row for row in CUTLASS if quant in row.quants)
    return Cutlass(row, layer(quant), device)


def trtllm(device: torch.device = CARD) -> FlashInferBackend:
    return Bf16(row_of(QuantScheme.BF16, PlanMode.ROUTED), layer(QuantScheme.BF16), device)


def texts(refusals: tuple[Refusal, ...], backend: FlashInferBackend) -> list[str]:
    assert {refusal.code for refusal in refusals} <= {"kernels_absent"}
    assert {refusal.entry for refusal in refusals} <= {backend.row.entry}
    return [refusal.text for refusal in refusals]


def test_trtllm_says_all_that_is_missing(
    home: Home, card: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = trtllm()
    kernels, module = texts(backend.check(), backend)
    assert "no list of kernels" in kernels and "fused_moe_trtllm_sm100" in module
    assert all("run: expertd prebuild" in text for text in (kernels, module))
    home.built("fused_moe_trtllm_sm100")
    assert texts(backend.check(), backend) == [kernels]
    pin = home.published(("Bmm_one.cubin",))
    monkeypatch.setattr("flashinfer.artifacts.CheckSumHash.TRTLLM_GEN_BMM", pin)
    assert backend.check() == ()


def test_cutlass_needs_the_module_of_the_card(home: Home, card: SimpleNamespace) -> None:
    backend = cutlass(QuantScheme.BF16)
    (text,) = texts(backend.check(), backend)
    assert "fused_moe_100" in text and "run: expertd prebuild" in text
    home.built("fused_moe_100", "aot")
    assert backend.check() == ()


def test_block_scales_on_hopper_need_the_compiler(
    home: Home, card: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepGEMM calls nvcc at the first call of a shape; without it that call would fail."""
    card.capability = (9, 0)
    for name in ("CUDA_HOME", "TRTLLM_DG_ENABLED", "TRTLLM_DG_NVCC_COMPILER"):
        monkeypatch.delenv(name, raising=False)
    home.built("fused_moe_90")
    backend = cutlass(QuantScheme.FP8_BLOCK128)
    (text,) = texts(backend.check(), backend)
    assert "nvcc" in text and "CUDA_HOME" in text
    assert cutlass(QuantScheme.BF16).check() == ()
    monkeypatch.setenv("TRTLLM_DG_ENABLED", "0")
    assert backend.check() == ()
    monkeypatch.delenv("TRTLLM_DG_ENABLED")
    monkeypatch.setenv("CUDA_HOME", str(home.root))
    assert len(backend.check()) == 1
    (home.root / "bin" / "nvcc").symlink_to(home.root / "bin" / "ninja")
    assert backend.check() == ()


@pytest.mark.parametrize("made", [trtllm, lambda device: cutlass(QuantScheme.BF16, device)])
def test_a_cpu_is_no_card(made: object) -> None:
    assert callable(made)
    backend = made(torch.device("cpu"))
    assert texts(backend.check(), backend) == [
        "it runs on an NVIDIA card only: start with --device cuda:0"
    ]


def test_the_h20_has_a_module_of_its_own(
    card: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under the name that FlashInfer gives it, and only while FlashInfer may build."""
    from flashinfer.jit.fused_moe import _should_enable_sm90_moe_prebuilt_d_descriptor as special

    monkeypatch.delenv("FLASHINFER_DISABLE_JIT", raising=False)
    for count, name in ((132, "fused_moe_90"), (78, "fused_moe_90_h20_prebuilt_d")):
        card.multi_processor_count = count
        assert modules.cutlass("90") == name and special() is (count == 78)
        assert modules.cutlass("100") == "fused_moe_100"
    monkeypatch.setenv("FLASHINFER_DISABLE_JIT", "0")
    assert modules.cutlass("90") == "fused_moe_90" and not special()


def test_a_home_that_cannot_be_written(
    card: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FlashInfer makes directories as it is imported; a layer must not fail for that."""

    def refuse() -> None:
        raise PermissionError(13, "Permission denied", "/nowhere/.cache")

    monkeypatch.setattr(modules, "_environment", refuse)
    backend = cutlass(QuantScheme.BF16)
    (text,) = texts(backend.check(), backend)
    assert "/nowhere/.cache" in text and "FLASHINFER_WORKSPACE_BASE" in text
