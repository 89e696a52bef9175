"""The ready-made kernels of the TRT-LLM entries: files that FlashInfer publishes apart.

A file checksums.txt lists them, each with its SHA-256; the list's own is in FlashInfer's code. The
launcher asks for a kernel by name at the first call that needs it, and FlashInfer would download
it there and then.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

PREBUILD = "run: expertd prebuild, or with a copy of them: expertd prebuild --kernels DIR"

LIST = "checksums.txt"


class Kernel(NamedTuple):
    """A published file: its path below the cubin directory, and what it must hash to."""

    path: str
    sha256: str


def listed() -> Kernel:
    """The list of all kernels, as the installed FlashInfer pins it."""
    artifacts = import_module("flashinfer.artifacts")
    folder = str(artifacts.ArtifactPath.TRTLLM_GEN_BMM).rstrip("/")
    return Kernel(f"{folder}/{LIST}", artifacts.CheckSumHash.TRTLLM_GEN_BMM)


def root() -> Path:
    """Where FlashInfer looks for kernels: FLASHINFER_CUBIN_DIR, its wheel, or its cache."""
    return Path(import_module("flashinfer.jit.env").FLASHINFER_CUBIN_DIR)


def missing() -> Iterator[str]:
    """What is absent or damaged, with what to do; a download can end without some files."""
    folder = Path(listed().path).parent
    if not intact(listed()):
        yield f"there is no list of kernels in {root() / folder}; {PREBUILD}"
        return
    kernels = every()
    absent = [kernel for kernel in kernels if not intact(kernel)]
    if absent:
        yield (
            f"{len(absent)} of {len(kernels)} kernels are missing or damaged in {root() / folder}, "
            f"first {Path(absent[0].path).name}; {PREBUILD}"
        )


def every() -> tuple[Kernel, ...]:
    """All that the list names; it has to be there."""
    path = root() / listed().path
    lines = (line.split(maxsplit=1) for line in path.read_text().splitlines() if line.strip())
    below = Path(listed().path).parent
    return tuple(Kernel(f"{below}/{name.strip()}", sha256) for sha256, name in lines)


def intact(kernel: Kernel) -> bool:
    """Whether the file is there with the right content."""
    path = root() / kernel.path
    if not path.is_file():
        return False
    status = path.stat()
    return _sha256(path, status.st_size, status.st_mtime_ns) == kernel.sha256


@cache
def _sha256(path: Path, size: int, changed_ns: int) -> str:
    """Of a file's content; read again only after a change, all kernels being a gigabyte."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
