"""Proofs: true cells are proven, planted faults are not, and what is kept is read back."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from expertd.backends.base import Backend, Batch
from expertd.backends.build import build
from expertd.backends.grouped.backend import Grouped
from expertd.capability.device import DeviceInfo, detect
from expertd.capability.row import Cell, Row, State
from expertd.capability.rows.grouped import ROWS as GROUPED
from expertd.capability.rows.reference import ROWS as REFERENCE
from expertd.cli import main
from expertd.core import Activation, ActivationKind, LayerSpec, QuantScheme
from expertd.errors import LayerFailed
from expertd.proof import cases
from expertd.proof.prover import Prover
from expertd.proof.run import Proof, Trial, prove, random_weights, relative_error
from expertd.proof.selfcheck import self_check
from expertd.proof.store import ProofStore

(ROW,) = GROUPED
CPU = torch.device("cpu")


class HalvesSwapped(Grouped):
    """Takes [gate; up] for [up; gate]."""

    def _forward(self, batch: Batch) -> None:
        swapped = torch.cat(tuple(reversed(self.weights.w13.chunk(2, dim=1))), dim=1)
        self.weights = replace(self.weights, w13=swapped)
        super()._forward(batch)


class ForgetsALastRow(Grouped):
    def _forward(self, batch: Batch) -> None:
        super()._forward(replace(batch, out=batch.out[:-1], rows=batch.rows[:-1]))

    def _expert(self, *args: object) -> torch.Tensor:
        raise RuntimeError("planted")


class WritesNothing(Grouped):
    def _forward(self, batch: Batch) -> None:
        return None


class DropsTheClamp(Grouped):
    def _forward(self, batch: Batch) -> None:
        self.spec = replace(self.spec, activation=Activation(self.spec.activation.kind))
        super()._forward(batch)


def made(fault: type[Grouped], *given: Any) -> Backend:
    """What build() makes, but of a class with a fault."""
    row, spec, weights, bias, device = given
    if row.backend != "grouped":
        return build(*given)
    backend = fault(row, spec, device)
    backend.check()
    backend.prepare_weights(weights, bias)
    backend.warm_up((1,))
    return backend


@pytest.mark.parametrize("quant", [QuantScheme.FP8_BLOCK128, QuantScheme.NVFP4])
def test_a_true_cell_is_proven(quant: QuantScheme) -> None:
    proof = prove(ROW, quant, detect("cpu"))
    assert proof.state is State.PROVEN
    assert {trial.case for trial in proof.trials} == {case.name for case in cases.CASES}
    assert 0 < proof.worst <= proof.tolerance


@pytest.mark.parametrize("fault", [HalvesSwapped, WritesNothing, DropsTheClamp, ForgetsALastRow])
def test_a_planted_fault_fails_its_proof(
    fault: type[Grouped], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("expertd.proof.run.build", partial(made, fault))
    proof = prove(ROW, QuantScheme.BF16, detect("cpu"))
    assert proof.state is State.FAILED, fault.__name__
    assert proof.failures


def test_only_the_clamp_case_sees_a_dropped_clamp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expertd.proof.run.build", partial(made, DropsTheClamp))
    proof = prove(ROW, QuantScheme.BF16, detect("cpu"))
    assert {trial.case for trial in proof.failures} == {"clamp exceeded"}


def test_one_wrong_row_among_many_does_not_hide() -> None:
    expected = torch.randn(1000, 64)
    found = expected.clone()
    found[17] = -found[17]
    assert relative_error(found, expected) > 0.3
    assert relative_error(expected, expected) == 0
    found[3, 3] = float("nan")
    assert relative_error(found, expected) != relative_error(found, expected)


def test_proofs_are_kept_and_replaced(tmp_path: Path) -> None:
    device = detect("cpu")
    cell = ROW.cell(QuantScheme.BF16)
    store = ProofStore(tmp_path, device)
    assert store.states() == {}
    store.keep([Proof(cell, 1e-2, (Trial("a", "b", 0.5),))])
    assert ProofStore(tmp_path, device).states() == {cell: State.FAILED}
    store.keep([Proof(cell, 1e-2, (Trial("a", "b", 0.001),))])
    assert store.states() == {cell: State.PROVEN}
    other = replace(device, flashinfer="another version")
    assert ProofStore(tmp_path, other).states() == {}


@pytest.mark.parametrize("text", ["", "[]", '{"proofs": [{"state": "proven"}]}', "\x00"])
def test_a_broken_store_proves_nothing(tmp_path: Path, text: str) -> None:
    store = ProofStore(tmp_path, detect("cpu"))
    store.keep([Proof(ROW.cell(QuantScheme.BF16), 1e-2, (Trial("a", "b", 0.0),))])
    (file,) = tmp_path.glob("proofs-*.json")
    assert len(json.loads(file.read_text())["proofs"]) == 1
    file.write_text(text)
    assert store.states() == {}


def test_the_prover_proves_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = detect("cpu")
    row = replace(ROW, needs_proof=True)
    spec = layer()
    weights = random_weights(spec, torch.Generator().manual_seed(1), CPU)
    cell = row.cell(QuantScheme.BF16)
    backend = build(row, spec, weights, None, CPU)
    prover = Prover(ProofStore(tmp_path, device), device)
    assert prover.states({cell: backend}) == {cell: State.PROVEN}
    monkeypatch.setattr("expertd.proof.prover.prove", lambda *_: pytest.fail("proven twice"))
    assert prover.states({cell: backend}) == {cell: State.PROVEN}
    assert Prover(ProofStore(tmp_path, device), device).states({cell: backend})


def layer() -> LayerSpec:
    return LayerSpec(
        hidden=64,
        intermediate=32,
        num_experts=8,
        expert_begin=2,
        expert_end=6,
        activation=Activation(ActivationKind.SWIGLU),
        quant=QuantScheme.BF16,
        routing=None,
    )


def test_the_self_check_compares_each_backend_on_the_layers_own_weights() -> None:
    spec = layer()
    weights = random_weights(spec, torch.Generator().manual_seed(2), CPU)
    (reference_row,) = REFERENCE
    reference = build(reference_row, spec, weights, None, CPU)
    good = build(ROW, spec, weights, None, CPU)
    self_check(spec, reference, [good])
    bad = made(HalvesSwapped, ROW, spec, weights, None, CPU)
    with pytest.raises(LayerFailed, match="grouped differs from the reference"):
        self_check(spec, reference, [good, bad])


GOLDEN = {
    "all-negative logits",
    "large bias, scale 2.5",
    "near ties",
    "padded sizes, not gated",
    "clamp exceeded",
}


@pytest.mark.slow
def test_verify_runs_the_golden_cases_on_every_usable_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    seen: dict[Cell, set[str]] = {}

    def watched(row: Row, quant: QuantScheme, device: DeviceInfo, seed: int) -> Proof:
        proof = prove(row, quant, device, seed)
        seen[proof.cell] = {trial.case for trial in proof.trials}
        return proof

    monkeypatch.setattr("expertd.cli.verify.prove", watched)
    assert main(["verify", "--device", "cpu", "--json"]) == 0
    cells = json.loads(capsys.readouterr().out)["cells"]
    assert {cell["state"] for cell in cells} == {"proven"}
    assert {cell["backend"] for cell in cells} == {"grouped", "reference"}
    assert all(cases >= GOLDEN for cases in seen.values())
    assert set(ProofStore(tmp_path / "expertd", detect("cpu")).states()) == set(seen)


def test_verify_fails_when_a_cell_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cell = ROW.cell(QuantScheme.BF16)
    failed = Proof(cell, 1e-2, (Trial("near ties", "Default", 0.5),))
    monkeypatch.setattr("expertd.cli.verify.prove", lambda *_: failed)
    assert main(["verify", "--device", "cpu", "--backend", "grouped"]) == 1
    assert "near ties" in capsys.readouterr().out
    assert main(["verify", "--backend", "nothing"]) == 2
