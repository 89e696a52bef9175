"""The table: one file a backend, pure data; the order is the order of preference."""

from __future__ import annotations

from expertd.capability.row import Row
from expertd.capability.rows import (
    flashinfer_cutlass,
    flashinfer_trtllm,
    grouped,
    grouped_mm,
    identity,
    reference,
    triton,
)

ROWS: tuple[Row, ...] = (
    *flashinfer_trtllm.ROWS,
    *flashinfer_cutlass.ROWS,
    *triton.ROWS,
    *grouped_mm.ROWS,
    *grouped.ROWS,
    *identity.ROWS,
    *reference.ROWS,
)

BACKENDS: tuple[str, ...] = tuple(dict.fromkeys(row.backend for row in ROWS))
"""Every backend's name, for a pin and for the message about an unknown one."""
