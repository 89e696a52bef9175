"""What FlashInfer offers, read from its source text: nothing of it is imported or executed."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

Reader = Callable[[str], str | None]
"""Gives the text of a file by its path below flashinfer/, None when there is no such file."""

FUNCTION_FILES = ("fused_moe/core.py",)
ENUM_FILES = ("tllm_enums.py", "fused_moe/core.py")
ROUTING_FILES = (
    "data/csrc/fused_moe/trtllm_backend/trtllm_fused_moe_routing_runner.cu",
    "data/csrc/trtllm_fused_moe_runner.cu",
)
ENUMS = (
    "RoutingMethodType",
    "ActivationType",
    "WeightLayout",
    "Fp8QuantizationType",
    "RoutingInputMode",
)
FUNCTIONS = re.compile(r"trtllm_\w+_moe|cutlass_fused_moe|cutlass_fused_moe_workspace_size")
MINIMAX2_SCALE = "minimax2_scale"
_MINIMAX2_BRANCH = re.compile(r"RoutingMethodType::MiniMax2\)(?P<body>.*?)\} else if", re.DOTALL)


class Signature(NamedTuple):
    """A function's parameters by name, in order."""

    required: tuple[str, ...]
    optional: tuple[str, ...]

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self.required + self.optional)


def read_functions(read: Reader) -> dict[str, Signature]:
    """The fused-MoE entry points at the top of their modules."""
    return {
        node.name: _signature(node.args)
        for node in _nodes(read, FUNCTION_FILES)
        if isinstance(node, ast.FunctionDef) and FUNCTIONS.fullmatch(node.name)
    }


def read_enums(read: Reader) -> dict[str, dict[str, int]]:
    """The members of the enums whose integers go into a kernel."""
    return {
        node.name: dict(_members(node))
        for node in _nodes(read, ENUM_FILES)
        if isinstance(node, ast.ClassDef) and node.name in ENUMS
    }


def read_facts(read: Reader) -> frozenset[str]:
    """What only the kernels' text tells; a fact that cannot be shown is not there."""
    for path in ROUTING_FILES:
        branch = _MINIMAX2_BRANCH.search(read(path) or "")
        if branch and "mRouteScale = routedScalingFactor" in branch["body"]:
            return frozenset({MINIMAX2_SCALE})
    return frozenset()


def _nodes(read: Reader, paths: tuple[str, ...]) -> Iterator[ast.stmt]:
    for path in paths:
        yield from ast.parse(read(path) or "").body


def _signature(args: ast.arguments) -> Signature:
    positional = [arg.arg for arg in (*args.posonlyargs, *args.args)]
    split = len(positional) - len(args.defaults)
    keyword = list(zip((arg.arg for arg in args.kwonlyargs), args.kw_defaults, strict=True))
    required = [*positional[:split], *(name for name, default in keyword if default is None)]
    optional = [*positional[split:], *(name for name, default in keyword if default is not None)]
    return Signature(tuple(required), tuple(optional))


def _members(node: ast.ClassDef) -> Iterator[tuple[str, int]]:
    for line in node.body:
        if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name):
            value = _integer(line.value)
            if value is not None:
                yield line.targets[0].id, value


def _integer(node: ast.expr) -> int | None:
    if isinstance(node, ast.Tuple) and len(node.elts) == 1:
        node = node.elts[0]
    value = getattr(node, "value", None)
    return value if isinstance(value, int) else None


def read_source(read: Reader) -> Mapping[str, object]:
    """All of it, in the form of a record."""
    return {
        "functions": {name: sig._asdict() for name, sig in sorted(read_functions(read).items())},
        "enums": dict(sorted(read_enums(read).items())),
        "facts": sorted(read_facts(read)),
    }
