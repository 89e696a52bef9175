"""Whether what FlashInfer builds and downloads for these kernels is on this machine."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from expertd.backends.flashinfer import kernels, modules


def missing(device: torch.device) -> Iterator[str]:
    """What has to be there before the first call and is not, each with what to do."""
    yield from kernels.missing()
    if absent := modules.missing(modules.TRTLLM[modules.arch_of(device)]):
        yield absent
