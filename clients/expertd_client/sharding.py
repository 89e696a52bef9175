"""Which replica computes what of a call, and the sum of their answers: pure, numpy alone.

T rows of the call, N rows of a piece of work, K experts a row, H width of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Rows = NDArray[Any]

LEAST_ROWS = 64
"""Fewer rows than these are not sent to a further replica of the same experts."""

BLOCK_BYTES = 1 << 20
"""What of a sum is worked on at a time: it stays in the cache while every part is added."""


@dataclass(frozen=True, slots=True)
class Holder:
    """A replica as a plan sees it: experts [begin, end), rows a second, rows that wait there.

    generation is which load of the layer said so, digest of which weights.
    """

    name: str
    begin: int
    end: int
    speed: float = 1.0
    queued: float = 0.0
    generation: int = 0
    digest: str = ""

    @property
    def start(self) -> float:
        """Seconds until it would begin."""
        return self.queued / self.speed


@dataclass(frozen=True, slots=True)
class Work:
    """Rows of a call [N], ascending; ids [N, K] and weights where experts are split.

    An id of -1 is no expert, or one that is somebody else's work.
    """

    rows: Ints
    ids: Rows | None = None
    weights: Rows | None = None

    @property
    def told(self) -> str:
        """Which rows they are, in words."""
        return f"{len(self.rows)} of the call's rows {self.rows[0]} to {self.rows[-1]}"


@dataclass(frozen=True, slots=True)
class Part:
    """What one holder is to compute."""

    holder: Holder
    work: Work


@dataclass(frozen=True, slots=True)
class Split:
    """Parts by holder, and what nobody holds."""

    parts: tuple[Part, ...]
    missing: Work | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """An answered part: output [N, H] for these rows, in the place that its holder gives it."""

    holder: Holder
    rows: Ints
    output: Rows

    @property
    def place(self) -> tuple[int, int, str, int]:
        """Orders sums by what was computed, not by who was first."""
        holder = self.holder
        return holder.begin, holder.end, holder.name, int(self.rows[0]) if len(self.rows) else -1


def split_tokens(work: Work, holders: Sequence[Holder], callers: int = 1) -> Split:
    """Whole rows over holders of all experts, so that they end together.

    callers is how many calls are under way: then each takes its share of the holders only, because
    a holder reads all of its weights for every part.
    """
    if not holders:
        return Split((), work)
    parts, begin = [], 0
    for holder, count in share(len(work.rows), holders, callers):
        parts.append(Part(holder, _some(work, slice(begin, begin + count))))
        begin += count
    return Split(tuple(parts))


def split_experts(work: Work, holders: Sequence[Holder], callers: int = 1) -> Split:
    """Every pair of a row and an expert to one holder; a holder gets a row once.

    Where several hold an expert, they share its rows, the least loaded first, as in split_tokens.
    """
    assert work.ids is not None and work.weights is not None
    owner_NK = _owners(work.ids, holders, callers)
    parts = [
        Part(holder, _masked(work, owner_NK == number)) for number, holder in enumerate(holders)
    ]
    missing = _masked(work, (work.ids >= 0) & (owner_NK < 0))
    used = tuple(part for part in parts if len(part.work.rows))
    return Split(used, missing if len(missing.rows) else None)


def _owners(ids_NK: Rows, holders: Sequence[Holder], callers: int) -> Ints:
    """The index of each pair's holder [N, K]; -1 where there is none."""
    spans = list(_spans(holders))
    span_NK = _span_of(ids_NK, spans)
    owner_NK = np.full(ids_NK.shape, -1)
    added = [0] * len(holders)
    needed = [np.flatnonzero((span_NK == number).any(axis=1)) for number in range(len(spans))]
    # Experts with one holder come first: what they add is seen where there is a choice.
    for number in sorted(range(len(spans)), key=lambda s: (len(spans[s][2]) > 1, -len(needed[s]))):
        able = [
            replace(holders[h], queued=holders[h].queued + added[h], name=str(h))
            for h in spans[number][2]
        ]
        row_owner_N = np.full(len(ids_NK), -1)
        row_owner_N[needed[number]] = _shared_out(len(needed[number]), able, callers, added)
        owner_NK = np.where(span_NK == number, row_owner_N[:, None], owner_NK)
    return owner_NK


def _shared_out(count: int, able: Sequence[Holder], callers: int, added: list[int]) -> Ints:
    """Which holder has each of count rows; added learns of them."""
    owners = [np.empty(0, np.int64)]
    for holder, rows in share(count, able, callers):
        added[int(holder.name)] += rows
        owners.append(np.full(rows, int(holder.name)))
    return np.concatenate(owners)


def _spans(holders: Sequence[Holder]) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """Ranges of experts [begin, end) that the same holders hold, with these holders' indices."""
    edges = sorted({edge for holder in holders for edge in (holder.begin, holder.end)})
    for begin, end in zip(edges, edges[1:], strict=False):
        able = [n for n, h in enumerate(holders) if h.begin <= begin and end <= h.end]
        if able:
            yield begin, end, tuple(able)


