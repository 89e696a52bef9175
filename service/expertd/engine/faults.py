"""What an exception of a launch means: for its calls, and for the process."""

from __future__ import annotations

import re

import torch

from expertd.errors import ExpertdError, Internal, Overloaded

RETRY_SECONDS = 1.0
_NO_MEMORY = re.compile(r"(?i)out of memory|not enough memory|CUBLAS_STATUS_ALLOC_FAILED")
_LOST = re.compile(
    r"CUDA( driver)? error|cudaError|CUDA_ERROR|CUBLAS_STATUS_|illegal memory access"
    r"|device-side assert|unspecified launch failure"
)


class DeviceLost(Exception):
    """The device's errors stay: whatever it answers from now on may be wrong."""


def meaning(error: Exception) -> ExpertdError:
    """What the calls of a failed launch are told; raises DeviceLost if nothing may follow it.

    An error of the device that says nothing of memory counts as one that stays: a process too many
    restarted costs less than one wrong answer.
    """
    if isinstance(error, ExpertdError):
        return error
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or _NO_MEMORY.search(str(error)):
        return Overloaded(
            "the device has no memory left for this batch; send fewer rows, or retry later or "
            "elsewhere (fewer rows in a launch: --max-batch-tokens)",
            retry_seconds=RETRY_SECONDS,
        )
    if isinstance(error, torch.AcceleratorError) or _LOST.search(str(error)):
        raise DeviceLost(f"{type(error).__name__}: {str(error)[:500]}") from error
    return Internal("the kernel failed; the server's log says why")
