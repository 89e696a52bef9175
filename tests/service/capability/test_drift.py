"""FlashInfer against the rows: the installed one, the recorded ones, and ones that drifted."""

from __future__ import annotations

import inspect as python_inspect
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.service.capability.cases import LOGITS, NEWEST, TRTLLM, ask, codes, layer, modes, on

from expertd.capability import library as libraries
from expertd.capability.device import installed_flashinfer
from expertd.capability.drift import Drift, baseline, differences, drift
from expertd.capability.library import Library, inspect, library, recorded, recorded_versions
from expertd.capability.row import Row
from expertd.capability.rows import ROWS
from expertd.capability.sources import Signature
from expertd.capability.versions import at_least, parse
from expertd.core import PlanMode, QuantScheme, RoutingMethod
from expertd.errors import InvalidArgument

FLASHINFER_ROWS = tuple(row for row in ROWS if row.call is not None)
NAMED = [pytest.param(row, id=f"{row.entry}-{row.activation_quant}") for row in FLASHINFER_ROWS]
Edit = Callable[[str], str]


def source_of(known: Library) -> tuple[str, str]:
    """Python text with the enums and entry points of a library: enums first."""
    enums = [
        f"class {name}(IntEnum):\n" + "".join(f"    {m} = ({v},)\n" for m, v in members.items())
        for name, members in known.enums.items()
    ]
    functions = [
        f"def {name}({', '.join((*sig.required, *(f'{n}=None' for n in sig.optional)))}): ...\n"
        for name, sig in known.functions.items()
    ]
    return "\n".join(enums), "\n".join(functions)


def fake(root: Path, version: str = "0.7.9", edit: Edit = lambda text: text) -> Library:
    """A FlashInfer like the newest recorded in a folder, edited, as start-up would inspect it."""
    enums, functions = source_of(recorded(NEWEST))
    (root / "fused_moe").mkdir(parents=True)
    (root / "tllm_enums.py").write_text(edit(enums))
    (root / "fused_moe/core.py").write_text(edit(functions))
    return inspect(root, version)


def kinds(found: Library) -> dict[str, str]:
    entries = differences(found, baseline(found.version), ROWS)
    return {entry.name: entry.kind for entry in entries}


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch, kernels: None) -> Callable[[Library], None]:
    def use(found: Library) -> None:
        monkeypatch.setattr("expertd.capability.match.library_of", lambda version: found)

    return use


def test_the_installed_flashinfer_is_what_its_record_says() -> None:
    assert drift(installed_flashinfer()) == ()
    known = recorded(installed_flashinfer() or "")
    found = library(installed_flashinfer())
    assert found is not None and found.installed
    assert (found.functions, found.enums, found.facts) == (
        known.functions,
        known.enums,
        known.facts,
    )


@pytest.mark.filterwarnings("ignore")
def test_inspection_reads_what_python_itself_sees() -> None:
    import flashinfer.fused_moe.core as core
    import flashinfer.tllm_enums as enums

    found = library(installed_flashinfer())
    assert found is not None
    for name, signature in found.functions.items():
        parameters = python_inspect.signature(getattr(core, name)).parameters.values()
        empty = python_inspect.Parameter.empty
        required = {p.name for p in parameters if p.default is empty}
        assert (set(signature.required), signature.names) == (
            required,
            {p.name for p in parameters},
        )
    for name, members in found.enums.items():
        real = {m: int(v) for m, v in getattr(enums, name).__members__.items()}
        assert real == members


@pytest.mark.parametrize("version", recorded_versions())
@pytest.mark.parametrize("row", NAMED)
def test_every_call_binds_by_keyword_from_the_rows_version_on(row: Row, version: str) -> None:
    assert row.call is not None
    if not at_least(version, row.since):
        return
    signature = recorded(version).functions[row.call.function]
    assert set(row.call.passes) <= signature.names
    keyword = python_inspect.Parameter.KEYWORD_ONLY
    bound = python_inspect.Signature(
        [
            python_inspect.Parameter(n, keyword, default=d)
            for names, d in (
                (signature.required, python_inspect.Parameter.empty),
                (signature.optional, None),
            )
            for n in names
        ]
    )
    wishes = [name for name in row.call.prefers if name in signature.names]
    bound.bind(**dict.fromkeys((*row.call.passes, *wishes)))
    for enum, member in row.call.members:
        assert member in recorded(version).members(enum)
    for use in row.activations.values():
        if at_least(version, use.since):
            assert use.member in recorded(version).members("ActivationType")


@pytest.mark.parametrize("row", NAMED)
def test_what_a_row_names_exists_in_the_newest_record(row: Row) -> None:
    assert row.call is not None
    newest = recorded(recorded_versions()[-1])
    names = newest.functions[row.call.function].names
    assert {*row.call.prefers, *row.call.padding} <= names
    for use in row.activations.values():
        assert {*use.passes, *(use.limit or ())} <= names


def test_an_unchanged_newer_version_is_inspected_and_used(
    tmp_path: Path, serving: Callable[[Library], None]
) -> None:
    found = fake(tmp_path)
    assert kinds(found) == {}
    serving(found)
    assert modes(ask(layer()), TRTLLM) == {PlanMode.MONOLITHIC, PlanMode.ROUTED}
    scaled = layer(method=RoutingMethod.MINIMAX2, settings={"routed_scaling_factor": 3.0})
    assert codes(ask(scaled), TRTLLM, PlanMode.MONOLITHIC, scaled) == {"scale_ignored"}, (
        "a version whose text does not show the fix does not have it"
    )


