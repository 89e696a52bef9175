"""What splitting a call and adding its answers up costs: python -m tests.bench.sharding

4096 bfloat16 rows of 7168 over eight ranges of 256 experts, top-8, against the traffic that nobody
can avoid: gathering the rows that are sent, and one float32 pass over the partial sums. All four
steps take turns in the same run; each one's best counts, as timeit advises. The goal is 1.5.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from expertd_client.sharding import Holder, Piece, Split, Work, add_up, split_experts, take_rows

TOKENS, HIDDEN, EXPERTS, TOP_K, RANGES, ROUNDS = 4096, 7168, 256, 8, 8, 15
STEPS = ("split", "merge", "gather", "accumulate")


@dataclass
class Bench:
    """One call's rows and routing, and its steps."""

    rows: NDArray[Any]
    work: Work
    holders: list[Holder]

    def split(self) -> Split:
        found = split_experts(self.work, self.holders)
        for part in found.parts:
            take_rows(self.rows, part.work.rows)
        return found

    @cached_property
    def pieces(self) -> list[Piece]:
        return [
            Piece(p.holder, p.work.rows, np.ones((len(p.work.rows), HIDDEN), np.float32))
            for p in self.split().parts
        ]

    def merge(self) -> None:
        add_up(TOKENS, HIDDEN, self.pieces, np.dtype(np.float32))

    def gather(self) -> None:
        for piece in self.pieces:
            np.take(self.rows, piece.rows, axis=0)

    def accumulate(self) -> None:
        total = np.zeros((TOKENS, HIDDEN), np.float32)
        for piece in self.pieces:
            some = total[: len(piece.rows)]
            np.add(some, piece.output, out=some)

    def seconds(self, step: str) -> float:
        begin = time.perf_counter()
        getattr(self, step)()
        return time.perf_counter() - begin


def drawn() -> Bench:
    """Random rows and ids, every expert as likely."""
    random = np.random.default_rng(0)
    rows = random.standard_normal((TOKENS, HIDDEN), np.float32).astype(ml_dtypes.bfloat16)
    ids = np.argsort(random.random((TOKENS, EXPERTS)), axis=1)[:, :TOP_K].astype(np.int32)
    weights = random.random((TOKENS, TOP_K), np.float32)
    size = EXPERTS // RANGES
    holders = [Holder(f"r{n}", n * size, (n + 1) * size) for n in range(RANGES)]
    return Bench(rows, Work(np.arange(TOKENS), ids, weights), holders)


def main() -> None:
    bench = drawn()
    sent = sum(len(piece.rows) for piece in bench.pieces)
    rounds = [[bench.seconds(step) for step in STEPS] for _ in range(ROUNDS)]
    split, merge, gather, accumulate = (min(times) for times in zip(*rounds[1:], strict=True))
    for step, best in zip(STEPS, (split, merge, gather, accumulate), strict=True):
        print(f"{step:12} {best * 1e3:8.1f} ms")
    ratio = (split + merge) / (gather + accumulate)
    print(f"split + merge / unavoidable traffic: {ratio:.2f} (goal 1.5)")
    print(f"rows sent / rows: {sent / TOKENS:.2f}")


if __name__ == "__main__":
    main()
