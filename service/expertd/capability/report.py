"""The whole table on one device: every cell with its state and why it is so."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from expertd.capability.device import DeviceInfo
from expertd.capability.row import Cell, Row, State
from expertd.capability.rows import ROWS


@dataclass(frozen=True, slots=True)
class CellReport:
    """A cell, what is known of it on this device, and why."""

    cell: Cell
    state: State
    why: str


def cell_reports(device: DeviceInfo, rows: tuple[Row, ...] = ROWS) -> Iterator[CellReport]:
    """Every cell of the table; a row without a build for the device stays declared."""
    for row in rows:
        here = not row.archs or device.arch in row.archs
        state = State.PRESENT if here else State.DECLARED
        why = "" if here else f"{row.entry} has no build for {device.arch}"
        for quant in row.quants:
            yield CellReport(row.cell(quant), state, why)