def test_a_renamed_member_is_caught_and_disables_what_needs_it(
    tmp_path: Path, serving: Callable[[Library], None]
) -> None:
    found = fake(tmp_path, edit=lambda text: text.replace("MxFp8 = ", "MXFp8 = "))
    assert kinds(found) == {"Fp8QuantizationType.MxFp8": "enum_missing"}
    serving(found)
    spec = layer(QuantScheme.MXFP8)
    assert codes(ask(spec), TRTLLM, PlanMode.ROUTED, spec) == {"enum_missing"}
    assert modes(ask(layer(QuantScheme.FP8_BLOCK128)), TRTLLM)


def test_a_moved_integer_is_caught_and_harmless(
    tmp_path: Path, serving: Callable[[Library], None]
) -> None:
    found = fake(
        tmp_path, edit=lambda text: text.replace("TopKSigmoid = (9,)", "TopKSigmoid = (11,)")
    )
    assert kinds(found) == {"RoutingMethodType.TopKSigmoid": "integer_moved"}
    serving(found)
    assert modes(ask(layer(method=RoutingMethod.TOPK_SIGMOID)), TRTLLM) == {
        PlanMode.MONOLITHIC,
        PlanMode.ROUTED,
    }


def test_a_dropped_argument_is_caught_and_disables_the_entry(
    tmp_path: Path, serving: Callable[[Library], None]
) -> None:
    found = fake(tmp_path, edit=lambda text: text.replace(" weight_layout=None,", ""))
    assert kinds(found)["trtllm_bf16_moe.weight_layout"] == "argument_missing"
    serving(found)
    spec = layer()
    assert codes(ask(spec, LOGITS), TRTLLM, PlanMode.MONOLITHIC, spec) == {"argument_missing"}
    assert modes(ask(layer(QuantScheme.NVFP4)), TRTLLM)


def test_a_new_required_argument_is_caught(
    tmp_path: Path, serving: Callable[[Library], None]
) -> None:
    found = fake(tmp_path, edit=lambda text: text.replace("_bf16_moe(", "_bf16_moe(surprise, "))
    assert kinds(found) == {"trtllm_bf16_moe.surprise": "argument_required"}
    serving(found)
    spec = layer()
    assert codes(ask(spec), TRTLLM, PlanMode.MONOLITHIC, spec) == {"argument_required"}


def test_a_missing_entry_is_caught(tmp_path: Path, serving: Callable[[Library], None]) -> None:
    found = fake(tmp_path, edit=lambda text: text.replace("def trtllm_bf16_moe(", "def gone("))
    assert kinds(found) == {"trtllm_bf16_moe": "entry_missing"}
    serving(found)
    spec = layer()
    assert codes(ask(spec), TRTLLM, PlanMode.MONOLITHIC, spec) == {"entry_missing"}
    assert modes(ask(spec), TRTLLM) == {PlanMode.ROUTED}


def test_an_empty_flashinfer_disables_every_cell_of_it(tmp_path: Path) -> None:
    found = inspect(tmp_path, "0.7.2")
    assert (found.functions, found.enums, found.facts) == ({}, {}, frozenset())
    assert {entry.kind for entry in differences(found, recorded("0.7.2"), ROWS)} == {
        "enum_missing",
        "entry_missing",
    }


def test_a_version_that_is_neither_installed_nor_recorded_is_told() -> None:
    with pytest.raises(InvalidArgument, match=r"recorded: 0\.6\.6, .*0\.7\.2"):
        library("0.5.3")
    with pytest.raises(InvalidArgument, match="not like"):
        library("newest; rm")
    assert library(None) is None


def test_the_nearest_record_before_a_version_is_its_baseline() -> None:
    assert baseline("0.6.14").version == "0.6.13"
    assert baseline("0.9.0").version == recorded_versions()[-1]
    assert baseline("0.1.0").version == recorded_versions()[0]


def test_every_version_that_the_project_promises_is_recorded() -> None:
    promised = "0.6.6 0.6.7 0.6.8 0.6.11 0.6.12 0.6.13 0.6.15 0.6.17 0.6.18 0.7.0 0.7.2"
    assert set(promised.split()) <= set(recorded_versions())
    assert list(recorded_versions()) == sorted(recorded_versions(), key=parse)


def test_versions_are_ordered_as_packages_are() -> None:
    texts = ["0.6.9", "0.6.18.dev1", "0.6.18rc7", "0.6.18", "0.6.18.post1", "0.7", "0.7.0.post1"]
    assert sorted(reversed(texts), key=parse) == texts
    assert parse("0.7") == parse("0.7.0") == parse("0.7.0+cu130")
    assert at_least("0.6.18.post1", "0.6.18") and not at_least("0.6.18rc7", "0.6.18")


def test_a_signature_knows_all_its_names() -> None:
    assert Signature(("a",), ("b",)).names == {"a", "b"}
    assert Drift("kind", "name", "text").text == "text"
    assert libraries.reader_of(Path(__file__).parent)("nowhere") is None


def test_devices_remember_the_version_that_was_asked_for() -> None:
    assert on("sm100", "0.6.8").flashinfer == "0.6.8"
