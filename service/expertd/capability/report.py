"""The whole table on one device: every cell with its state and why it is so."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from expertd.capability.device import DeviceInfo
from expertd.capability.drift import drift
from expertd.capability.match import device_refusals
from expertd.capability.plan import States, state_of
from expertd.capability.row import Cell, Row, State
from expertd.capability.rows import ROWS


@dataclass(frozen=True, slots=True)
class CellReport:
    """A cell, what is known of it on this device, and why."""

    cell: Cell
    state: State
    why: str


def cell_reports(
    device: DeviceInfo, rows: tuple[Row, ...] = ROWS, states: States | None = None
) -> Iterator[CellReport]:
    """Every cell of the table; one that cannot run on the device stays declared."""
    for row in rows:
        why = "; ".join(refusal.text for refusal in device_refusals(row, device))
        state = State.DECLARED if why else state_of(row, device)
        for quant in row.quants:
            cell = row.cell(quant)
            yield CellReport(cell, (states or {}).get(cell, state), why)


def capabilities(device: DeviceInfo, states: States | None = None) -> dict[str, Any]:
    """The answer of `expertd capabilities` and of GET /v1/capabilities, as JSON."""
    return {
        "device": device.arch,
        "flashinfer": device.flashinfer,
        "cells": [_cell(report) for report in cell_reports(device, states=states)],
        "drift": [entry.text for entry in drift(device.flashinfer)],
    }


def _cell(report: CellReport) -> dict[str, str]:
    return {**report.cell._asdict(), "state": report.state, "why": report.why}
