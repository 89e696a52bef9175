"""Whether the compiled module of a card is on this machine: building it takes up to hours."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import torch

from expertd.backends.flashinfer import modules
from expertd.capability.row import Row

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

NO_NVCC = (
    "its kernels are compiled by nvcc when they first run: install the CUDA toolkit and set "
    "CUDA_HOME, or set TRTLLM_DG_ENABLED=0 for a slower one that is built in"
)


def missing(device: torch.device, row: Row) -> Iterator[str]:
    """What has to be there before the first call, with what to do."""
    name = module_name(
        torch.cuda.get_device_capability(device),
        torch.cuda.get_device_properties(device).multi_processor_count,
        modules.may_build(),
    )
    if absent := modules.missing(name):
        yield absent
    if row.activation_quant == "fp8_group128" and not _compiles():
        yield NO_NVCC


def module_name(capability: tuple[int, int], multiprocessors: int, may_build: bool) -> str:
    """The module for a card; FlashInfer has one of its own for the H20, unless it may not build."""
    if capability == (9, 0) and multiprocessors == H20_MULTIPROCESSORS and may_build:
        return H20_MODULE
    return MODULES[capability]


def _compiles() -> bool:
    """Whether DeepGEMM, inside the module, finds the compiler of its kernels or goes without."""
    if os.environ.get("TRTLLM_DG_ENABLED") == "0":
        return True
    own = os.environ.get("TRTLLM_DG_NVCC_COMPILER")
    toolkit = os.environ.get("CUDA_HOME")
    named = own or (f"{toolkit}/bin/nvcc" if toolkit else "nvcc")
    return shutil.which(named) is not None
