"""Whether what FlashInfer builds and downloads for these kernels is on this machine."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from expertd.backends.flashinfer import kernels, modules


def missing(device: torch.device) -> Iterator[str]:
    """What has to be there before the first call and is not, each with what to do."""
    yield from kernels.missing()
    if absent := modules.missing(module_name(torch.cuda.get_device_capability(device))):
        yield absent


def module_name(capability: tuple[int, int]) -> str:
    """FlashInfer's name of the compiled launcher for a card."""
    return "fused_moe_trtllm_sm107" if capability == (10, 7) else "fused_moe_trtllm_sm100"