def _span_of(ids_NK: Rows, spans: Sequence[tuple[int, int, tuple[int, ...]]]) -> Ints:
    """The index of the span that each id lies in, -1 for none."""
    begins = np.array([begin for begin, _, _ in spans], np.int64)
    ends = np.array([end for _, end, _ in spans] + [-1], np.int64)
    found = np.searchsorted(begins, ids_NK, side="right") - 1
    return np.where(ids_NK < ends[found], found, -1)


def share(count: int, holders: Sequence[Holder], callers: int = 1) -> list[tuple[Holder, int]]:
    """Who takes how many of count rows, so that all who take some end at the same time."""
    width = max(1, len(holders) // callers)
    able = sorted(holders, key=lambda h: (h.start + count / h.speed, h.name))[:width]
    while len(able) > 1:
        counts = _level(count, able)
        least = min(range(len(able)), key=lambda n: (counts[n], -n))
        if counts[least] >= LEAST_ROWS:
            return sorted(zip(able, counts, strict=True), key=lambda taken: taken[0].name)
        del able[least]
    return [(able[0], count)]


def _level(count: int, holders: Sequence[Holder]) -> list[int]:
    """Rows for each, whole numbers that add up to count: like water in vessels of one level."""
    ordered = sorted(holders, key=lambda h: h.start)
    level = speed = volume = 0.0
    for holder in ordered:
        if speed and (count + volume) / speed <= holder.start:
            break
        speed += holder.speed
        volume += holder.speed * holder.start
        level = (count + volume) / speed
    exact = [max(0.0, (level - holder.start) * holder.speed) for holder in holders]
    ends = np.rint(np.cumsum(exact) * (count / (sum(exact) or 1.0))).astype(int)
    ends[-1] = count
    return [int(rows) for rows in np.diff(ends, prepend=0)]


def cut(part: Part, most: int) -> list[Part]:
    """The same as parts of at most so many rows each, none much smaller than another."""
    return [
        Part(part.holder, _some(part.work, rows)) for rows in messages(len(part.work.rows), most)
    ]


def messages(rows: int, most: int) -> list[slice]:
    """Rows as messages of at most so many each, none much smaller than another; at least one."""
    count = max(1, -(-rows // most))
    return [slice(rows * n // count, rows * (n + 1) // count) for n in range(count)]


def most_rows(nbytes: int, rows: int, message_bytes: int) -> int:
    """How many rows a message may have when so many take nbytes."""
    return max(LEAST_ROWS, message_bytes * rows // max(1, nbytes))


def _some(work: Work, chosen: slice) -> Work:
    ids = None if work.ids is None else work.ids[chosen]
    weights = None if work.weights is None else work.weights[chosen]
    return Work(work.rows[chosen], ids, weights)


def _masked(work: Work, mine_NK: NDArray[np.bool_]) -> Work:
    """The rows with a pair that is mine, other pairs' ids -1."""
    assert work.ids is not None and work.weights is not None
    some_N = mine_NK.any(axis=1)
    ids = np.where(mine_NK[some_N], work.ids[some_N], work.ids.dtype.type(-1))
    return Work(work.rows[some_N], ids, work.weights[some_N])


def take_rows(array: Rows, rows: Ints) -> Rows:
    """array[rows], without a copy where the rows lie together."""
    if len(rows) and rows[-1] - rows[0] + 1 == len(rows):
        return array[rows[0] : rows[-1] + 1]
    return np.take(array, rows, axis=0)


def add_up(tokens: int, hidden: int, pieces: Sequence[Piece], dtype: np.dtype[Any]) -> Rows:
    """The sum [T, H] of float32 pieces, added in float32 in the order of their places."""
    ordered = sorted(pieces, key=lambda piece: piece.place)
    out = np.zeros((tokens, hidden), dtype)
    step = max(1, BLOCK_BYTES // max(1, 4 * hidden))
    cuts = np.arange(0, tokens + step, step)
    at = [np.searchsorted(piece.rows, cuts).tolist() for piece in ordered]
    block = np.empty((step, hidden), np.float32) if dtype != np.float32 else None
    for number, begin in enumerate(cuts[:-1]):
        into = out[begin : begin + step]
        total = into if block is None else _zeroed(block[: len(into)])
        for piece, ends in zip(ordered, at, strict=True):
            low, high = ends[number], ends[number + 1]
            if low < high:
                total[piece.rows[low:high] - begin] += piece.output[low:high]
        if block is not None:
            into[...] = total
    return out


def _zeroed(block: Rows) -> Rows:
    block.fill(0)
    return block


def put_together(tokens: int, hidden: int, pieces: Sequence[Piece], dtype: np.dtype[Any]) -> Rows:
    """The rows [T, H] of pieces that have none in common; a whole piece stays the view it is."""
    if len(pieces) == 1 and len(pieces[0].rows) == tokens:
        return pieces[0].output
    out = np.zeros((tokens, hidden), dtype)
    for piece in pieces:
        rows = piece.rows
        if len(rows) and rows[-1] - rows[0] + 1 == len(rows):
            out[rows[0] : rows[-1] + 1] = piece.output
        else:
            out[rows] = piece.output
    return out
