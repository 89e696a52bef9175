"""Splitting and adding up: nothing lost, nothing twice, the same sum in whatever order."""

from __future__ import annotations

import itertools
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertd_client.sharding import (
    LEAST_ROWS,
    Holder,
    Part,
    Piece,
    Split,
    Work,
    add_up,
    cut,
    put_together,
    share,
    split_experts,
    split_tokens,
    take_rows,
)

EXPERTS, HIDDEN = 16, 8
seeds = st.integers(0, 2**32 - 1)


@st.composite
def fleets(draw: st.DrawFn, least: int = 0) -> list[Holder]:
    """Replicas with any ranges, twins and overlaps and gaps included."""
    count = draw(st.integers(least, 6))
    found = []
    for number in range(count):
        begin = draw(st.integers(0, EXPERTS - 1))
        end = draw(st.integers(begin + 1, EXPERTS))
        speed = draw(st.sampled_from([1.0, 100.0, 1e6]))
        found.append(Holder(f"r{number}", begin, end, speed, draw(st.sampled_from([0, 50, 1e4]))))
    return found


def drawn(seed: int, tokens: int, top_k: int = 4) -> Work:
    """Rows that each want some experts, -1 among them."""
    random = np.random.default_rng(seed)
    ids = np.argsort(random.random((tokens, EXPERTS)), axis=1)[:, :top_k].astype(np.int32)
    ids[random.random(ids.shape) < 0.2] = -1
    return Work(np.arange(tokens), ids, random.random((tokens, top_k), np.float32))


def pairs(works: list[Work]) -> list[tuple[int, int, float]]:
    """Every row, expert and weight that somebody is to compute."""
    return [
        (int(row), int(expert), float(weight))
        for work in works
        for row, ids, weights in zip(work.rows, work.ids, work.weights, strict=True)  # type: ignore[arg-type]
        for expert, weight in zip(ids, weights, strict=True)
        if expert >= 0
    ]


@settings(max_examples=200, deadline=None)
@given(fleets(), seeds, st.sampled_from([0, 1, 7, 300]), st.integers(1, 3))
def test_every_pair_goes_to_one_holder(
    holders: list[Holder], seed: int, tokens: int, callers: int
) -> None:
    work = drawn(seed, tokens)
    found = split_experts(work, holders, callers)
    missing = [found.missing] if found.missing else []
    given_out = pairs([part.work for part in found.parts] + missing)
    assert sorted(given_out) == sorted(pairs([work]))
    held = [(holder.begin, holder.end) for holder in holders]
    for _, expert, _ in pairs(missing):
        assert not any(begin <= expert < end for begin, end in held)
    for part in found.parts:
        assert all(part.holder.begin <= e < part.holder.end for _, e, _ in pairs([part.work]))
        assert (part.work.ids >= 0).any(axis=1).all(), "a row travels that nobody needs there"
        assert (np.diff(part.work.rows) > 0).all(), "a holder gets a row once"
    names = [part.holder.name for part in found.parts]
    assert len(names) == len(set(names))


