"""The checks of a batch on a card: what the interpreter tests, and that no call compiles."""

from __future__ import annotations

import os

import pytest
import torch
from tests.gpu.test_warm import compiled
from tests.service.triton.topk_cases import *  # noqa: F403
from tests.service.triton.topk_cases import DEVICE, SPECS, drawn

from expertd.engine.checks import CHECKED_LOGITS, checks_on, warm_up_checks


@pytest.fixture
def seed() -> int:
    """EXPERTD_TEST_SEED repeats a run."""
    number = int(os.environ.get("EXPERTD_TEST_SEED") or int.from_bytes(os.urandom(4), "little"))
    print("EXPERTD_TEST_SEED =", number)
    return number


def test_no_call_compiles(seed: int) -> None:
    for spec in SPECS:
        warm_up_checks(spec, DEVICE)
    told = checks_on("cuda")
    with compiled() as names:
        for spec in SPECS:
            for rows, top_k in ((1, 1), (3, 16), (300, 8)):
                ids, weights = (tensor.to(DEVICE) for tensor in drawn(rows, top_k, seed))
                for dtype in (torch.int32, torch.int64):
                    for partial in (False, True):
                        told.topk(ids.to(dtype), weights, spec, partial)
                for dtype in CHECKED_LOGITS:
                    told.output(torch.zeros(rows, spec.hidden, dtype=dtype, device=DEVICE))
                    logits = torch.zeros(rows, spec.num_experts, dtype=dtype, device=DEVICE)
                    assert spec.routing is not None
                    told.logits(logits, spec.routing.top_k)
    torch.cuda.synchronize()
    assert not names
