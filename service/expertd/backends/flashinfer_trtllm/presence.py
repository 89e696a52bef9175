"""Whether what FlashInfer builds and downloads for these kernels is on this machine."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from expertd.backends.flashinfer import kernels, modules


def missing(device: torch.device) -> Iterator[str]:
    """What has to be there before the first call and is not, each with what to do."""
    absent = tuple(kernels.missing())
    yield from absent
    name = modules.TRTLLM[modules.arch_of(device)]
    # Looking closely at the launcher would fetch its headers, so that waits for the kernels.
    if text := modules.unbuilt(name) if absent else modules.missing(name):
        yield text
