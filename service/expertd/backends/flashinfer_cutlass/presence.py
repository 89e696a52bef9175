"""Whether the compiled module of a card is on this machine: building it takes up to hours."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import torch

from expertd.backends.flashinfer import modules
from expertd.capability.row import Row

NO_NVCC = (
    "its kernels are compiled by nvcc when they first run: install the CUDA toolkit and set "
    "CUDA_HOME, or set TRTLLM_DG_ENABLED=0 for a slower one that is built in"
)


def missing(device: torch.device, row: Row) -> Iterator[str]:
    """What has to be there before the first call, with what to do."""
    if absent := modules.missing(modules.cutlass(modules.arch_of(device))):
        yield absent
    if row.activation_quant == "fp8_group128" and not _compiles():
        yield NO_NVCC


def _compiles() -> bool:
    """Whether DeepGEMM, inside the module, finds the compiler of its kernels or goes without."""
    if os.environ.get("TRTLLM_DG_ENABLED") == "0":
        return True
    own = os.environ.get("TRTLLM_DG_NVCC_COMPILER")
    toolkit = os.environ.get("CUDA_HOME")
    named = own or (f"{toolkit}/bin/nvcc" if toolkit else "nvcc")
    return shutil.which(named) is not None
