"""Proofs on a layer's own shape: what the small one cannot show, within a budget, kept on disk."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.service.proof.test_proof import HalvesSwapped, WritesNothing
from tests.strategies import generator, layer_spec, random_weights

from expertd.backends.base import Backend, Batch
from expertd.backends.build import build
from expertd.backends.grouped.backend import Grouped
from expertd.capability.device import detect
from expertd.capability.row import State
from expertd.capability.rows.grouped import ROWS as GROUPED
from expertd.capability.rows.reference import ROWS as REFERENCE
from expertd.cli import main
from expertd.core import LayerSpec, QuantScheme
from expertd.core.buckets import token_buckets
from expertd.core.routing import RoutingMethod, RoutingSpec
from expertd.proof.prover import Prover
from expertd.proof.run import Proof
from expertd.proof.shape import HARD_CASES, Layer, prove_shape
from expertd.proof.store import ProofStore
from expertd.weights.demo import write_demo

ROW = replace(GROUPED[0], needs_proof=True)
CPU = torch.device("cpu")
BUCKETS = token_buckets(128)
SPEC = layer_spec(quant=QuantScheme.BF16)
CELL = ROW.cell(SPEC.quant)


class WrongInLargeBatches(Grouped):
    """The tile of large batches forgets a column."""

    def _forward(self, batch: Batch) -> None:
        super()._forward(batch)
        if len(batch.rows) > 100:
            batch.out[:, 0] += 10


class ForgetsTheLastRow(Grouped):
    """The last row of large batches stays as it was: poisoned."""

    def _forward(self, batch: Batch) -> None:
        last = batch.out[-1].clone()
        super()._forward(batch)
        if len(batch.rows) > 100:
            batch.out[-1] = last


class RaisesAtOneSize(Grouped):
    def _forward(self, batch: Batch) -> None:
        if len(batch.rows) == 64:
            raise RuntimeError("planted")
        super()._forward(batch)


class IgnoresTheLastExpert(Grouped):
    """What a kernel compiled for fewer experts than the layer has would do."""

    def _forward(self, batch: Batch) -> None:
        assert batch.ids is not None
        last = self.spec.num_experts - 1
        super()._forward(replace(batch, ids=batch.ids.masked_fill(batch.ids == last, -1)))


def layer(kind: type[Grouped] = Grouped, spec: LayerSpec = SPEC, **names: Any) -> Layer:
    weights = random_weights(spec, generator(7))
    backend: Backend = kind(ROW, spec, CPU)
    assert backend.check() == ()
    backend.prepare_weights(weights, None)
    backend.warm_up((1,))
    reference = build(REFERENCE[0], spec, weights, None, CPU)
    return Layer(spec, {ROW.cell(spec.quant): backend}, reference, **names)


def proof(found: Layer, seconds: float = 60, **options: Any) -> Proof:
    (only,) = prove_shape(found, BUCKETS, seconds, **options).values()
    return only


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"routing": None},
        {"expert_begin": 2, "expert_end": 5},
        {"quant": QuantScheme.MXFP4},
        {"routing": RoutingSpec(RoutingMethod.LLAMA4, "sigmoid", 1, weight_site="input")},
        {"routing": RoutingSpec(RoutingMethod.CUSTOM, "none", 2)},
    ],
    ids=str,
)
def test_a_true_plan_is_proven_in_every_case_and_bucket(changes: dict[str, Any]) -> None:
    found = proof(layer(spec=replace(SPEC, **changes)))
    assert found.state is State.PROVEN and found.whole
    names = [trial.case for trial in found.trials]
    assert names[0] == "128 tokens", "the largest bucket first"
    assert set(names) == {f"{n} tokens" for n in BUCKETS} | {case.name for case in HARD_CASES}
    assert 0 < found.worst <= found.tolerance


def test_the_layers_bias_chooses_its_experts() -> None:
    routing = RoutingSpec(RoutingMethod.DEEPSEEK_V3, "sigmoid", 2, bias=True, n_group=1)
    spec = replace(SPEC, routing=replace(routing, topk_group=1))
    bias = torch.tensor([0.0] * 5 + [100.0])
    assert proof(layer(spec=spec, bias=bias)).state is State.PROVEN
    assert proof(layer(IgnoresTheLastExpert, spec, bias=bias)).state is State.FAILED


@pytest.mark.parametrize(
    ("fault", "cases"),
    [
        (HalvesSwapped, None),
        (WritesNothing, None),
        (IgnoresTheLastExpert, None),
        (WrongInLargeBatches, {"128 tokens"}),
        (ForgetsTheLastRow, {"128 tokens"}),
        (RaisesAtOneSize, {"64 tokens"}),
    ],
)
def test_a_planted_fault_is_found(fault: type[Grouped], cases: set[str] | None) -> None:
    found = proof(layer(fault))
    assert found.state is State.FAILED
    failed = {trial.case for trial in found.failures}
    assert failed == cases if cases else len(failed) > 5


def test_a_plan_that_writes_nothing_does_not_pass_for_the_one_before_it() -> None:
    found = layer()
    other = replace(ROW, backend="other").cell(SPEC.quant)
    (idle,) = layer(WritesNothing).backends.values()
    both = replace(found, backends={**found.backends, other: idle})
    proofs = prove_shape(both, BUCKETS, 60)
    assert (proofs[CELL].state, proofs[other].state) == (State.PROVEN, State.FAILED)


def test_what_the_budget_leaves_out_is_not_proven() -> None:
    ticks = iter(range(1000))
    found = proof(layer(), seconds=5, clock=lambda: float(next(ticks)))
    assert found.state is State.PRESENT and not found.whole
    assert 1 < len(found.trials) < len(BUCKETS)


def test_a_failure_within_the_budget_counts() -> None:
    ticks = iter(range(1000))
    found = proof(layer(WrongInLargeBatches), seconds=3, clock=lambda: float(next(ticks)))
    assert found.state is State.FAILED


def prover(home: Path) -> Prover:
    return Prover(ProofStore(home, detect("cpu")), detect("cpu"))


def test_a_shape_is_proven_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = prover(tmp_path)
    assert mine.shape_states(layer(), BUCKETS) == {CELL: State.PROVEN}
    monkeypatch.setattr("expertd.proof.prover.prove_shape", lambda *_: pytest.fail("twice"))
    assert mine.shape_states(layer(), BUCKETS) == {CELL: State.PROVEN}
    assert prover(tmp_path).shape_states(layer(), BUCKETS) == {CELL: State.PROVEN}
    store = ProofStore(tmp_path, detect("cpu"))
    assert store.states() == {}, "a shape's proof is not the cell's"
    assert store.shape_states(replace(SPEC, hidden=128)) == {}
    with pytest.raises(pytest.fail.Exception, match="twice"):
        prover(tmp_path).shape_states(layer(), token_buckets(256))


def test_a_failure_is_kept_and_a_new_proof_replaces_it(tmp_path: Path) -> None:
    assert prover(tmp_path).shape_states(layer(HalvesSwapped), BUCKETS) == {CELL: State.FAILED}
    assert prover(tmp_path).shape_states(layer(), BUCKETS) == {CELL: State.FAILED}
    store = ProofStore(tmp_path, detect("cpu"))
    store.keep_shape(SPEC, [proof(layer())], len(BUCKETS))
    assert store.shape_states(SPEC) == {CELL: State.PROVEN}


def test_a_proof_that_was_cut_short_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("expertd.proof.prover.BUDGET_SECONDS", -1.0)
    assert prover(tmp_path).shape_states(layer(), BUCKETS) == {CELL: State.PRESENT}
    monkeypatch.undo()
    assert prover(tmp_path).shape_states(layer(), BUCKETS) == {CELL: State.PROVEN}


def test_a_plan_that_needs_no_proof_gets_none(tmp_path: Path) -> None:
    (free,) = GROUPED
    backend = build(free, SPEC, random_weights(SPEC, generator(8)), None, CPU)
    found = layer()
    assert prover(tmp_path).shape_states(replace(found, backends={CELL: backend}), BUCKETS) == {}


@pytest.mark.slow
def test_verify_proves_a_models_shapes_and_explain_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    write_demo(tmp_path / "model", quant=QuantScheme.BF16)
    path = ["--model", str(tmp_path / "model"), "--device", "cpu", "--json"]
    assert main(["explain", *path]) == 0
    before = json.loads(capsys.readouterr().out)["layers"][0]["plans"][0]
    monkeypatch.setattr("expertd.cli.verify.usable_cells", lambda *_: [])
    assert main(["verify", *path, "--max-batch-tokens", "32"]) == 0
    (shape,) = json.loads(capsys.readouterr().out)["shapes"]
    assert shape["layers"] == "0-1"
    (cell,) = shape["cells"]
    assert (cell["backend"], cell["state"]) == ("grouped", "proven")
    assert cell["trials"] == len(HARD_CASES) + len(token_buckets(32))
    assert main(["explain", *path]) == 0
    after = json.loads(capsys.readouterr().out)["layers"][0]["plans"][0]
    assert before["state"] == "present" and "proof" not in before
    assert (after["proof"], after["state"]) == ("shape", "proven")


@pytest.mark.slow
def test_a_shape_that_fails_is_no_plan_and_exits_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    write_demo(tmp_path / "model", quant=QuantScheme.BF16)
    monkeypatch.setattr("expertd.cli.verify.usable_cells", lambda *_: [])
    forward = Grouped._forward

    def wrong(own: Grouped, batch: Batch) -> None:
        forward(own, replace(batch, rows=-batch.rows) if len(batch.rows) == 32 else batch)

    monkeypatch.setattr(Grouped, "_forward", wrong)
    path = ["--model", str(tmp_path / "model"), "--device", "cpu", "--json"]
    assert main(["verify", *path, "--max-batch-tokens", "32"]) == 1
    (cell,) = json.loads(capsys.readouterr().out)["shapes"][0]["cells"]
    assert [failure["case"] for failure in cell["failures"]] == ["32 tokens"]
    assert main(["explain", *path]) == 3
    (layers,) = json.loads(capsys.readouterr().out)["layers"]
    assert "proof_failed" in str(layers["rejected"])
