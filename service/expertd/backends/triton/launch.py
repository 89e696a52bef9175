"""Calls of the two GEMMs: a matrix, a tile and a call's tensors as the kernels' arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from expertd.backends.triton.align import Blocks
from expertd.backends.triton.chain import chained
from expertd.backends.triton.experts import first_gemm, second_gemm
from expertd.backends.triton.groups import HIGH
from expertd.backends.triton.tiles import Tile
from expertd.backends.triton.weights import Kind, Matrix

LANGUAGE = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float8_e4m3fn: tl.float8e4nv,
}
ROWS: dict[Kind, str] = {
    "plain": "plain",
    "mxfp8": "plain",
    "fixed": "fp8",
    "rows": "fp8",
    "groups": "fp8_groups",
}
INNER: dict[Kind, str] = {
    "plain": "plain",
    "rows": "plain",
    "mxfp8": "mxfp8",
    "fixed": "fixed",
    "groups": "groups",
}
"""How the first GEMM stores what a kind of second one reads ("rows": quantised after it)."""


@dataclass(frozen=True, slots=True)
class Call:
    """A kernel with its grid and its arguments."""

    kernel: Any
    grid: tuple[int]
    arguments: dict[str, Any]

    def run(self) -> None:
        self.kernel[self.grid](**self.arguments)

    def compile(self) -> None:
        """Compiles the kernel, or finds it compiled, without running it."""
        self.kernel.warmup(grid=self.grid, **self.arguments)


@dataclass(frozen=True, slots=True)
class Rows:
    """A GEMM's input [R, K] and its scales; split: its columns lie sorted modulo 4."""

    values: Tensor
    scale: Tensor | None = None
    split: bool = False


@dataclass(frozen=True, slots=True)
class Site:
    """What a GEMM is told of its call; router [T, K] are the weights."""

    blocks: Blocks
    sorted: bool
    held: int
    router: Tensor
    on_input: bool
    compute: torch.dtype

    @property
    def arguments(self) -> dict[str, Any]:
        blocks = self.blocks
        return {
            "router_ptr": self.router,
            "ids_ptr": blocks.ids,
            "order_ptr": blocks.order,
            "ends_ptr": blocks.ends,
            "expert_ptr": blocks.expert,
            "start_ptr": blocks.start,
            "first_expert": blocks.first,
            "held": self.held,
            "top_k": blocks.ids.shape[1],
            "most": blocks.most,
            "SORTED": self.sorted,
            "ON_INPUT": self.on_input,
        }


def first_call(
    site: Site,
    matrix: Matrix,
    tile: Tile,
    rows: Rows,
    inner: Rows,
    inner_kind: Kind,
    activation: dict[str, Any],
    gated: bool,
) -> Call:
    """rows [T, H] → inner [N, I] in the form that the second GEMM's kind asks for."""
    width, columns = rows.values.shape[1], inner.values.shape[1]
    arguments = {
        "inner_ptr": inner.values,
        "inner_scale_ptr": _or(inner.scale, inner.values),
        "inner": columns,
        "GATED": gated,
        "INNER": "split" if inner.split else INNER[inner_kind],
    }
    arguments |= activation | site.arguments
    arguments |= _arguments(matrix, tile, rows, width, site.compute)
    return Call(first_gemm, (site.blocks.most * triton.cdiv(columns, tile.n),), arguments)


def second_call(site: Site, matrix: Matrix, tile: Tile, inner: Rows, parts: Tensor) -> Call:
    """inner [N, I] → parts [T * K, H], weighted."""
    width, hidden = inner.values.shape[1], parts.shape[1]
    arguments = site.arguments | _arguments(matrix, tile, inner, width, site.compute)
    arguments["inner_ptr"] = arguments["inner_map"] = arguments.pop("rows_ptr")
    whole = matrix.format.packed == 1 or (inner.split and tile.swapped)
    arguments["ROW_MAP"] = arguments["MAPPED"] and site.sorted and whole
    if arguments["ROW_MAP"]:
        high = HIGH.value if tile.grouped else tile.m
        arguments["inner_map"] = _mapped(inner.values, high, tile.k)
    arguments["inner_scale_ptr"] = arguments.pop("row_scale_ptr")
    arguments |= {"parts_ptr": parts, "hidden": hidden}
    return Call(second_gemm, (site.blocks.most * triton.cdiv(hidden, tile.n),), arguments)


def _arguments(
    matrix: Matrix, tile: Tile, rows: Rows, width: int, compute: torch.dtype
) -> dict[str, Any]:
    """What a GEMM is told of its matrix, its tile and its input."""
    form, weight = matrix.format, matrix.weight
    assert not tile.more or (rows.split and tile.swapped), "packed.py alone takes more rows"
    mapped = tile.mapped and _can_be_mapped(weight) and _can_be_mapped(rows.values)
    return {
        "rows_ptr": rows.values,
        "MAPPED": mapped,
        "SHORT": tile.short,
        "GROUPED": tile.grouped,
        "row_scale_ptr": _or(rows.scale, rows.values),
        "weight_ptr": _mapped(weight, tile.n, tile.k // form.packed) if mapped else weight,
        "scale_ptr": _or(matrix.scale, weight),
        "end_scale_ptr": _or(matrix.end_scale, weight),
        "bias_ptr": _or(matrix.bias, weight),
        "width": width,
        "END_SCALE": form.end,
        "ROW_SCALED": matrix.kind == "rows",
        "BIASED": matrix.bias is not None,
        "FORMAT": form.name,
        "GROUP": form.group,
        "SCALE": form.scale,
        "ROWS": ROWS[matrix.kind],
        "SPLIT": rows.split,
        "COMPUTE": LANGUAGE[torch.float8_e4m3fn if matrix.fp8 else compute],
        "M": tile.m,
        "MORE": tile.more,
        "N": tile.n,
        "K": tile.k,
        "together": tile.together,
        "EVEN": width % tile.k == 0,
        "SWAPPED": tile.swapped,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "maxnreg": tile.registers or None,
    } | chained(weight.device)


def _can_be_mapped(matrix: Tensor) -> bool:
    """Whether every row begins where the copy engine can begin."""
    return matrix.shape[-1] * matrix.element_size() % 16 == 0 and matrix.data_ptr() % 16 == 0


def _mapped(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A matrix [..., rows, columns] as a tensor map of tiles; leading dimensions become rows."""
    return TensorDescriptor.from_tensor(matrix.flatten(0, -2), [rows, columns])


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """A tensor, or any other where the kernel does not read it."""
    return other if tensor is None else tensor
