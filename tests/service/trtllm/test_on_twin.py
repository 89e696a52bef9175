"""Every cell of the table against the reference, with the independent twin as the kernels."""

from __future__ import annotations

from dataclasses import replace

import pytest

from expertd.capability.device import simulated
from expertd.capability.row import Row, State
from expertd.capability.rows.flashinfer_trtllm import ROWS
from expertd.core import QuantScheme
from expertd.proof.run import prove

CELLS = [(row, quant) for row in ROWS for quant in row.quants]


@pytest.mark.slow
@pytest.mark.usefixtures("twin")
@pytest.mark.parametrize(
    ("row", "quant"), CELLS, ids=["/".join(row.cell(quant)) for row, quant in CELLS]
)
def test_a_cell_equals_the_reference(row: Row, quant: QuantScheme) -> None:
    device = replace(simulated("sm100"), kind="cpu")
    proof = prove(row, quant, device)
    assert proof.state is State.PROVEN, proof.failures[:3]
    assert len({trial.case for trial in proof.trials}) >= 8
