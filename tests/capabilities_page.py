"""docs/capabilities.md, made from the table, from what tests cover, and from cards' own proofs.

After a change, or with a new report of `expertd verify --json` in
docs/proofs/DATE-CARD-BACKEND.json:
python -m tests.capabilities_page
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.service.cutlass.test_backend import AS_IT_IS
from tests.service.trtllm.test_on_twin import CELLS
from tests.service.trtllm.test_weights import BYTE_EQUAL

from expertd.capability.row import Cell, Row
from expertd.capability.rows import ROWS
from expertd.core import QuantScheme

DOCS = Path(__file__).parents[1] / "docs"
PAGE, PROOFS = DOCS / "capabilities.md", DOCS / "proofs"
HEAD = """\
# What stands behind each kernel cell

A cell is an entry in one mode, for one format of rows and one of weights. The columns are evidence, strongest last:

- **bound**: its keywords bind to the real signature of the installed FlashInfer and of every recorded version from its `since` on (`tests/service/capability/test_drift.py`, `tests/service/trtllm/test_calls.py`, `tests/service/cutlass`).
- **layout**: native weights are byte-equal to FlashInfer's own preparation (`tests/service/trtllm/test_weights.py`; scale swizzles on an H200, 2026-11-21), or made by it on the card. Rows that use the canonical tensors as they are have no layout of their own.
- **twin**: an independent emulation of the kernels' contract agrees with the fp32 reference on every case of `expertd verify` (`tests/service/trtllm/test_on_twin.py`); it catches twelve faults planted in the backend (`tests/service/trtllm/test_faults.py`).
- **proven on**: `expertd verify` passed on that card; its report is in `docs/proofs/`. Nothing else is served unless the operator says `--trust declared`.

No Blackwell card was to be had: no `flashinfer_trtllm` cell has run on one. On your card, `expertd verify` says.

This page is made by `python -m tests.capabilities_page`.

"""  # noqa: E501
COLUMNS = ("backend", "entry", "mode", "rows", "weights", "bound", "layout", "twin", "proven on")
ON_CPU = {
    "reference": "CPU, every `make test-all`",
    "grouped": "CPU, every `make test-all`",
    "identity": "copies rows, nothing to prove",
}


def page() -> str:
    """The whole page."""
    proofs = proven()
    lines = [_line(COLUMNS), "|" + "---|" * len(COLUMNS)]
    for row in ROWS:
        for quant in row.quants:
            cell = row.cell(quant)
            cards = ON_CPU.get(row.backend) or "; ".join(proofs.get(cell, []))
            lines.append(
                _line((*map(str, cell), bound(row), layout(row, quant), twin(row, quant), cards))
            )
    return HEAD + "\n".join(lines) + "\n"


def bound(row: Row) -> str:
    return "yes" if row.call is not None else ""


def layout(row: Row, quant: QuantScheme) -> str:
    """How the cell's native weights are known to be right."""
    if row.backend == "flashinfer_trtllm":
        return "yes" if quant in BYTE_EQUAL else ""
    if row.backend == "flashinfer_cutlass":
        return "as it is" if quant in AS_IT_IS else "FlashInfer's own"
    return "as it is" if row.backend in ("reference", "grouped") else ""


def twin(row: Row, quant: QuantScheme) -> str:
    return "yes" if (row, quant) in CELLS else ""


def proven() -> dict[Cell, list[str]]:
    """Cards and dates by cell, from the reports that were kept."""
    found: dict[Cell, list[str]] = {}
    for path in sorted(PROOFS.glob("*.json")):
        report: dict[str, Any] = json.loads(path.read_text())
        card = f"{report['device'].removeprefix('NVIDIA ')}, {path.name[:10]}"
        for cell in report["cells"]:
            if cell["state"] == "proven":
                found.setdefault(Cell(*(cell[name] for name in Cell._fields)), []).append(card)
    return found


def _line(parts: tuple[str, ...]) -> str:
    return f"| {' | '.join(parts)} |"


if __name__ == "__main__":
    PAGE.write_text(page())
