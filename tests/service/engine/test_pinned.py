"""Results' memory: used again when the last reader is gone, never before."""

from __future__ import annotations

import gc

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertd.engine.pinned import PinnedPool, host_bytes


def test_memory_comes_back_with_the_last_view() -> None:
    pool = PinnedPool(pin=False)
    like = torch.empty(3, 700, dtype=torch.bfloat16)
    taken = pool.take(like)
    assert (taken.shape, taken.dtype) == (like.shape, like.dtype)
    address = taken.data_ptr()
    part = host_bytes(taken)[1400:2800]
    taken.fill_(1.5)
    del taken
    gc.collect()
    other = pool.take(like)
    assert other.data_ptr() != address, "somebody still reads it"
    other.zero_()
    assert (
        bytes(part)
        == torch.full((700,), 1.5, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
    )
    del part
    gc.collect()
    assert pool.take(like).data_ptr() == address


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3000), st.booleans()), max_size=30))
def test_no_two_readers_share_memory(steps: list[tuple[int, bool]]) -> None:
    pool = PinnedPool(pin=False)
    kept: list[tuple[memoryview, int]] = []
    for number, (size, keep) in enumerate(steps):
        taken = pool.take(torch.empty(size, 4, dtype=torch.uint8))
        taken.fill_(number)
        if keep:
            kept.append((host_bytes(taken), number))
        elif kept:
            kept.pop(0)
        del taken
    assert all(set(view) == {number} for view, number in kept)
