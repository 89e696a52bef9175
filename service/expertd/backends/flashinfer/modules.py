"""Whether FlashInfer's compiled modules are on this machine: building one takes up to hours."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

TUNER = "trtllm_utils"
"""The module whose kernel the tuner waits with before it times a tactic."""

CUTLASS = {
    "89": "fused_moe_89",
    "90": "fused_moe_90",
    "100": "fused_moe_100",
    "103": "fused_moe_103",
    "107": "fused_moe_100",
    "120": "fused_moe_120",
    "121": "fused_moe_120",
}
"""FlashInfer's name of the CUTLASS kernels that it loads on a card of that architecture."""

TRTLLM = {
    "100": "fused_moe_trtllm_sm100",
    "103": "fused_moe_trtllm_sm100",
    "107": "fused_moe_trtllm_sm107",
}
"""And of the launcher of the TRT-LLM kernels."""

H20 = "fused_moe_90_h20_prebuilt_d"
H20_MULTIPROCESSORS = 78

PREBUILD = "run: expertd prebuild"


def arch_of(device: torch.device) -> str:
    """A card's architecture as the tables have it."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}{minor}"


def cutlass(arch: str) -> str:
    """The CUTLASS module for cards of an architecture on this machine.

    FlashInfer has one of its own for the H20, unless it may not build, and looks at the current
    card whatever card it is for.
    """
    if arch == "90" and may_build() and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        if properties.multi_processor_count == H20_MULTIPROCESSORS:
            return H20
    return CUTLASS[arch]


def missing(name: str) -> str:
    """Why a module cannot be loaded without a build, and what to do; empty if it can."""
    if Path(_environment().get_aot_path(name)).is_file():
        return ""
    if not any(path.is_file() for path in _own_builds(name)):
        return f"FlashInfer's module {name} is not built here; {PREBUILD}"
    if shutil.which("ninja") is None:
        # FlashInfer lets ninja compare dates before it loads what it built itself.
        return f"FlashInfer's module {name} is loaded through ninja: pip install ninja"
    return ""


def may_build() -> bool:
    """FlashInfer looks whether the variable is there, not what it says."""
    return not os.environ.get("FLASHINFER_DISABLE_JIT")


def _own_builds(name: str) -> Iterator[Path]:
    """Where FlashInfer's own builds lie; it ignores them where it may not build."""
    if may_build():
        yield Path(_environment().FLASHINFER_JIT_DIR) / name / f"{name}.so"


def _environment() -> Any:
    return import_module("flashinfer.jit.env")
