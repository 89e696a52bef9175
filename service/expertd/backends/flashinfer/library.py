"""FlashInfer as one object, or what stands in for it; and the turn that its callers take."""

from __future__ import annotations

import importlib
import logging
import threading
from functools import cache
from typing import Any

MODULES = (
    "flashinfer.fused_moe",
    "flashinfer.tllm_enums",
    "flashinfer",
    "flashinfer.fused_moe.utils",
)
"""Where FlashInfer keeps its entry points, its enums, and the rest; first found, first served."""

alone = threading.RLock()
"""Held by every call and around tuning: runners and their caches belong to one call at a time, and
while one thread tunes, FlashInfer would tune the calls of all others too."""

_stand_in: Any = None


class FlashInfer:
    """The entry points and enums of the installed FlashInfer as attributes of one object."""

    def __init__(self) -> None:
        self._modules = [importlib.import_module(name) for name in MODULES]

    def __getattr__(self, name: str) -> Any:
        for module in self._modules:
            if hasattr(module, name):
                return getattr(module, name)
        raise AttributeError(f"FlashInfer has no {name}")


def library() -> Any:
    """The object that has the entry points and enums: FlashInfer, or what stands in for it."""
    return _stand_in if _stand_in is not None else _flashinfer()


def stand_in(other: Any | None) -> None:
    """Puts an object with FlashInfer's names in its place (simulation, tests); None ends that."""
    global _stand_in
    _stand_in = other


def simulated() -> bool:
    """Whether something stands in for FlashInfer: then there is nothing to build or to tune."""
    return _stand_in is not None


@cache
def _flashinfer() -> FlashInfer:
    adopt(importlib.import_module("flashinfer.jit.core").logger)
    return FlashInfer()


def adopt(logger: logging.Logger) -> None:
    """Its lines come through our log, in the style that was asked for; its own file stays."""
    for handler in list(logger.handlers):
        if type(handler) is logging.StreamHandler:
            logger.removeHandler(handler)
    logger.parent = logging.getLogger()
