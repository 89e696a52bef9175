"""Which experts each of many replicas holds, so that measured load is even; imports no torch.

A replica holds one contiguous range, as `--experts` takes it. Ranges may overlap: an expert that
several replicas hold is redundant, and a pool sends each of its rows to one of them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate

from expertd.errors import InvalidArgument

Ranges = list[range]


def balance(
    loads: Sequence[int], replicas: int, redundant: int = 0, most: int | None = None
) -> Ranges:
    """The ranges of experts, sum of lengths len(loads) + redundant, with the least busiest replica.

    loads: rows per expert; most: how many experts a replica has room for. Raises InvalidArgument
    for numbers that no ranges can have.
    """
    most = len(loads) if most is None else min(most, len(loads))
    _check(len(loads), replicas, redundant, most)
    # A row for each expert beside its weighted load: experts nobody chose are spread evenly too.
    line = [0, *accumulate(load * len(loads) * replicas + 1 for load in loads)]
    low, high = 0, line[-1]
    while high - low > 1:
        middle = (low + high) // 2
        if _walk(line, replicas, redundant, most, middle) is None:
            low = middle
        else:
            high = middle
    cuts = _walk(line, replicas, redundant, most, high)
    assert cuts is not None, "one replica may bear the whole load unless its room is too small"
    return _spend(_fill(_touched(line, cuts), replicas, line), loads, redundant, most)


def _check(experts: int, replicas: int, redundant: int, most: int) -> None:
    if replicas < 1 or most < 1 or redundant < 0 or not experts:
        raise InvalidArgument(
            f"{experts} experts on {replicas} replicas with room for {most} and {redundant} "
            "redundant: at least one expert, one replica and room for one are needed"
        )
    slots = experts + redundant
    if not replicas <= slots <= replicas * most:
        raise InvalidArgument(
            f"{experts} experts and {redundant} redundant ones make {slots} places; {replicas} "
            f"replicas, each with 1 to {most} of the experts, have {replicas} to {replicas * most}"
        )


def _walk(
    line: Sequence[int], replicas: int, redundant: int, most: int, limit: int
) -> list[int] | None:
    """Cuts of the load line into at most that many parts of at most limit; None if there are none.

    A cut inside an expert makes it redundant. For every number of cuts so spent the farthest
    point is kept: whatever can be done from a nearer point can be done from it.
    """
    paths: list[list[int] | None] = [[0]] + [None] * redundant
    for _ in range(replicas):
        farther: list[list[int] | None] = [None] * (redundant + 1)
        for spent, path in enumerate(paths):
            if path is None:
                continue
            first = bisect_right(line, path[-1]) - 1
            reach = min(path[-1] + limit, line[min(first + most, len(line) - 1)])
            whole = line[bisect_right(line, reach) - 1]
            if whole == line[-1]:
                return [*path, whole]
            _keep(farther, spent, path, whole)
            if reach > whole and spent < redundant:
                _keep(farther, spent + 1, path, reach)
        paths = farther
    return None


def _keep(paths: list[list[int] | None], spent: int, path: list[int], point: int) -> None:
    """Keeps the path to point if it is the farthest with these cuts and goes on at all."""
    known = paths[spent]
    if point > path[-1] and (known is None or point > known[-1]):
        paths[spent] = [*path, point]


def _touched(line: Sequence[int], cuts: Sequence[int]) -> Ranges:
    """The experts that each part of the load line has something of."""
    begins = [bisect_right(line, cut) - 1 for cut in cuts[:-1]]
    ends = [bisect_right(line, cut - 1) for cut in cuts[1:]]
    return [range(begin, end) for begin, end in zip(begins, ends, strict=True)]


def _fill(ranges: Ranges, replicas: int, line: Sequence[int]) -> Ranges:
    """Halves the busiest ranges, or doubles a lone expert, until every replica has a range."""
    while len(ranges) < replicas:
        at = max(
            range(len(ranges)),
            key=lambda n: (len(ranges[n]) > 1, line[ranges[n].stop] - line[ranges[n].start]),
        )
        held = ranges[at]
        middle = (line[held.start] + line[held.stop]) / 2
        cuts = range(held.start + 1, held.stop)
        cut = min(cuts, key=lambda e: abs(line[e] - middle), default=None)
        parts = [held, held] if cut is None else [range(held.start, cut), range(cut, held.stop)]
        ranges[at : at + 1] = parts
    return ranges


def _spend(ranges: Ranges, loads: Sequence[int], redundant: int, most: int) -> Ranges:
    """Widens ranges until all redundant places are taken, by the experts hottest per copy first."""
    copies = Counter(expert for held in ranges for expert in held)
    for _ in range(len(loads) + redundant - copies.total()):
        wider = [
            (loads[expert] / copies[expert], -len(held), at, expert)
            for at, held in enumerate(ranges)
            if len(held) < most
            for expert in (held.start - 1, held.stop)
            if 0 <= expert < len(loads)
        ]
        *_, at, expert = max(wider)
        held = ranges[at]
        ranges[at] = range(min(held.start, expert), max(held.stop, expert + 1))
        copies[expert] += 1
    return ranges


def predicted(loads: Sequence[int], ranges: Ranges) -> list[int]:
    """Each replica's rows when every expert's rows are split as evenly as its holders allow."""
    low, high = -1, sum(loads)
    while high - low > 1:
        middle = (low + high) // 2
        if _shares(loads, ranges, middle) is None:
            low = middle
        else:
            high = middle
    shares = _shares(loads, ranges, high)
    assert shares is not None, "ranges hold every expert"
    return shares


def _shares(loads: Sequence[int], ranges: Ranges, limit: int) -> list[int] | None:
    """Rows per replica, none above limit: the holder whose range ends first takes what it can."""
    shares = [0] * len(ranges)
    by_end = sorted(range(len(ranges)), key=lambda at: ranges[at].stop)
    for expert, left in enumerate(loads):
        for at in by_end:
            if expert in ranges[at]:
                taken = min(left, limit - shares[at])
                shares[at] += taken
                left -= taken
        if left:
            return None
    return shares


def even_ranges(experts: int, replicas: int) -> Ranges:
    """Equal shares, whatever the load."""
    bounds = [experts * at // replicas for at in range(replicas + 1)]
    return [range(begin, end) for begin, end in zip(bounds, bounds[1:], strict=False)]


def imbalance(shares: Sequence[int]) -> float:
    """The busiest replica's rows over the mean; 1.0 is even."""
    return max(shares) * len(shares) / sum(shares) if any(shares) else 1.0
