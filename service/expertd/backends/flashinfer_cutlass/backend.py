"""FlashInfer's cutlass_fused_moe as a backend: routed plans of all its weight formats."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from expertd.backends.base import Batch
from expertd.backends.flashinfer.backend import FlashInferBackend
from expertd.backends.flashinfer.entry import Entry
from expertd.backends.flashinfer.library import library
from expertd.backends.flashinfer.routing import final_weights, weights_on_rows
from expertd.backends.flashinfer.tuning import TUNE_TOKENS
from expertd.backends.flashinfer_cutlass import presence
from expertd.backends.flashinfer_cutlass.activation import constants
from expertd.backends.flashinfer_cutlass.rows import fp8_rows
from expertd.backends.flashinfer_cutlass.weights import Native, native
from expertd.backends.flashinfer_cutlass.workspace import workspace, workspace_bytes
from expertd.weights.canonical import ExpertWeights


class Cutlass(FlashInferBackend):
    """One layer; the row says which of the kernel's modes."""

    def _missing(self) -> Iterator[str]:
        return presence.missing(self.device, self.row)

    def _prepare_weights(self, weights: ExpertWeights | None, bias: Tensor | None) -> None:
        assert weights is not None
        self._native: Native = native(weights, self.row.activation_quant)
        self._fixed = self._layer_arguments(weights)
        self._entry = Entry(self.row, self.spec.activation)
        self._workspace_bytes: dict[tuple[int, int], int] = {}

    def _layer_arguments(self, weights: ExpertWeights) -> dict[str, Any]:
        """What every call of the layer passes."""
        spec, dtype = self.spec, self._native.dtype
        member = self.row.activations[spec.activation.kind].member
        return {
            "fc1_expert_weights": self._native.w13,
            "fc2_expert_weights": self._native.w2,
            "fc1_expert_biases": _as(weights.bias13, dtype),
            "fc2_expert_biases": _as(weights.bias2, dtype),
            "output_dtype": dtype,
            "ep_size": spec.num_experts // spec.held,
            "ep_rank": spec.expert_begin // spec.held,
            "activation_type": library().ActivationType[member],
            "tune_max_num_tokens": TUNE_TOKENS,
            # The fused one adds with atomics: its sums differ from run to run.
            "use_fused_finalize": False,
            **self._modes(),
            **constants(spec.activation, spec.held, self.device),
        }

    def _modes(self) -> dict[str, bool]:
        """The switches that the row throws."""
        assert self.row.call is not None
        return {name: True for name in self.row.call.passes if name.startswith("use_")}

    def _forward(self, batch: Batch) -> None:
        batch = weights_on_rows(batch, self.spec)
        assert batch.ids is not None and batch.weights is not None
        rows, scales = self._rows(batch.rows)
        in_place = batch.out.dtype == self._native.dtype and batch.out.is_contiguous()
        out = batch.out if in_place else torch.empty_like(batch.rows, dtype=self._native.dtype)
        values = {
            **self._fixed,
            "input": rows,
            "token_selected_experts": batch.ids.contiguous(),
            "token_final_scales": final_weights(batch.ids, batch.weights).contiguous(),
            "quant_scales": scales,
            "output": out,
            **self._scratch(len(rows), batch.ids.shape[1], rows.dtype),
        }
        self._entry(values)
        if not in_place:
            batch.out.copy_(out)

    def _rows(self, rows: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The rows in the kernel's dtype, and the quant_scales that go with them."""
        fp8 = self._native.fp8
        if fp8 is None:
            assert self._native.scales is not None
            return rows.to(self._native.dtype).contiguous(), list(self._native.scales)
        codes, scale = fp8_rows(rows, fp8.rows)
        return codes.contiguous(), fp8.of_call(scale)

    def _scratch(self, tokens: int, top_k: int, x_dtype: torch.dtype) -> dict[str, Tensor]:
        """workspace_buffer, where this version takes one."""
        if "workspace_buffer" not in self._entry.names:
            return {}
        size = self._workspace_bytes.get((tokens, top_k))
        if size is None:
            size = workspace_bytes(self._sizes(tokens, top_k, x_dtype))
            self._workspace_bytes[tokens, top_k] = size
        return {"workspace_buffer": workspace(size, self.device)}

    def _sizes(self, tokens: int, top_k: int, x_dtype: torch.dtype) -> dict[str, Any]:
        spec = self.spec
        return {
            **self._fixed,
            "max_num_tokens": tokens,
            "hidden_size": spec.hidden,
            "intermediate_size": spec.intermediate,
            "num_experts_total": spec.num_experts,
            "top_k": top_k,
            "x_dtype": x_dtype,
            "weight_dtype": self._native.w13.dtype,
            "device": self.device,
        }


def _as(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias.to(dtype).contiguous()
