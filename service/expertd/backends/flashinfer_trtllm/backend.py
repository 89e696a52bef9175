"""FlashInfer's TRT-LLM fused MoE: one class per family of entries, each for both modes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from expertd.backends.base import Batch
from expertd.backends.flashinfer import tuning
from expertd.backends.flashinfer.backend import FlashInferBackend
from expertd.backends.flashinfer.entry import Entry
from expertd.backends.flashinfer.library import library
from expertd.backends.flashinfer.routing import weights_on_rows
from expertd.backends.flashinfer_trtllm import arguments, presence, topk
from expertd.backends.flashinfer_trtllm.pad import Sizes, pad_columns
from expertd.backends.flashinfer_trtllm.quantize import FROM_CALLER, QUANTIZERS
from expertd.backends.flashinfer_trtllm.weights import Native, native
from expertd.capability.device import installed_flashinfer
from expertd.capability.row import Row
from expertd.capability.versions import at_least
from expertd.core import LayerSpec, PlanMode
from expertd.weights.canonical import ExpertWeights


class TrtllmMoe(FlashInferBackend):
    """What all entries share; shuffled: whether weights are in the kernels' row order.

    ungrouped: what the launcher wants for both group arguments of DeepSeekV3 without groups.
    """

    shuffled: ClassVar[bool] = True
    ungrouped: ClassVar[int | None] = None

    def __init__(self, row: Row, spec: LayerSpec, device: torch.device) -> None:
        super().__init__(row, spec, device)
        self._sizes = Sizes(spec.hidden, spec.intermediate, *row.padded(spec))

    def _missing(self) -> Iterator[str]:
        return presence.missing(self.device)

    def _prepare_weights(self, weights: ExpertWeights | None, bias: Tensor | None) -> None:
        assert weights is not None
        row, spec = self.row, self.spec
        self._native: Native = native(weights, spec, self._sizes)
        bias = arguments.router_bias(row, spec, bias, self.device)
        self._values = {
            **self._native.arguments,
            **arguments.layer_values(row, spec, self._sizes, library()),
            **arguments.routing_values(row, spec, bias, library(), self.ungrouped),
            "use_shuffled_weight": self.shuffled,
            "tune_max_num_tokens": tuning.TUNE_TOKENS,
        }
        self._entry = Entry(row, spec.activation, self._sizes.padded)
        self._topk = topk.form(self._takes_pair())

    def _layout_name(self) -> str:
        return f"{self.row.backend} {self._sizes.native_hidden}x{self._sizes.native_intermediate}"

    def _forward(self, batch: Batch) -> None:
        if self.row.mode is PlanMode.ROUTED:
            batch = weights_on_rows(batch, self.spec)
        in_place = batch.out.dtype == torch.bfloat16 and batch.out.is_contiguous()
        values = {
            **self._values,
            **self._rows(batch),
            **self._routing(batch),
            "output": batch.out if in_place else None,
        }
        output = self._entry(values)
        if output.data_ptr() != batch.out.data_ptr():
            batch.out.copy_(output)

    def _rows(self, batch: Batch) -> dict[str, Tensor | None]:
        """hidden_states and their scales in the entry's format and width."""
        rows, scales = batch.rows, batch.row_scales
        if scales is None:
            quantize = QUANTIZERS[self.row.activation_quant]
            rows, scales = quantize(rows, self._native.input_scale)
        else:
            scales = FROM_CALLER[self.row.activation_quant](scales)
        before, after = self._sizes.hidden, self._sizes.native_hidden
        if scales is not None:
            scales = self._scales(pad_columns(scales, before, after))
        return {
            "hidden_states": pad_columns(rows, before, after).contiguous(),
            "hidden_states_scale": scales,
        }

    def _scales(self, scales: Tensor) -> Tensor:
        """The rows' scales in the dtype that the entry takes."""
        return scales

    def _routing(self, batch: Batch) -> dict[str, Any]:
        if self.row.mode is PlanMode.MONOLITHIC:
            assert batch.logits is not None
            return {"routing_logits": batch.logits.contiguous()}
        assert batch.ids is not None and batch.weights is not None
        ids, weights = batch.ids, batch.weights
        return {"topk_ids": self._topk(ids, weights), "top_k": ids.shape[1]}

    def _takes_pair(self) -> bool:
        """Whether ids and weights go in as they are; else they are packed into one integer."""
        assert self.row.call is not None
        version, since = installed_flashinfer(), self.row.call.pair_since
        return since is not None and version is not None and at_least(version, since)


class Bf16(TrtllmMoe):
    """trtllm_bf16_moe: shuffled rows in blocks of 64 columns."""


class Fp8PerTensor(TrtllmMoe):
    """trtllm_fp8_per_tensor_scale_moe: one static multiplier for all rows."""


class Fp8PerChannel(TrtllmMoe):
    """trtllm_fp8_per_channel_scale_moe: a multiplier for each row of both operands."""


class Fp8Block(TrtllmMoe):
    """trtllm_fp8_block_scale_moe as DeepSeekFp8: the canonical weights as they are."""

    shuffled = False
    ungrouped = 1


class MxFp8(TrtllmMoe):
    """trtllm_fp8_block_scale_moe as MxFp8."""

    ungrouped = 1


class Fp4(TrtllmMoe):
    """trtllm_fp4_block_scale_moe: NVFP4, and MXFP4 with bf16 or mxfp8 rows."""

    def _scales(self, scales: Tensor) -> Tensor:
        # Exponents of mxfp8 rows go in under the dtype of NVFP4's scales.
        return scales.view(torch.float8_e4m3fn)


class MxInt4(TrtllmMoe):
    """trtllm_mxint4_block_scale_moe."""
