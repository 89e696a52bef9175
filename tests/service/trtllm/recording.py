"""A library that answers every entry with a constant and keeps what it was called with."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ANSWER = 3.0
LISTS = ("fp4", "mxint4")
"""Entries that answer with a list of one tensor."""


class Recording:
    """FlashInfer's names; calls bind to the signatures of the real one, by keyword only."""

    def __init__(self, real: Any) -> None:
        self.calls: list[dict[str, Any]] = []
        self.in_place = True
        self._real = real

    @property
    def last(self) -> dict[str, Any]:
        return self.calls[-1]

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._real, name)
        return self._entry(name, inspect.signature(found)) if name.startswith("trtllm_") else found

    def _entry(self, name: str, signature: inspect.Signature) -> Callable[..., Any]:
        def entry(**given: Any) -> Tensor | list[Tensor]:
            signature.bind(**given)
            self.calls.append(given)
            out = self._output(given)
            return [out] if any(kind in name for kind in LISTS) else out

        entry.__signature__ = signature  # type: ignore[attr-defined]
        return entry

    def _output(self, given: dict[str, Any]) -> Tensor:
        rows = given["hidden_states"]
        wide = rows.shape[1] * (2 if rows.dtype == torch.uint8 else 1)
        width = given.get("valid_hidden_size") or wide
        out = given.get("output") if self.in_place else None
        if out is None:
            out = torch.empty(rows.shape[0], width, dtype=torch.bfloat16, device=rows.device)
        out.fill_(ANSWER)
        return out
