"""The way of a batch through the one call: formats, widths, outputs, one call at a time."""

from __future__ import annotations

import inspect
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.service.trtllm.layers import (
    ACTIVATIONS,
    backend_of,
    batch_of,
    layer,
    row_of,
    with_inputs,
)
from tests.service.trtllm.recording import ANSWER, Recording
from tests.strategies import random_weights, relative

from expertd.backends.flashinfer import library as flashinfer
from expertd.backends.flashinfer.entry import Entry, argument_names
from expertd.backends.flashinfer.once import warn_once
from expertd.capability.library import recorded, recorded_versions
from expertd.capability.row import Row
from expertd.capability.rows.flashinfer_trtllm import ROWS
from expertd.capability.versions import at_least
from expertd.core import Activation, ActivationKind, PlanMode, QuantScheme
from expertd.weights.dequant import e8m0_to_float


def name_of(row: Row) -> str:
    return f"{row.entry}-{row.activation_quant}-{row.quants[0]}"


@pytest.mark.parametrize("version", recorded_versions())
def test_names_bind_to_every_recorded_version_that_has_the_row(version: str) -> None:
    """Required arguments are all passed and none is passed that the version lacks."""
    library = recorded(version)
    for row in ROWS:
        if row.call is None or not at_least(version, row.since):
            continue
        signature = library.functions[row.call.function]
        for kind, use in row.activations.items():
            if at_least(version, use.since) and set(use.passes) <= signature.names:
                names = argument_names(
                    row, replace(ACTIVATIONS[kind], limit=None), True, signature.names
                )
                assert set(signature.required) <= set(names) <= signature.names, (version, row)


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_the_output_is_the_batchs_own(recording: Recording, row: Row) -> None:
    spec = layer(row.quants[0])
    batch = batch_of(row, spec)
    backend_of(row, spec).forward(batch)
    if "per_channel" not in row.entry:
        assert recording.last["output"] is batch.out
    assert bool((batch.out == ANSWER).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("mode", list(PlanMode))
def test_replies_of_other_dtypes_are_copied(
    recording: Recording, dtype: torch.dtype, mode: PlanMode
) -> None:
    row = row_of(QuantScheme.NVFP4, mode)
    spec = layer(QuantScheme.NVFP4)
    batch = batch_of(row, spec)
    batch = replace(batch, out=batch.out.to(dtype))
    backend_of(row, spec).forward(batch)
    assert recording.last["output"] is None and bool((batch.out == ANSWER).all())


def test_an_output_that_the_entry_put_elsewhere_is_copied(recording: Recording) -> None:
    recording.in_place = False
    row, spec = row_of(QuantScheme.BF16, PlanMode.ROUTED), layer(QuantScheme.BF16)
    batch = batch_of(row, spec)
    backend_of(row, spec).forward(batch)
    assert bool((batch.out == ANSWER).all())


PADDED = [row for row in ROWS if "hidden" in row.limits.padded]


@pytest.mark.parametrize("row", PADDED, ids=name_of)
def test_padded_layers_tell_their_real_sizes(recording: Recording, row: Row) -> None:
    spec = layer(row.quants[0], hidden=160, intermediate=96)
    batch = batch_of(row, spec)
    backend_of(row, spec).forward(batch)
    given, step = recording.last, row.limits.hidden_multiple
    assert (given["valid_hidden_size"], given["valid_intermediate_size"]) == (160, 96)
    assert given["intermediate_size"] == row.limits.intermediate_multiple
    width = given["hidden_states"].shape[1] * (2 if row.activation_quant == "nvfp4" else 1)
    assert width == 256 and width % step == 0
    real = given["hidden_states"].shape[1] * 160 // 256
    assert not given["hidden_states"][:, real:].float().any()
    scale = given.get("hidden_states_scale")
    if scale is not None:
        assert scale.shape[1] == width // (16 if row.activation_quant == "nvfp4" else 32)
    assert batch.out.shape == (5, 160) and bool((batch.out == ANSWER).all())


@pytest.mark.parametrize("quant", [QuantScheme.BF16, QuantScheme.FP8_BLOCK128])
def test_a_padded_width_of_the_experts_alone(recording: Recording, quant: QuantScheme) -> None:
    row, spec = row_of(quant, PlanMode.ROUTED), layer(quant, intermediate=192)
    backend_of(row, spec).forward(batch_of(row, spec))
    assert recording.last["intermediate_size"] == 256
    assert "valid_intermediate_size" not in recording.last


def test_rows_that_arrive_in_groups_of_128(recording: Recording) -> None:
    row = row_of(QuantScheme.FP8_BLOCK128, PlanMode.ROUTED)
    spec = layer(QuantScheme.FP8_BLOCK128)
    scales = torch.rand(5, 2) + 0.1
    codes = torch.randn(5, 256).to(torch.float8_e4m3fn)
    batch = batch_of(row, spec)
    batch = replace(batch, rows=codes, row_scales=scales)
    backend_of(row, spec).forward(batch)
    given = recording.last
    assert torch.equal(given["hidden_states"].float(), codes.float())
    assert given["hidden_states_scale"].is_contiguous()
    assert torch.equal(given["hidden_states_scale"], scales.T)


@pytest.mark.parametrize(
    ("quant", "dtype"),
    [(QuantScheme.MXFP8, torch.uint8), (QuantScheme.MXFP4, torch.float8_e4m3fn)],
)
def test_rows_that_arrive_as_mxfp8(
    recording: Recording, quant: QuantScheme, dtype: torch.dtype
) -> None:
    row = row_of(quant, PlanMode.ROUTED, "mxfp8")
    spec = layer(quant, hidden=160)
    bits = torch.randint(100, 150, (5, 5), dtype=torch.int32).to(torch.uint8)
    codes = torch.randn(5, 160).to(torch.float8_e4m3fn)
    batch = batch_of(row, spec)
    batch = replace(batch, rows=codes, row_scales=e8m0_to_float(bits))
    backend_of(row, spec).forward(batch)
    given = recording.last
    assert given["hidden_states_scale"].dtype == dtype
    assert torch.equal(given["hidden_states_scale"].view(torch.uint8)[:, :5], bits)
    assert torch.equal(given["hidden_states"][:, :160].float(), codes.float())


@pytest.mark.parametrize("quant", [QuantScheme.NVFP4, QuantScheme.FP8_TENSOR])
def test_a_checkpoint_without_activation_scales(
    recording: Recording, quant: QuantScheme, caplog: pytest.LogCaptureFixture
) -> None:
    warn_once.cache_clear()
    row, spec = row_of(quant, PlanMode.ROUTED), layer(quant)
    batch = batch_of(row, spec)
    backend_of(row, spec, inputs=False).forward(batch)
    assert "no activation scales" in caplog.text
    rows = recording.last["hidden_states"]
    if quant is QuantScheme.FP8_TENSOR:
        assert torch.equal(rows.float(), batch.rows.to(torch.float8_e4m3fn).float())


def test_rows_share_the_largest_static_scale_and_inner_rows_keep_their_own(
    recording: Recording,
) -> None:
    row = row_of(QuantScheme.FP8_TENSOR, PlanMode.ROUTED)
    spec = layer(QuantScheme.FP8_TENSOR, activation=ACTIVATIONS[ActivationKind.RELU2])
    random = torch.Generator().manual_seed(5)
    weights = with_inputs(random_weights(spec, random), random)
    backend_of(row, spec).forward(batch := batch_of(row, spec))
    assert weights.input13 is not None and weights.input2 is not None
    assert weights.scale13 is not None and weights.scale2 is not None
    shared, given = weights.input13.amax(), recording.last
    rows = given["hidden_states"].float() * shared
    assert relative(rows, batch.rows) < 0.04
    close = torch.testing.assert_close
    close(given["output1_scales_gate_scalar"], weights.scale13[:, 0] * shared)
    close(given["output1_scales_scalar"], 1 / weights.input2)
    close(given["output2_scales_scalar"], weights.scale2[:, 0] * weights.input2)


STEPPED = [row for row in ROWS if ActivationKind.SWIGLU_STEP in row.activations]


@pytest.mark.parametrize("row", STEPPED, ids=name_of)
def test_an_absent_limit_is_told_to_the_kernel_that_has_one_of_its_own(
    recording: Recording, row: Row
) -> None:
    """Left alone, SwiGLU-step clamps at 7."""
    unclamped = Activation(ActivationKind.SWIGLU_STEP)
    spec = layer(row.quants[0], activation=unclamped)
    backend_of(row, spec, inputs=False).forward(batch_of(row, spec))
    assert bool((recording.last["gemm1_clamp_limit"] > 1e30).all())


def test_every_size_is_warmed(recording: Recording) -> None:
    row, spec = row_of(QuantScheme.BF16, PlanMode.ROUTED), layer(QuantScheme.BF16)
    backend = backend_of(row, spec)
    assert len(recording.calls) == 1 and recording.last["hidden_states"].shape[0] == 3
    recording.calls.clear()
    backend.warm_up((9000, 16, 1, 16))
    sizes = [len(call["hidden_states"]) for call in recording.calls]
    assert sizes == [1, 16, 9000]
    assert {call["tune_max_num_tokens"] for call in recording.calls} == {8192}


def test_probes_give_every_expert_the_same_share(recording: Recording) -> None:
    row, spec = row_of(QuantScheme.BF16, PlanMode.ROUTED), layer(QuantScheme.BF16)
    backend_of(row, spec).warm_up((12,))
    ids, _ = recording.last["topk_ids"]
    assert torch.equal(ids.flatten().bincount(), torch.full((8,), 3))
    assert bool((ids.sort(dim=1).values.diff(dim=1) > 0).all()), "no expert twice in a row"


def test_one_call_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    row, spec = row_of(QuantScheme.BF16, PlanMode.ROUTED), layer(QuantScheme.BF16)
    inside, overlaps = threading.Semaphore(1), []
    release = threading.Event()

    class Slow:
        @staticmethod
        def trtllm_bf16_routed_moe(**given: Any) -> torch.Tensor:
            overlaps.append(not inside.acquire(blocking=False))
            release.wait(0.2)
            inside.release()
            return torch.zeros(1)

    monkeypatch.setattr(flashinfer, "_stand_in", Slow)
    entry = Entry(row, spec.activation, padded=False)
    values = dict.fromkeys(entry.names)
    threads = [threading.Thread(target=entry, args=(values,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert overlaps == [False] * 3


def test_flashinfer_itself_has_all_the_names() -> None:
    library = flashinfer.library()
    assert not flashinfer.simulated()
    for row in ROWS:
        assert row.call is not None
        entry = Entry(row, ACTIVATIONS[ActivationKind.SWIGLU], padded=True)
        accepted = inspect.signature(getattr(library, row.call.function)).parameters
        assert set(entry.names) <= set(accepted)
        for enum, member in row.call.members:
            assert member in getattr(library, enum).__members__
    assert library.SfLayout["layout_linear"] == 2 and callable(library.autotune)
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = library.no_such_thing
