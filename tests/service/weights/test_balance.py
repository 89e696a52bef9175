"""Ranges of experts for replicas: laws that hold for every load, and the best that can be had."""

from __future__ import annotations

from itertools import combinations_with_replacement
from math import ceil

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from expertd.errors import InvalidArgument
from expertd.weights.balance import Ranges, balance, even_ranges, imbalance, predicted

LOADS = st.lists(st.one_of(st.integers(0, 60), st.just(0), st.just(10**7)), min_size=1, max_size=40)


@given(LOADS, st.integers(1, 9), st.integers(0, 20), st.integers(0, 3))
def test_every_expert_is_placed_within_the_room(
    loads: list[int], replicas: int, redundant: int, spare: int
) -> None:
    experts = len(loads)
    most = min(ceil((experts + redundant) / replicas) + spare, experts)
    assume(replicas <= experts + redundant <= replicas * most)
    ranges = balance(loads, replicas, redundant, most)
    assert len(ranges) == replicas
    assert sorted({expert for held in ranges for expert in held}) == list(range(experts))
    assert sum(map(len, ranges)) == experts + redundant
    assert all(held.step == 1 and 1 <= len(held) <= most for held in ranges)


@given(LOADS, st.integers(1, 9), st.integers(0, 20))
def test_predicted_rows_are_all_rows_and_none_is_where_it_cannot_be(
    loads: list[int], replicas: int, redundant: int
) -> None:
    assume(replicas <= len(loads) + redundant <= replicas * len(loads))
    ranges = balance(loads, replicas, redundant)
    shares = predicted(loads, ranges)
    assert sum(shares) == sum(loads)
    for share, held in zip(shares, ranges, strict=True):
        alone = [e for e in held if sum(e in other for other in ranges) == 1]
        assert sum(loads[e] for e in alone) <= share <= sum(loads[e] for e in held)


@given(LOADS, st.integers(1, 9), st.integers(0, 8))
def test_redundancy_never_hurts_and_equal_ranges_are_never_better(
    loads: list[int], replicas: int, redundant: int
) -> None:
    assume(replicas <= len(loads) and len(loads) + redundant < replicas * len(loads))
    less, more = (
        imbalance(predicted(loads, balance(loads, replicas, count)))
        for count in (redundant, redundant + 1)
    )
    assert more <= less <= imbalance(predicted(loads, even_ranges(len(loads), replicas)))


@given(LOADS, st.integers(1, 9))
def test_a_redundant_expert_for_each_cut_makes_load_even(loads: list[int], replicas: int) -> None:
    redundant = replicas - 1
    assume(len(loads) + redundant <= replicas * len(loads))
    shares = predicted(loads, balance(loads, replicas, redundant))
    # Cuts lie on a line on which unused experts weigh a little too, and between whole rows.
    assert max(shares) <= sum(loads) / replicas + 2


@given(
    st.lists(st.sampled_from((0, 1, 3, 10, 50)), min_size=1, max_size=4),
    st.integers(1, 3),
    st.integers(0, 3),
)
def test_no_ranges_are_better(loads: list[int], replicas: int, redundant: int) -> None:
    assume(replicas <= len(loads) + redundant <= replicas * len(loads))
    found = max(predicted(loads, balance(loads, replicas, redundant)))
    assert found == min(max(predicted(loads, r)) for r in all_ranges(loads, replicas, redundant))


def all_ranges(loads: list[int], replicas: int, redundant: int) -> list[Ranges]:
    """Every choice of ranges that holds every expert."""
    count = len(loads)
    single = [range(a, b) for a in range(count) for b in range(a + 1, count + 1)]
    return [
        list(chosen)
        for chosen in combinations_with_replacement(single, replicas)
        if sum(map(len, chosen)) == count + redundant
        and len({e for h in chosen for e in h}) == count
    ]


def test_predicted_is_what_a_hand_finds() -> None:
    ranges = [range(2), range(1, 3), range(1, 2)]
    assert sorted(predicted([4, 30, 5], ranges)) == [13, 13, 13]
    assert predicted([4, 0, 10], ranges) == [4, 10, 0]
    assert imbalance([4, 10, 1]) == 2.0 and imbalance([0, 0]) == 1.0


def test_what_is_left_of_redundancy_goes_to_the_hottest_per_copy() -> None:
    assert balance([6, 7, 7], 3, 4) == [range(2), range(3), range(1, 3)]


@pytest.mark.parametrize(
    ("replicas", "redundant", "most", "told"),
    [
        (0, 0, None, "at least one expert"),
        (1, -1, None, "at least one expert"),
        (1, 0, 0, "at least one expert"),
        (5, 0, None, "0 redundant experts given; 1 to 16 are accepted"),
        (2, 5, None, "5 redundant experts given; 0 to 4 are accepted"),
        (2, 3, 3, "3 redundant experts given; 0 to 2 are accepted"),
        (2, 1, 2, "1 redundant experts given; 0 to 0 are accepted"),
        (2, 0, 1, "2 replicas with room for 1 have 2 places"),
    ],
)
def test_numbers_that_no_ranges_have(
    replicas: int, redundant: int, most: int | None, told: str
) -> None:
    with pytest.raises(InvalidArgument, match=told):
        balance([1, 1, 1, 1], replicas, redundant, most)
