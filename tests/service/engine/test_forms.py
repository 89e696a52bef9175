"""Every form of a call is run once on a card before a request can be the first to need it."""

from __future__ import annotations

from itertools import product

import torch
from tests.service.engine.parts import CPU, resident
from tests.strategies import generator, layer_spec

from expertd.backends.base import Batch
from expertd.core.buckets import token_buckets
from expertd.engine.forms import DTYPES, REPLIED, warm_up_forms

BUCKETS = token_buckets(64)


def test_every_dtype_of_rows_and_replies_is_run_on_a_card_and_none_here() -> None:
    seen: set[tuple[torch.dtype, torch.dtype, int]] = set()

    def look(batch: Batch) -> None:
        seen.add((batch.rows.dtype, batch.out.dtype, len(batch.rows)))

    backends = list(resident(layer_spec(), generator(0), look).backends.values())[:1]
    warm_up_forms(backends, CPU, BUCKETS)
    assert not seen
    warm_up_forms(backends, torch.device("cuda"), BUCKETS)
    assert {(rows, size) for rows, _, size in seen} == set(product(DTYPES, BUCKETS))
    replies = {(rows, out, size) for rows, out, size in seen if size in REPLIED}
    assert replies == set(product(DTYPES, DTYPES, REPLIED))
