"""What the tests of pools share: rows, what is right, and pools over fake fleets."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from tests.clients.fleets import EXPERTS, HIDDEN, LAYER, MODEL, TABLE, FakeFleet, routed, truth

from expertd_client import ExpertPool

FOUR = ((0, 8), (0, 8), (8, 16), (8, 16))


@contextmanager
def pool_over(fleet: FakeFleet, **settings: Any) -> Iterator[ExpertPool]:
    with ExpertPool(fleet.targets, connect=fleet.connect, **settings) as pool:
        yield pool


def drawn(tokens: int, seed: int = 0) -> tuple[Any, Any]:
    """Rows and logits."""
    random = np.random.default_rng(seed)
    rows = random.standard_normal((tokens, HIDDEN)).astype(np.float32)
    return rows, random.standard_normal((tokens, EXPERTS)).astype(np.float32)


def assert_right(output: Any, rows: Any, logits: Any, table: Any = TABLE) -> None:
    np.testing.assert_allclose(output, truth(rows, *routed(logits), table), rtol=1e-5, atol=1e-5)


ROWS, LOGITS = drawn(300)


def ask(pool: ExpertPool, **options: Any) -> Any:
    return pool.call(MODEL, LAYER, ROWS, router_logits=LOGITS, **options)


def failing(error: Exception, times: int = 10**9) -> Any:
    """A script that raises error that many times."""
    left = iter(range(times))

    async def script(call: Any) -> None:
        if next(left, None) is not None:
            raise error

    return script


async def hang(call: Any) -> None:
    await asyncio.sleep(60)
