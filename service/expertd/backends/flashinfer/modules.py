"""Whether FlashInfer's compiled modules are on this machine: building one takes up to hours."""

from __future__ import annotations

import os
import shutil
import subprocess
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch

TUNER = "trtllm_utils"
"""The module whose kernel the tuner waits with before it times a tactic."""

CUTLASS = {
    "89": "fused_moe_89",
    "90": "fused_moe_90",
    "100": "fused_moe_100",
    "103": "fused_moe_103",
    "107": "fused_moe_100",
    "120": "fused_moe_120",
    "121": "fused_moe_120",
}
"""FlashInfer's name of the CUTLASS kernels that it loads on a card of that architecture."""

TRTLLM = {
    "100": "fused_moe_trtllm_sm100",
    "103": "fused_moe_trtllm_sm100",
    "107": "fused_moe_trtllm_sm107",
}
"""And of the launcher of the TRT-LLM kernels."""

H20 = "fused_moe_90_h20_prebuilt_d"
H20_MULTIPROCESSORS = 78


class Generator(NamedTuple):
    """FlashInfer's function that says how a module is built."""

    function: str
    options: tuple[tuple[str, bool], ...] = ()


_JIT = "flashinfer.jit.fused_moe"
_TRTLLM = f"{_JIT}:gen_trtllm_gen_fused_moe_sm100_module"

GENERATORS = {
    TUNER: Generator("flashinfer.jit.tllm_utils:gen_trtllm_utils_module"),
    "fused_moe_89": Generator(f"{_JIT}:gen_cutlass_fused_moe_sm89_module"),
    "fused_moe_90": Generator(f"{_JIT}:gen_cutlass_fused_moe_sm90_module"),
    H20: Generator(f"{_JIT}:gen_cutlass_fused_moe_sm90_module"),
    "fused_moe_100": Generator(f"{_JIT}:gen_cutlass_fused_moe_sm100_module"),
    "fused_moe_103": Generator(f"{_JIT}:gen_cutlass_fused_moe_sm103_module"),
    "fused_moe_120": Generator(f"{_JIT}:gen_cutlass_fused_moe_sm120_module"),
    "fused_moe_trtllm_sm100": Generator(_TRTLLM, (("enable_rubin", False),)),
    "fused_moe_trtllm_sm107": Generator(_TRTLLM, (("enable_rubin", True),)),
}
"""By the module's name."""

PREBUILD = "run: expertd prebuild"
NOTHING_TO_DO = "ninja: no work to do"


def arch_of(device: torch.device) -> str:
    """A card's architecture as the tables have it."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}{minor}"


def cutlass(arch: str) -> str:
    """The CUTLASS module for cards of an architecture on this machine.

    FlashInfer has one of its own for the H20, unless it may not build, and looks at the current
    card whatever card it is for.
    """
    if arch == "90" and may_build() and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        if properties.multi_processor_count == H20_MULTIPROCESSORS:
            return H20
    return CUTLASS[arch]


def missing(name: str) -> str:
    """Why a module cannot be loaded without a build, and what to do; empty if it can."""
    return unbuilt(name) or _stale(name)


def unbuilt(name: str) -> str:
    """The same as far as files tell: nothing that FlashInfer could load is there."""
    if _ready_made(name) or (may_build() and _own_build(name).is_file()):
        return ""
    return f"FlashInfer's module {name} is not built here; {PREBUILD}"


def _stale(name: str) -> str:
    """FlashInfer lets ninja look at what it built itself, and ninja may find it out of date."""
    if _ready_made(name):
        return ""
    if shutil.which("ninja") is None:
        return f"FlashInfer's module {name} is loaded through ninja: pip install ninja"
    try:
        current = _up_to_date(name, _own_build(name).stat().st_mtime_ns)
    except (OSError, RuntimeError) as error:
        return f"FlashInfer cannot load its module {name}: {error}"
    return "" if current else f"FlashInfer would build its module {name} anew; {PREBUILD}"


@cache
def _up_to_date(name: str, built_ns: int) -> bool:
    """Whether ninja would build nothing, for the settings of this process."""
    spec = spec_of(name)
    spec.write_ninja()
    command = ["ninja", "-n", "-C", str(spec.build_dir), "-f", str(spec.ninja_path)]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    return NOTHING_TO_DO in said.stdout


def spec_of(name: str) -> Any:
    """How FlashInfer builds a module."""
    where, _, function = GENERATORS[name].function.partition(":")
    return getattr(import_module(where), function)(**dict(GENERATORS[name].options))


def may_build() -> bool:
    """FlashInfer looks whether the variable is there, not what it says."""
    return not os.environ.get("FLASHINFER_DISABLE_JIT")


def _ready_made(name: str) -> bool:
    """Whether FlashInfer, or a wheel for this card, brings the module."""
    return Path(_environment().get_aot_path(name)).is_file()


def _own_build(name: str) -> Path:
    """Where FlashInfer builds it; it ignores that where it may not build."""
    return Path(_environment().FLASHINFER_JIT_DIR) / name / f"{name}.so"


def _environment() -> Any:
    return import_module("flashinfer.jit.env")
