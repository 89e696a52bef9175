"""The sizes of one call: which combinations have a kernel, and what padding leaves valid."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tests.twins.checks import Arguments, ContractError, require
from tests.twins.enums import ActivationType

MAX_EXPERTS = 2048
A = ActivationType

# Section 2.4: the activations that batched-GEMM cubins exist for, by format.
ACTIVATIONS: dict[str, frozenset[ActivationType]] = {
    "bf16": frozenset({A.Swiglu, A.SwigluStep, A.Relu2}),
    "fp8_per_tensor": frozenset({A.Swiglu, A.SwigluStep, A.Relu2}),
    "fp8_per_channel": frozenset({A.Swiglu, A.Relu2}),
    "deepseek_fp8": frozenset({A.Swiglu}),
    "mxfp8": frozenset({A.Swiglu, A.SwigluStep, A.Relu2}),
    "nvfp4": frozenset({A.Swiglu, A.Geglu, A.SwigluStep, A.Situ, A.Relu2}),
    "mxfp8_mxfp4": frozenset({A.Swiglu, A.Relu2}),
    "bf16_mxfp4": frozenset({A.Swiglu}),
    "e4m3_mxfp4": frozenset({A.Swiglu, A.Relu2}),
    "bf16_mxint4": frozenset({A.Swiglu}),
}
# What hidden and intermediate must be multiples of; FC1's rows always of 128.
MULTIPLES: dict[str, tuple[int, int]] = {
    "nvfp4": (128, 64),
    "bf16_mxint4": (256, 256),
}


@dataclass(frozen=True)
class Sizes:
    """T tokens, H hidden, I intermediate; rows are FC1's, out_rows FC2's, width the output's.

    contract_hidden and contract_inter are what the GEMMs read: the valid sizes, up to 128.
    """

    tokens: int
    hidden: int
    inter: int
    experts: int
    top_k: int
    offset: int
    local: int
    activation: ActivationType
    out_rows: int
    width: int
    contract_hidden: int
    contract_inter: int

    @property
    def gated(self) -> bool:
        return self.activation.is_gated

    @property
    def rows(self) -> int:
        return 2 * self.inter if self.gated else self.inter


def sizes(args: Arguments, fmt: str, *, packed: int = 1) -> Sizes:
    """Checks every size of a call and returns them; packed is how many values a byte row holds."""
    hidden_states = args.hidden_states
    is_2d = isinstance(hidden_states, torch.Tensor) and hidden_states.ndim == 2
    require(is_2d, "hidden_states", type(hidden_states).__name__, "a 2-D tensor [T, H]")
    tokens, hidden = hidden_states.shape[0], hidden_states.shape[1] * packed
    require(tokens > 0, "hidden_states", list(hidden_states.shape), "at least one token")
    experts = args.whole("num_experts", 1, MAX_EXPERTS)
    local = args.whole("local_num_experts", 1, experts)
    activation = _activation(args, fmt)
    inter = args.whole("intermediate_size", 1, 1 << 24)
    _check_multiples(fmt, hidden, inter, activation)
    out_rows, width, reads = _valid(args, tokens, hidden, inter)
    _unemulated(args)
    return Sizes(
        tokens=tokens,
        hidden=hidden,
        inter=inter,
        experts=experts,
        top_k=args.whole("top_k", 1, experts),
        offset=args.whole("local_expert_offset", 0, experts - local),
        local=local,
        activation=activation,
        out_rows=out_rows,
        width=width,
        contract_hidden=reads[0],
        contract_inter=reads[1],
    )


def _activation(args: Arguments, fmt: str) -> ActivationType:
    if "activation_type" not in args.values:
        return ActivationType.Swiglu
    value = ActivationType(args.whole("activation_type", 0, ActivationType.InvalidType - 1))
    able = ACTIVATIONS[fmt]
    names = ", ".join(sorted(member.name for member in able))
    require(value in able, "activation_type", value.name, f"one with a cubin for {fmt}: {names}")
    return value


def _check_multiples(fmt: str, hidden: int, inter: int, activation: ActivationType) -> None:
    of_hidden, of_inter = MULTIPLES.get(fmt, (128, 128))
    require(hidden % of_hidden == 0, "hidden_states", f"H={hidden}", f"H a multiple of {of_hidden}")
    if not activation.is_gated:
        of_inter = max(of_inter, 128)
    name = "intermediate_size"
    require(inter % of_inter == 0, name, inter, f"a multiple of {of_inter} for {fmt}")


def _valid(
    args: Arguments, tokens: int, hidden: int, inter: int
) -> tuple[int, int, tuple[int, int]]:
    """FC2's rows, the output's width, and (H, I) as the GEMMs contract them."""
    valid_h, valid_i = args.valid_hidden_size, args.valid_intermediate_size
    reads_i = inter
    if valid_i is not None:
        reads_i = _up(args.whole("valid_intermediate_size", 1, inter))
    out = _output_width(args, tokens, hidden)
    if valid_h is None:
        return hidden, out, (hidden, reads_i)
    valid_h = args.whole("valid_hidden_size", 1, hidden)
    require(valid_h % 8 == 0, "valid_hidden_size", valid_h, "a multiple of 8")
    rows = _up(valid_h)
    require(rows <= hidden, "valid_hidden_size", valid_h, f"at most {hidden} when rounded up")
    given = args.output is not None
    require(not given or out == valid_h, "output", f"width {out}", f"width {valid_h}, the valid H")
    return rows, valid_h, (rows, reads_i)


def _output_width(args: Arguments, tokens: int, hidden: int) -> int:
    output = args.output
    if output is None:
        return hidden
    if not isinstance(output, torch.Tensor) or output.ndim != 2:
        raise ContractError("output", output, f"a tensor [{tokens}, {hidden}]")
    narrow = "valid_hidden_size" in args.values and output.shape[1] <= hidden
    shape = [tokens, output.shape[1] if narrow else hidden]
    args.check("output", output, [torch.bfloat16], shape)
    return int(output.shape[1])


def _unemulated(args: Arguments) -> None:
    if not args.flag("do_finalize"):
        raise ContractError("do_finalize", False, "True: the twin has no permuted rows to return")
    args.absent("gemm1_lora_delta", "the twin has no LoRA")
    args.absent("per_token_scale", "the twin has no per-token NVFP4")
    args.absent("num_fused_shared_experts", "shared experts are never fused here")
    args.whole("tune_max_num_tokens", 1, 1 << 24)
    require(args.enable_pdl in (None, True, False), "enable_pdl", args.enable_pdl, "None or a bool")


def _up(size: int) -> int:
    return -(-size // 128) * 128
