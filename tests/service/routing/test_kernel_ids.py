"""Names to integers, for the installed kernel library and for every order of members there was."""

from __future__ import annotations

import ast
from importlib.util import find_spec
from pathlib import Path

import pytest

from expertd.core import RoutingMethod
from expertd.errors import FailedPrecondition
from expertd.routing.kernel_ids import FLASHINFER_NAMES, kernel_id, kernel_refusal

FIRST = ["Default", "Renormalize", "DeepSeekV3", "Llama4", "RenormalizeNaive", "TopK"]
SECOND = ["SigmoidRenorm", "MiniMax2"]
HISTORY = {
    "0.6.7": [*FIRST, "Unspecified"],
    "0.6.8": [*FIRST, *SECOND, "Unspecified"],
    "0.6.17": [*FIRST, *SECOND, "Sigmoid", "Unspecified"],
    "0.7.2": [*FIRST, *SECOND, "Sigmoid", "TopKSigmoid", "Unspecified"],
}
MEMBERS = {
    version: {name: number for number, name in enumerate(names)}
    for version, names in HISTORY.items()
}


def installed() -> dict[str, int]:
    """RoutingMethodType of the installed FlashInfer, from its source: importing it needs a GPU."""
    found = find_spec("flashinfer")
    assert found is not None and found.origin is not None
    tree = ast.parse((Path(found.origin).parent / "tllm_enums.py").read_text())
    enum = next(n for n in tree.body if getattr(n, "name", "") == "RoutingMethodType")
    assert isinstance(enum, ast.ClassDef)
    members = {}
    for line in enum.body:
        if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name):
            value = ast.literal_eval(line.value)
            members[line.targets[0].id] = value[0] if isinstance(value, tuple) else value
    return members


def test_the_installed_library_has_every_name() -> None:
    members = installed()
    assert members == MEMBERS["0.7.2"]
    ids = {method: kernel_id(method, members) for method in FLASHINFER_NAMES}
    assert ids[RoutingMethod.TOPK_SIGMOID] == 9
    assert len(set(ids.values())) == len(ids)
    assert members["Unspecified"] not in ids.values()


@pytest.mark.parametrize("version", MEMBERS)
def test_a_moved_integer_is_harmless_and_a_missing_name_told(version: str) -> None:
    members = MEMBERS[version]
    for method, name in FLASHINFER_NAMES.items():
        if name in members:
            assert kernel_id(method, members) == members[name]
            assert kernel_refusal(method, members) is None
            continue
        with pytest.raises(FailedPrecondition, match=f"no routing method {name}") as told:
            kernel_id(method, members)
        assert told.value.refusals[0].code == "method_missing"
    moved = {name: number + 3 for name, number in members.items()}
    assert kernel_id(RoutingMethod.TOPK, moved) == members["TopK"] + 3


INTERNAL = [m for m in RoutingMethod if m not in FLASHINFER_NAMES]


@pytest.mark.parametrize("method", INTERNAL)
def test_internal_methods_have_no_integer(method: RoutingMethod) -> None:
    """Unspecified too: its 9 of old is TopKSigmoid now."""
    with pytest.raises(FailedPrecondition, match="use a routed plan") as told:
        kernel_id(method, MEMBERS["0.7.2"])
    assert told.value.refusals[0].code == "method_internal"


def test_all_others_are_internal() -> None:
    assert set(INTERNAL) == {
        "Unspecified", "DeepSeekV4", "GroupedSoftmax", "SoftmaxBias", "Custom", "Simulated",
    }  # fmt: skip
