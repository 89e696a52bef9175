"""A cell whose kernels are not here yet has not failed: nobody ran it, and a later run may."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from expertd.capability.device import detect, simulated
from expertd.capability.row import State
from expertd.capability.rows.flashinfer_trtllm import ROWS
from expertd.cli import main
from expertd.proof.run import Proof, Trial, prove
from expertd.proof.store import ProofStore

ROW, CARD = ROWS[0], simulated("sm90")
TEXT = "FlashInfer's module fused_moe_trtllm_sm100 is not built here; run: expertd prebuild"


def test_a_proof_without_kernels_is_none() -> None:
    proof = prove(ROW, ROW.quants[0], replace(simulated("sm100"), kind="cpu"))
    assert proof.state is State.PRESENT and not proof.trials and not proof.failures
    (text,) = proof.absent
    assert "NVIDIA card" in text


def test_verify_says_once_what_to_do_and_keeps_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    absent = Proof(ROW.cell(ROW.quants[0]), 1e-2, (), absent=(TEXT,))
    monkeypatch.setattr("expertd.cli.verify.prove", lambda *_: absent)
    assert main(["verify", "--device", "cpu", "--backend", "grouped"]) == 0
    told = "".join(capsys.readouterr().out.split())
    assert told.count("notrun:" + "".join(TEXT.split())) == 1 and "failed" not in told
    assert ProofStore(tmp_path / "expertd", detect("cpu")).states() == {}


@pytest.mark.parametrize("command", ["verify", "tune"])
def test_the_cards_own_thread(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton and FlashInfer launch on the calling thread's device only, which is card 0."""

    class Reached(Exception):
        pass

    def reached(device: torch.device) -> None:
        raise Reached(str(device))

    monkeypatch.setattr(f"expertd.cli.{command}.detect", lambda _: replace(CARD, index=1))
    monkeypatch.setattr(torch.cuda, "set_device", reached)
    with pytest.raises(Reached, match="cuda:1"):
        main([command, "--model", "/nowhere"])


def test_its_json_is_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    broken = Trial("near ties", "Default", math.nan, "it raised")
    proofs = iter([Proof(ROW.cell(ROW.quants[0]), 1e-2, trials) for trials in ((), (broken,))] * 99)
    monkeypatch.setattr("expertd.cli.verify.prove", lambda *_: next(proofs))
    assert main(["verify", "--device", "cpu", "--backend", "grouped", "--json"]) == 1

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    cells = json.loads(capsys.readouterr().out, parse_constant=refuse)["cells"]
    assert [cell["worst"] for cell in cells[:2]] == [None, None]