@settings(max_examples=200, deadline=None)
@given(fleets(least=1), st.sampled_from([0, 1, 63, 64, 1000]), st.integers(1, 6))
def test_every_row_goes_to_one_holder(holders: list[Holder], tokens: int, callers: int) -> None:
    found = split_tokens(Work(np.arange(tokens)), holders, callers)
    rows = [part.work.rows for part in found.parts]
    assert sorted(np.concatenate(rows).tolist()) == list(range(tokens))
    assert found.missing is None and 1 <= len(rows) <= max(1, len(holders) // callers)
    assert all(len(some) >= min(LEAST_ROWS, tokens) for some in rows)


def table(random: np.random.Generator) -> Any:
    """What each expert makes of a row: the row times a number of its own."""
    return random.standard_normal((EXPERTS, HIDDEN)).astype(np.float32)


def computed(split: Split, rows: Any, experts: Any) -> list[Piece]:
    """Each part as a server answers it, in float32."""
    pieces = []
    for part in split.parts:
        ids, weights = part.work.ids, part.work.weights
        assert ids is not None and weights is not None
        held = np.where(ids[..., None] >= 0, experts[ids], np.float32(0))
        scaled = (held * weights[..., None]).sum(axis=1)
        pieces.append(Piece(part.holder, part.work.rows, take_rows(rows, part.work.rows) * scaled))
    return pieces


@settings(max_examples=150, deadline=None)
@given(fleets(), seeds, st.sampled_from([0, 1, 200]), st.integers(1, 3), st.randoms())
def test_the_sum_is_that_of_one_server(
    holders: list[Holder], seed: int, tokens: int, callers: int, order: Any
) -> None:
    random = np.random.default_rng(seed)
    holders = [*holders, Holder("all", 0, EXPERTS, 1.0, 10.0)]
    rows, experts = random.standard_normal((tokens, HIDDEN)).astype(np.float32), table(random)
    work = drawn(seed, tokens)
    pieces = computed(split_experts(work, holders, callers), rows, experts)
    whole = computed(split_experts(work, holders[-1:]), rows, experts)
    total = add_up(tokens, HIDDEN, pieces, np.dtype(np.float32))
    expected = add_up(tokens, HIDDEN, whole, np.dtype(np.float32))
    np.testing.assert_allclose(total, expected, rtol=1e-5, atol=1e-5)
    order.shuffle(pieces)
    again = add_up(tokens, HIDDEN, pieces, np.dtype(np.float32))
    assert total.tobytes() == again.tobytes(), "the order of arrival shows in the sum"


def test_the_order_of_arrival_would_show() -> None:
    """Else the property above proves nothing: these sums differ in another order."""
    rows = np.arange(1)
    big, small = np.full((1, 1), 1e8, np.float32), np.full((1, 1), 1.0, np.float32)
    pieces = [
        Piece(Holder(str(n), n, n + 1), rows, output) for n, output in enumerate([big, small, -big])
    ]
    sums = set()
    for given_order in itertools.permutations(pieces):
        plain = given_order[0].output + given_order[1].output + given_order[2].output
        sums.add(plain.item())
        assert add_up(1, 1, list(given_order), np.dtype(np.float32)).item() == 0.0
    assert len(sums) > 1


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_sums_are_rounded_once(dtype: Any) -> None:
    random = np.random.default_rng(3)
    outputs = random.standard_normal((3, 500, HIDDEN)).astype(np.float32)
    pieces = [Piece(Holder(str(n), n, n + 1), np.arange(500), o) for n, o in enumerate(outputs)]
    expected = ((outputs[0] + outputs[1]) + outputs[2]).astype(dtype)
    assert add_up(500, HIDDEN, pieces, np.dtype(dtype)).tobytes() == expected.tobytes()


def test_wide_sums_cross_blocks() -> None:
    wide = 1 << 17
    rows = np.array([0, 3, 4])
    piece = Piece(Holder("a", 0, 1), rows, np.arange(3 * wide, dtype=np.float32).reshape(3, wide))
    total = add_up(6, wide, [piece], np.dtype(np.float32))
    assert (total[rows] == piece.output).all() and not total[[1, 2, 5]].any()


@pytest.mark.parametrize(("queued", "chosen"), [(0.0, "idle"), (500.0, "spare")])
def test_the_least_loaded_holder_of_a_hot_expert_is_chosen(queued: float, chosen: str) -> None:
    cold, spare = Holder("cold", 0, 8), Holder("spare", 8, 16, 1.0, 100.0)
    found = split_experts(drawn(1, 50), [cold, spare, Holder("idle", 8, 16, 1.0, queued)])
    assert {part.holder.name for part in found.parts} == {"cold", chosen}


def test_what_a_call_adds_counts_as_load() -> None:
    """Experts 8-15 are with `left` too, but `left` alone has the rest: `right` is chosen."""
    left, right = Holder("left", 0, 16), Holder("right", 8, 16)
    found = split_experts(drawn(2, 50), [left, right])
    by_name = {part.holder.name: part.work.ids for part in found.parts}
    assert (by_name["left"] < 8).all() and (by_name["right"][by_name["right"] >= 0] >= 8).all()


def test_twins_share_rows_and_send_none_twice() -> None:
    twins = [Holder(f"{side}{n}", b, b + 8) for side, b in (("a", 0), ("b", 8)) for n in range(2)]
    work = drawn(5, 400)
    narrow, wide = split_experts(work, twins, callers=2), split_experts(work, twins)
    assert (len(narrow.parts), len(wide.parts)) == (2, 4)
    sent = [sum(len(part.work.rows) for part in found.parts) for found in (narrow, wide)]
    assert sent[0] == sent[1]


def test_shares_follow_speed_and_queue() -> None:
    fast, slow = Holder("fast", 0, 1, 3000.0), Holder("slow", 0, 1, 1000.0)
    assert dict_of(share(4000, [slow, fast])) == {"fast": 3000, "slow": 1000}
    waiting = Holder("fast", 0, 1, 3000.0, 3000.0)
    assert dict_of(share(4000, [slow, waiting])) == {"fast": 2250, "slow": 1750}
    buried = Holder("fast", 0, 1, 3000.0, 1e6)
    assert dict_of(share(4000, [slow, buried])) == {"slow": 4000}
    assert dict_of(share(LEAST_ROWS, [slow, fast])) == {"fast": LEAST_ROWS}


def test_a_call_among_others_takes_the_holder_that_is_done_first() -> None:
    early, late = Holder("z", 0, 1, 100.0, 50.0), Holder("a", 0, 1, 100.0, 900.0)
    assert dict_of(share(1000, [late, early], callers=2)) == {"z": 1000}
    swift = Holder("a", 0, 1, 1e5, 900.0)
    assert dict_of(share(1000, [swift, early], callers=2)) == {"a": 1000}


def dict_of(shares: list[tuple[Holder, int]]) -> dict[str, int]:
    return {holder.name: rows for holder, rows in shares}


@settings(max_examples=200, deadline=None)
@given(fleets(least=1), st.integers(1, 5000))
def test_those_who_share_end_together(holders: list[Holder], count: int) -> None:
    shares = share(count, holders)
    assert sum(rows for _, rows in shares) == count
    ends = [holder.start + rows / holder.speed for holder, rows in shares]
    slack = max(1.5 / holder.speed for holder, _ in shares)
    if len(shares) > 1:
        assert max(ends) - min(ends) <= slack + 1e-6 * max(ends)


def test_rows_put_together() -> None:
    rows = np.arange(12, dtype=np.float16).reshape(6, 2)
    a, b = np.array([0, 1, 2]), np.array([3, 5])
    pieces = [Piece(Holder("b", 0, 1), b, rows[b]), Piece(Holder("a", 0, 1), a, rows[a])]
    whole = put_together(6, 2, pieces, np.dtype(np.float16))
    assert (whole[[0, 1, 2, 3, 5]] == rows[[0, 1, 2, 3, 5]]).all() and not whole[4].any()


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
def test_rows_are_taken(dtype: Any) -> None:
    rows = np.random.default_rng(1).standard_normal((9, 4)).astype(dtype)
    together, apart = np.array([2, 3, 4]), np.array([0, 5, 8])
    assert take_rows(rows, together).base is not None, "rows that lie together are a view"
    for wanted in (together, apart):
        assert take_rows(rows, wanted).tobytes() == rows[wanted].tobytes()


@given(seeds, st.integers(0, 60), st.integers(1, 70))
def test_a_part_is_cut_into_parts_of_the_same_rows(seed: int, tokens: int, most: int) -> None:
    part = Part(Holder("r0", 0, EXPERTS), drawn(seed, tokens))
    found = cut(part, most)
    assert all(smaller.holder is part.holder for smaller in found)
    sizes = [len(smaller.work.rows) for smaller in found]
    assert max(sizes) <= most and max(sizes) - min(sizes) <= 1
    assert len(found) == max(1, -(-tokens // most)), "no more messages than it takes"
    assert np.concatenate([one.work.rows for one in found]).tolist() == list(range(tokens))
    assert pairs([one.work for one in found]) == pairs([part.work])
