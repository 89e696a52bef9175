"""docs/capabilities.md says what the table, the tests and the kept proofs say, and no more."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests import capabilities_page
from tests.capabilities_page import PAGE, page, proven

from expertd.capability.rows import ROWS


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == page(), "run: python -m tests.capabilities_page"


def test_every_cell_has_its_line() -> None:
    lines = [line for line in page().splitlines() if line.startswith("| ")][1:]
    told = [tuple(part.strip() for part in line.split("|")[1:6]) for line in lines]
    cells = [tuple(map(str, row.cell(quant))) for row in ROWS for quant in row.quants]
    assert sorted(told) == sorted(cells)


def test_only_a_report_proves_a_cell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    known = {row.cell(quant) for row in ROWS for quant in row.quants}
    assert proven() and set(proven()) <= known
    assert not any(cell.backend == "flashinfer_trtllm" for cell in proven())
    monkeypatch.setattr(capabilities_page, "PROOFS", tmp_path)
    assert proven() == {} and "H200, 20" not in page().partition("| backend")[2]


def test_a_failed_cell_is_not_proven(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kept = next(iter(sorted(capabilities_page.PROOFS.glob("*.json"))))
    monkeypatch.setattr(capabilities_page, "PROOFS", tmp_path)
    counts = []
    for text in (kept.read_text(), kept.read_text().replace('"proven"', '"failed"', 1)):
        (tmp_path / kept.name).write_text(text)
        counts.append(len(proven()))
    assert counts[1] == counts[0] - 1
