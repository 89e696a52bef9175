"""Whether what FlashInfer builds and downloads for these kernels is on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import torch

PREBUILD = "run: expertd prebuild (it also takes a local directory of kernels)"


def missing(device: torch.device) -> Iterator[str]:
    """What has to be there before the first call and is not, each with what to do."""
    environment = import_module("flashinfer.jit.env")
    artifacts = import_module("flashinfer.artifacts")
    root = Path(environment.FLASHINFER_CUBIN_DIR) / artifacts.ArtifactPath.TRTLLM_GEN_BMM
    yield from missing_kernels(root)
    name = module_name(torch.cuda.get_device_capability(device))
    built = environment.FLASHINFER_JIT_DIR / name / f"{name}.so"
    if not (Path(environment.get_aot_path(name)).is_file() or built.is_file()):
        yield f"the module {name} is not built; {PREBUILD}"


def module_name(capability: tuple[int, int]) -> str:
    """FlashInfer's name of the compiled launcher for a card."""
    return "fused_moe_trtllm_sm107" if capability == (10, 7) else "fused_moe_trtllm_sm100"


def missing_kernels(root: Path) -> Iterator[str]:
    """Files of the kernels' list that are not under root: a download can end without them."""
    listed = root / "checksums.txt"
    if not listed.is_file():
        yield f"there are no kernels in {root}; {PREBUILD}"
        return
    names = [line.split()[1] for line in listed.read_text().splitlines() if line.strip()]
    absent = [name for name in names if not (root / name).is_file()]
    if absent:
        yield f"{len(absent)} of {len(names)} kernels are missing in {root}; {PREBUILD}"
