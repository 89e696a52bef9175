"""How soon a replica that returns is used in full, whoever shares a pool, on a virtual clock."""

from __future__ import annotations

import random

import pytest
from tests.clients.virtual import RATE, Crowd, in_virtual_time

DEATH, RETURN, END = 9.0, 16.6, 24.0


@pytest.mark.parametrize("seed", [1, 6, random.randrange(1 << 30)])
def test_by_the_callers_of_one_pool(seed: int) -> None:
    """Its first answers, to a lone caller, must not make it look slow: it would stay lone."""
    assert used_again(Crowd(2, 6, 1, seed)) > 0.87 * 2 * RATE


def test_by_pools_that_know_nothing_of_each_other() -> None:
    """They must not all come when it looks idle, and all leave when it looks busy."""
    seed = random.randrange(1 << 30)
    print("seed", seed)
    assert used_again(Crowd(4, 12, 12, seed)) > 0.79 * 4 * RATE


def used_again(crowd: Crowd) -> float:
    """Rows a second of all replicas from two seconds after one's return on."""
    mortal = crowd.servers[-1]
    in_virtual_time(crowd.run(END, {DEATH: mortal.dies, RETURN: mortal.returns}))
    assert crowd.rate(DEATH + 1, RETURN) > 0.8 * (len(crowd.servers) - 1) * RATE
    return crowd.rate(RETURN + 2, END)
