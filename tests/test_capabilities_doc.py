"""docs/capabilities.md has a line for every cell, and none for a cell that is gone."""

from __future__ import annotations

from pathlib import Path

from expertd.capability.rows import ROWS

PAGE = Path(__file__).parents[1] / "docs" / "capabilities.md"


def test_every_cell_has_its_line() -> None:
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")][1:]
    told = [tuple(part.strip() for part in line.split("|")[1:6]) for line in lines]
    cells = [tuple(map(str, row.cell(quant))) for row in ROWS for quant in row.quants]
    assert sorted(told) == sorted(cells)
