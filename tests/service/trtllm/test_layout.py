"""Both modes of an entry hold one copy of the weights; fp8 blocks hold none."""

from __future__ import annotations

import pytest
import torch
from tests.service.trtllm.layers import backend_of, batch_of, layer, row_of, with_inputs
from tests.strategies import random_weights
from torch.multiprocessing.reductions import StorageWeakRef

from expertd.backends.base import native_bytes
from expertd.backends.flashinfer_trtllm import backend as trtllm
from expertd.backends.flashinfer_trtllm import weights as trtllm_weights
from expertd.core import PlanMode, QuantScheme

COPIED = [quant for quant in QuantScheme if quant not in ("fp16", "fp32", "fp8_block128")]


@pytest.mark.parametrize("quant", COPIED)
def test_both_modes_share_a_copy(quant: QuantScheme, twin: None) -> None:
    spec = layer(quant)
    random = torch.Generator().manual_seed(5)
    weights = with_inputs(random_weights(spec, random), random)
    both = []
    for mode in PlanMode:
        row = row_of(quant, mode)
        made = getattr(trtllm, row.load.partition(":")[2])(row, spec, torch.device("cpu"))
        assert made.check() == ()
        made.prepare_weights(weights, None)
        both.append(made)
    assert both[0].layout == both[1].layout != ""
    assert 0.9 * weights.nbytes < native_bytes(both) < 1.1 * weights.nbytes


def test_fp8_blocks_are_used_as_they_are(twin: None) -> None:
    found = backend_of(row_of(QuantScheme.FP8_BLOCK128, PlanMode.ROUTED), layer("fp8_block128"))
    assert found.layout == "" and found.native_bytes < 1000


@pytest.mark.parametrize("quant", ["bf16", "nvfp4"])
def test_what_is_restored_computes_the_same(quant: QuantScheme, twin: None) -> None:
    row, spec = row_of(quant, PlanMode.ROUTED), layer(quant)
    found, batch = backend_of(row, spec), batch_of(row, spec)
    found.forward(batch)
    expected = batch.out.clone()
    found.release()
    assert found.native_bytes == 0 and not found.warm
    with pytest.raises(AssertionError, match="WARM expected"):
        found.forward(batch)
    found.restore()
    batch.out.fill_(float("nan"))
    found.forward(batch)
    assert torch.equal(batch.out, expected) and found.native_bytes > 0


@pytest.mark.parametrize("quant", COPIED)
def test_a_copy_does_without_the_canonical_weights(quant: QuantScheme, twin: None) -> None:
    row, spec = row_of(quant, PlanMode.ROUTED), layer(quant)
    found, batch = backend_of(row, spec), batch_of(row, spec)
    found.forward(batch)
    expected = batch.out.clone()
    assert found.canonical is not None
    matrices = (found.canonical.w13, found.canonical.w2)
    pieces = [StorageWeakRef(matrix.untyped_storage()) for matrix in matrices]
    del matrices
    found.forget_given()
    assert all(piece.expired() for piece in pieces)
    batch.out.fill_(float("nan"))
    found.forward(batch)
    assert torch.equal(batch.out, expected)


def test_weights_at_the_place_of_others_that_are_gone_get_a_copy_of_their_own(twin: None) -> None:
    found = backend_of(row_of(QuantScheme.BF16, PlanMode.ROUTED), layer("bf16"))
    assert isinstance(found, trtllm.TrtllmMoe) and found.canonical is not None
    old = id(found.canonical)
    found.forget_given()
    later = random_weights(found.spec, torch.Generator().manual_seed(8))
    in_use = trtllm_weights._IN_USE
    (key,) = (key for key in in_use if key[0] == old)
    in_use[id(later), *key[1:]] = found._native
    made = trtllm_weights.native(later, found.spec, found._sizes)
    assert made is not found._native
    assert trtllm_weights.native(later, found.spec, found._sizes) is made
