"""Everything that can change what a kernel computes here: proofs and timings hold for it alone."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from functools import cache
from importlib import metadata, util
from pathlib import Path

import expertd
from expertd.capability.device import DeviceInfo

DRIVER = Path("/proc/driver/nvidia/version")
PACKAGES = ("torch", "triton", "flashinfer-jit-cache", "flashinfer-cubin")
ROOMS = ("core", "routing", "weights", "capability", "backends", "proof")
"""Whose code decides what a kernel computes, and whether that is right."""
MODULES = "fused_moe*/*.so"


def fingerprint(device: DeviceInfo) -> str:
    """A name for the device, its driver and all the code that runs there."""
    facts = {
        "device": device.name,
        "arch": device.arch,
        "simulated": device.simulated,
        "driver": DRIVER.read_text() if DRIVER.exists() else "",
        "packages": {name: _version(name) for name in PACKAGES},
        "flashinfer": device.flashinfer,
        "modules": [_told(path) for path in _modules(device.flashinfer)],
        "expertd": [expertd.__version__, _sources(Path(expertd.__file__).parent)],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


@cache
def _sources(package: Path) -> str:
    """A checkout changes without a new version."""
    digest = hashlib.sha256()
    for room in ROOMS:
        for path in sorted((package / room).rglob("*")):
            # Editors leave links there that lead nowhere.
            if path.suffix in (".py", ".json") and path.is_file():
                digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def _modules(flashinfer: str | None) -> Iterator[Path]:
    """FlashInfer's compiled MoE kernels: those it brought, and those built on this machine."""
    if flashinfer is None:
        return
    spec = util.find_spec("flashinfer")
    for place in (spec.submodule_search_locations if spec else None) or ():
        yield from sorted(Path(place, "data", "aot").glob(MODULES))
    home = Path(os.environ.get("FLASHINFER_WORKSPACE_BASE") or Path.home())
    built = home / ".cache" / "flashinfer" / flashinfer
    yield from sorted(built.glob(f"*/cached_ops/{MODULES}"))


def _told(path: Path) -> tuple[str, int, int]:
    """A module is hundreds of megabytes: its size and time tell that it was built anew."""
    found = path.stat()
    return str(path), found.st_size, found.st_mtime_ns
