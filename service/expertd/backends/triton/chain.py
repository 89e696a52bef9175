"""Kernels that follow each other closely: one is launched while the one before it still ends.

Cards have this from SM90 on. Every kernel of a call waits for all before it at its very beginning,
so that whatever an earlier one wrote is there, and whatever it reads stays. One that needs nothing
from its neighbour, only from those that its neighbour has waited for, may wait at its end instead:
both run side by side.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@cache
def chained(device: torch.device) -> dict[str, Any]:
    """What a kernel that begins with follow is launched with."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0):
        return {"CHAINED": True, "launch_pdl": True}
    return {"CHAINED": False}


@triton.jit
def wait(CHAINED: tl.constexpr):
    """Waits until the kernels before are done."""
    if CHAINED:
        gdc_wait()


@triton.jit
def release(CHAINED: tl.constexpr):
    """Lets the next kernel take its place on the card, where it has to wait itself."""
    if CHAINED:
        gdc_launch_dependents()


@triton.jit
def follow(CHAINED: tl.constexpr):
    """Waits for those before, and lets the next one come: what a short kernel begins with."""
    wait(CHAINED)
    release(CHAINED)
