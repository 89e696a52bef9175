"""Shared memory as Triton lays it out for this very card, beside our own account of it."""

from __future__ import annotations

import os
import random

import pytest
import torch
from tests.compiled import CELLS, backend_of, laid_out, random_cut
from tests.service.backends.test_triton_shared import NAMES, needs

from expertd.backends.triton.backend import card_of
from expertd.backends.triton.shared import fitted
from expertd.capability.device import detect
from expertd.capability.match import device_refusals
from expertd.capability.row import Row
from expertd.core import QuantScheme

DEVICE = torch.device("cuda:0")


@pytest.mark.parametrize(("row", "quant"), CELLS, ids=NAMES)
def test_the_need_covers_what_triton_lays_out(row: Row, quant: QuantScheme) -> None:
    if device_refusals(row, detect("cuda:0")):
        pytest.skip("the row does not run on this card")
    seed = os.environ.get("EXPERTD_TEST_SEED") or str(random.SystemRandom().randrange(1 << 32))
    print("EXPERTD_TEST_SEED =", seed)
    chance, card = random.Random(seed), card_of(DEVICE)
    for gated in (True, False):
        backend = backend_of(row, quant, gated, DEVICE)
        first, second = backend._native.first, backend._native.second
        for _ in range(4):
            cut = fitted(random_cut(row, quant, card.arch, chance), first, second, gated, card)
            found, expected = laid_out(backend, cut), needs(backend, cut, card)
            print(cut.first, cut.sorted, found, expected)
            assert all(f <= e for f, e in zip(found, expected, strict=True))
