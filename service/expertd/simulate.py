"""A device that is not here: the twin of a source checkout stands in for FlashInfer's kernels.

For demos and tests only: it computes on the CPU, slowly, what the contract says the kernels do.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path

from expertd.backends.flashinfer.library import stand_in
from expertd.capability.device import DeviceInfo, simulated
from expertd.errors import InvalidArgument

CHECKOUT = Path(__file__).parents[2]


def simulate(arch: str) -> DeviceInfo:
    """Puts the twin in FlashInfer's place; raises InvalidArgument outside a source checkout."""
    if not (CHECKOUT / "tests" / "twins").is_dir():
        raise InvalidArgument(f"--simulate {arch}: the twin is in a source checkout only")
    if str(CHECKOUT) not in sys.path:
        sys.path.insert(0, str(CHECKOUT))
    stand_in(importlib.import_module("tests.twins.trtllm").library())
    return replace(simulated(arch), kind="cpu", name=f"simulated {arch}", simulated=False)
