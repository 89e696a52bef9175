"""Whether FlashInfer's compiled modules are on this machine: building one takes up to hours."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

TUNER = "trtllm_utils"
"""The module whose kernel the tuner waits with before it times a tactic."""

PREBUILD = "run: expertd prebuild"


def missing(name: str) -> str:
    """Why a module cannot be loaded without a build, and what to do; empty if it can."""
    if Path(_environment().get_aot_path(name)).is_file():
        return ""
    if not any(path.is_file() for path in _own_builds(name)):
        return f"FlashInfer's module {name} is not built here; {PREBUILD}"
    if shutil.which("ninja") is None:
        # FlashInfer lets ninja compare dates before it loads what it built itself.
        return f"FlashInfer's module {name} is loaded through ninja: pip install ninja"
    return ""


def may_build() -> bool:
    """FlashInfer looks whether the variable is there, not what it says."""
    return not os.environ.get("FLASHINFER_DISABLE_JIT")


def _own_builds(name: str) -> Iterator[Path]:
    """Where FlashInfer's own builds lie; it ignores them where it may not build."""
    if may_build():
        yield Path(_environment().FLASHINFER_JIT_DIR) / name / f"{name}.so"


def _environment() -> Any:
    return import_module("flashinfer.jit.env")
