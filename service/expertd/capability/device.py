"""Which device a plan is for: one that is here, or one that somebody asks about."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from importlib import metadata
from typing import Literal

from expertd.errors import InvalidArgument

ARCHS = ("cpu", "sm80", "sm86", "sm89", "sm90", "sm100", "sm103", "sm107", "sm120", "sm121")
"""Every architecture that can be asked about; a card that is here may have another one."""


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """A device as the rows see it; flashinfer is the version that would be called on it."""

    kind: Literal["cpu", "cuda"]
    arch: str
    name: str
    index: int | None = None
    flashinfer: str | None = None
    simulated: bool = False


@cache
def installed_flashinfer() -> str | None:
    """The installed FlashInfer's version, from its metadata: nothing is imported."""
    try:
        return metadata.version("flashinfer-python")
    except metadata.PackageNotFoundError:
        return None


def simulated(arch: str, flashinfer: str | None = None) -> DeviceInfo:
    """A device that need not be here; raises InvalidArgument for an unknown architecture."""
    if arch not in ARCHS:
        raise InvalidArgument(f"device {arch!r:.40} is not one of auto, {', '.join(ARCHS)}")
    kind: Literal["cpu", "cuda"] = "cpu" if arch == "cpu" else "cuda"
    version = flashinfer or installed_flashinfer()
    return DeviceInfo(kind, arch, f"any {arch}", None, version, simulated=arch != "cpu")


def detect(device: str) -> DeviceInfo:
    """The device named cpu, cuda, cuda:N or auto (a GPU if there is one); cpu imports no torch."""
    if device == "cpu":
        return DeviceInfo("cpu", "cpu", "cpu", None, installed_flashinfer())
    if device == "auto":
        return _cuda(0) if _cuda_count() else detect("cpu")
    head, _, tail = device.partition(":")
    if head != "cuda" or not (tail or "0").isdecimal():
        raise InvalidArgument(f"device {device!r:.40} is not one of auto, cpu, cuda, cuda:N")
    index, count = int(tail or "0"), _cuda_count()
    if index >= count:
        raise InvalidArgument(f"device {device!r} does not exist: {count} CUDA device(s) are here")
    return _cuda(index)


def device_named(name: str, flashinfer: str | None = None) -> DeviceInfo:
    """A device that is here (auto, cpu, cuda:N) or any architecture, with that FlashInfer."""
    if name in ARCHS and name != "cpu":
        return simulated(name, flashinfer)
    try:
        found = detect(name)
    except InvalidArgument as error:
        raise InvalidArgument(f"{error}; without a card: {', '.join(ARCHS[1:])}") from None
    return replace(found, flashinfer=flashinfer) if flashinfer else found


def _cuda_count() -> int:
    try:
        import torch
    except ImportError:  # a base install, which can still be asked about cards
        return 0
    return torch.cuda.device_count()


def _cuda(index: int) -> DeviceInfo:
    import torch

    major, minor = torch.cuda.get_device_capability(index)
    name = torch.cuda.get_device_name(index)
    return DeviceInfo("cuda", f"sm{major}{minor}", name, index, installed_flashinfer())
