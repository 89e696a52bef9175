"""A picture of a bench: latency over throughput, a line for each size of call, as SVG."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from typing import NamedTuple

from expertd.bench.summary import Summary

WIDTH, HEIGHT, MARGIN, LEGEND = 760, 440, 64, 150
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#7f7f7f")
DASHES = {"p50": "", "p99": ' stroke-dasharray="5 4"'}


class Axis(NamedTuple):
    """A logarithmic axis between two powers of ten, and the pixels of its ends."""

    low: int
    high: int
    begin: float
    end: float

    def at(self, value: float) -> float:
        share = (math.log10(value) - self.low) / (self.high - self.low)
        return self.begin + share * (self.end - self.begin)

    def ticks(self) -> range:
        return range(self.low, self.high + 1)


def plot(title: str, summaries: Sequence[Summary]) -> str:
    """SVG text; cells that answered no call are left out."""
    shown = [summary for summary in summaries if summary.calls]
    x = _axis([s.calls_per_s for s in shown], MARGIN, WIDTH - LEGEND)
    y = _axis([s.latency_ms[p] for s in shown for p in DASHES], HEIGHT - MARGIN, MARGIN)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{MARGIN}" y="28" font-size="15">{escape(title)}</text>',
        *_grid(x, y),
        *_lines(shown, x, y),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _axis(values: Sequence[float], begin: float, end: float) -> Axis:
    low = math.floor(math.log10(min(values, default=1.0)))
    high = math.ceil(math.log10(max(values, default=10.0)))
    return Axis(low, max(high, low + 1), begin, end)


def _grid(x: Axis, y: Axis) -> Iterator[str]:
    for power in x.ticks():
        at = x.at(10.0**power)
        yield f'<path d="M{at:.1f} {y.begin}V{y.end}" stroke="#ddd"/>'
        yield f'<text x="{at:.1f}" y="{y.begin + 18}" text-anchor="middle">{10.0**power:g}</text>'
    for power in y.ticks():
        at = y.at(10.0**power)
        yield f'<path d="M{x.begin} {at:.1f}H{x.end}" stroke="#ddd"/>'
        yield f'<text x="{x.begin - 6}" y="{at + 4:.1f}" text-anchor="end">{10.0**power:g}</text>'
    middle = (x.begin + x.end) / 2
    yield f'<text x="{middle}" y="{HEIGHT - 18}" text-anchor="middle">calls a second</text>'
    yield (
        f'<text transform="translate(18 {(y.begin + y.end) / 2}) rotate(-90)" '
        'text-anchor="middle">latency, ms (solid p50, dashed p99)</text>'
    )


def _lines(summaries: Sequence[Summary], x: Axis, y: Axis) -> Iterator[str]:
    sizes = sorted({summary.tokens for summary in summaries})
    for row, tokens in enumerate(sizes):
        colour = COLOURS[row % len(COLOURS)]
        cells = [summary for summary in summaries if summary.tokens == tokens]
        for name, dash in DASHES.items():
            spots = [(x.at(s.calls_per_s), y.at(s.latency_ms[name])) for s in cells]
            line = " ".join(f"{left:.1f},{top:.1f}" for left, top in spots)
            yield f'<polyline points="{line}" fill="none" stroke="{colour}"{dash}/>'
            yield from (
                f'<circle cx="{left:.1f}" cy="{top:.1f}" r="3" fill="{colour}">'
                f"<title>{_told(cell, name)}</title></circle>"
                for (left, top), cell in zip(spots, cells, strict=True)
            )
        top = MARGIN + 18 * row
        label = f"{tokens} token{'s' if tokens > 1 else ''}"
        yield f'<text x="{WIDTH - LEGEND + 16}" y="{top}" fill="{colour}">{label} a call</text>'


def _told(cell: Summary, name: str) -> str:
    """What a browser shows of a dot that is pointed at."""
    rate = f", {cell.rate:g} due a second" if cell.rate else ""
    callers = f"{cell.concurrency} caller{'s' if cell.concurrency > 1 else ''}{rate}"
    return f"{callers}: {cell.calls_per_s:.4g} calls/s, {name} {cell.latency_ms[name]:.3g} ms"
