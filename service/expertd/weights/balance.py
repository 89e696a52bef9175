"""Which experts each of many replicas holds, so that measured load is even; imports no torch.

A replica holds one contiguous range, as `--experts` takes it. Ranges may overlap: an expert that
several replicas hold is redundant, and a pool sends each of its rows to one of them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from heapq import heappop, heappush
from itertools import accumulate

from expertd.errors import InvalidArgument

Ranges = list[range]


_Path = tuple[int, int, "_Path | None"]
"""A cut of the load line: its point, the expert in which that is, and the cuts before it."""


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
    least, places = max(0, replicas - experts), replicas * most
    if places < experts:
        raise InvalidArgument(
            f"{experts} experts given; {replicas} replicas with room for {most} have {places} "
            "places: more replicas or more room are needed"
        )
    if not least <= redundant <= places - experts:
        raise InvalidArgument(
            f"{redundant} redundant experts given; {least} to {places - experts} are accepted, for "
            f"each of {replicas} replicas has 1 to {most} of {experts} experts"
        )


def _walk(
    line: Sequence[int], replicas: int, redundant: int, most: int, limit: int
) -> list[int] | None:
    """Cuts of the load line into at most that many parts of at most limit; None if there are none.

    A cut inside an expert makes it redundant. For every number of cuts so spent the farthest
    point is kept: whatever can be done from a nearer point can be done from it.
    """
    paths: dict[int, _Path] = {0: (0, 0, None)}
    for left in reversed(range(replicas)):
        # Who is not so far by now cannot reach the end, were every further part full.
        least = line[-1] - left * limit
        farther: dict[int, _Path] = {}
        farthest = -1
        for spent, path in paths.items():
            if path[0] <= farthest:
                continue
            farthest = path[0]
            reach, at = _reach(line, path, most, limit)
            if line[at] == line[-1]:
                return _points((line[at], at, path))
            if line[at] >= max(least, farther.get(spent, path)[0] + 1):
                farther[spent] = (line[at], at, path)
            if reach > line[at] and reach >= least and spent < redundant:
                farther[spent + 1] = (reach, at, path)
        paths = farther
    return None


def _reach(line: Sequence[int], path: _Path, most: int, limit: int) -> tuple[int, int]:
    """The end of the fullest next part, and the expert in which that is."""
    point, first, _ = path
    reach = min(point + limit, line[min(first + most, len(line) - 1)])
    return reach, bisect_right(line, reach, first) - 1


def _points(path: _Path | None) -> list[int]:
    """Every point of a path, the first first."""
    found = []
    while path is not None:
        found.append(path[0])
        path = path[2]
    return found[::-1]


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
    later = sorted(range(len(ranges)), key=lambda at: -ranges[at].start)
    able: list[tuple[int, int]] = []
    for expert, left in enumerate(loads):
        while later and ranges[later[-1]].start <= expert:
            heappush(able, (ranges[later[-1]].stop, later.pop()))
        while left:
            if not able:
                return None
            stop, at = able[0]
            taken = min(left, limit - shares[at]) if stop > expert else 0
            shares[at] += taken
            left -= taken
            if left:
                heappop(able)
    return shares


def even_ranges(experts: int, replicas: int) -> Ranges:
    """Equal shares, whatever the load."""
    bounds = [experts * at // replicas for at in range(replicas + 1)]
    return [range(begin, end) for begin, end in zip(bounds, bounds[1:], strict=False)]


def imbalance(shares: Sequence[int]) -> float:
    """The busiest replica's rows over the mean; 1.0 is even."""
    return max(shares) * len(shares) / sum(shares) if any(shares) else 1.0
