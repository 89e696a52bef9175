"""Every form of a call is run once on a card before a request can be the first to need it."""

from __future__ import annotations

import torch
from tests.service.engine.parts import CPU, resident
from tests.strategies import generator, layer_spec

from expertd.backends.base import Batch
from expertd.engine.forms import DTYPES, SIZES, warm_up_forms


def test_every_dtype_of_rows_and_replies_is_run_on_a_card_and_none_here() -> None:
    seen: list[tuple[torch.dtype, torch.dtype, int]] = []

    def look(batch: Batch) -> None:
        seen.append((batch.rows.dtype, batch.out.dtype, len(batch.rows)))

    backends = list(resident(layer_spec(), generator(0), look).backends.values())[:1]
    warm_up_forms(backends, CPU)
    assert not seen
    warm_up_forms(backends, torch.device("cuda"))
    assert sorted(seen, key=str) == sorted(
        ((rows, out, size) for rows in DTYPES for out in DTYPES for size in SIZES), key=str
    )
