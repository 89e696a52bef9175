"""Whether the compiled module of a card is on this machine: building it takes up to hours."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import torch

MODULES = {
    (8, 9): "fused_moe_89",
    (9, 0): "fused_moe_90",
    (10, 0): "fused_moe_100",
    (10, 3): "fused_moe_103",
    (10, 7): "fused_moe_100",
    (12, 0): "fused_moe_120",
    (12, 1): "fused_moe_120",
}
"""FlashInfer's name of the module that it loads on a card of that capability."""

H20_MULTIPROCESSORS = 78
H20_MODULE = "fused_moe_90_h20_prebuilt_d"


def missing(device: torch.device) -> Iterator[str]:
    """What has to be built before the first call, with what to do."""
    if device.type != "cuda":
        yield "it runs on an NVIDIA card only: start with --device cuda:0"
        return
    may_build = not os.environ.get("FLASHINFER_DISABLE_JIT")
    name = module_name(
        torch.cuda.get_device_capability(device),
        torch.cuda.get_device_properties(device).multi_processor_count,
        may_build,
    )
    environment = import_module("flashinfer.jit.env")
    if not any(path.is_file() for path in _places(environment, name, may_build)):
        yield f"FlashInfer's module {name} is not built here; run: expertd prebuild"


def module_name(capability: tuple[int, int], multiprocessors: int, may_build: bool) -> str:
    """The module for a card; FlashInfer has one of its own for the H20, unless it may not build."""
    if capability == (9, 0) and multiprocessors == H20_MULTIPROCESSORS and may_build:
        return H20_MODULE
    return MODULES[capability]


def _places(environment: object, name: str, may_build: bool) -> Iterator[Path]:
    """Where FlashInfer finds a module; its own builds only while it may build."""
    yield Path(environment.get_aot_path(name))  # type: ignore[attr-defined]
    if may_build:
        yield Path(environment.FLASHINFER_JIT_DIR) / name / f"{name}.so"  # type: ignore[attr-defined]
