"""Kernels and modules that are not there are refused with what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.service.trtllm import flashinfer_cpu
from tests.service.trtllm.layers import layer, row_of

from expertd.backends.flashinfer_trtllm import kernels
from expertd.backends.flashinfer_trtllm.backend import Bf16
from expertd.backends.flashinfer_trtllm.presence import missing_kernels, module_name
from expertd.core import PlanMode, QuantScheme

assert flashinfer_cpu  # FlashInfer is imported with a workspace of its own


def test_no_list_of_kernels(tmp_path: Path) -> None:
    (text,) = missing_kernels(tmp_path)
    assert str(tmp_path) in text and "expertd prebuild" in text


def test_listed_kernels_that_are_missing(tmp_path: Path) -> None:
    (tmp_path / "include").mkdir()
    listed = "00 Bmm_one.cubin\n11 include/meta.h\n22 Bmm_two.cubin\n"
    (tmp_path / "checksums.txt").write_text(listed)
    (tmp_path / "Bmm_one.cubin").touch()
    (tmp_path / "include/meta.h").touch()
    (text,) = missing_kernels(tmp_path)
    assert text.startswith("1 of 3 kernels") and "expertd prebuild" in text
    (tmp_path / "Bmm_two.cubin").touch()
    assert not list(missing_kernels(tmp_path))


def test_a_backend_says_all_of_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (10, 0))
    monkeypatch.setattr("flashinfer.jit.env.FLASHINFER_CUBIN_DIR", tmp_path)
    monkeypatch.setattr("flashinfer.jit.env.FLASHINFER_JIT_DIR", tmp_path)
    monkeypatch.setattr("flashinfer.jit.env.get_aot_path", lambda name: tmp_path / name)
    assert not kernels.simulated()
    row = row_of(QuantScheme.BF16, PlanMode.ROUTED)
    refusals = Bf16(row, layer(QuantScheme.BF16), torch.device("cuda:0")).check()
    assert [refusal.code for refusal in refusals] == ["kernels_absent"] * 2
    assert all(refusal.entry == row.entry for refusal in refusals)
    assert all("expertd prebuild" in refusal.text for refusal in refusals)


def test_modules_of_the_cards() -> None:
    names = [module_name(card) for card in ((10, 0), (10, 3), (10, 7))]
    base = "fused_moe_trtllm_sm"
    assert names == [f"{base}100", f"{base}100", f"{base}107"]
