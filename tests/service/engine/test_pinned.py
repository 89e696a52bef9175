"""Results' memory: used again when the last reader is gone, never before."""

from __future__ import annotations

import gc

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertd.engine.pinned import PinnedPool


def test_memory_comes_back_with_the_last_view() -> None:
    pool = PinnedPool(pin=False)
    taken, view = pool.take(4200)
    assert (taken.shape, taken.dtype, len(view)) == ((4200,), torch.uint8, 4200)
    address = taken.data_ptr()
    part = view[1400:2800]
    taken.fill_(15)
    del taken, view
    gc.collect()
    other, kept = pool.take(4200)
    assert other.data_ptr() != address, "somebody still reads it"
    other.zero_()
    assert bytes(part) == bytes([15] * 1400)
    del part
    gc.collect()
    assert pool.take(4097)[0].data_ptr() == address
    assert len(kept) == 4200


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 12000), st.booleans()), max_size=30))
def test_no_two_readers_share_memory(steps: list[tuple[int, bool]]) -> None:
    pool = PinnedPool(pin=False)
    views: list[tuple[memoryview, int]] = []
    for number, (size, keep) in enumerate(steps):
        taken, view = pool.take(size)
        taken.fill_(number)
        if keep:
            views.append((view, number))
        elif views:
            views.pop(0)
        del taken, view
    assert all(set(view) == {number} for view, number in views)
