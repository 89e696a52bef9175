"""expertd explain on a card that is here says which kernels have to be made first."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.service.flashinfer.conftest import Home

from expertd.cli import main

SPEC = json.dumps(
    {
        "num_experts": 64,
        "top_k": 4,
        "hidden": 512,
        "intermediate": 256,
        "quant": "bf16",
        "routing": "Renormalize",
    }
)


@pytest.fixture
def answer(
    home: Home,
    card: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Any:
    """What explain says of a layer on the one card of this machine, for one backend."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)

    def ask(backend: str, device: str = "cuda:0") -> tuple[int, dict[str, Any]]:
        words = ("explain", "--spec", SPEC, "--device", device, "--backend", backend, "--json")
        code = main(words)
        return code, json.loads(capsys.readouterr().out)

    return ask


@pytest.mark.parametrize("backend", ["flashinfer_trtllm", "flashinfer_cutlass"])
def test_what_is_missing_is_told(answer: Any, backend: str) -> None:
    code, told = answer(backend)
    assert code == 3 and not told["plans"]
    texts = {
        reason["text"]
        for entry in told["rejected"]
        for reason in entry["reasons"]
        if reason["code"] == "kernels_absent"
    }
    assert texts and all("run: expertd prebuild" in text for text in texts)


def test_what_is_there_is_a_plan(answer: Any, home: Home) -> None:
    home.built("fused_moe_100")
    code, told = answer("flashinfer_cutlass")
    assert code == 0 and [plan["state"] for plan in told["plans"]] == ["present"]


def test_of_another_device_nothing_is_known(answer: Any) -> None:
    code, told = answer("flashinfer_trtllm", "sm100")
    assert code == 0 and told["plans"]
