"""explain and capabilities: the answers, the exit codes, and what is said about bad input."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.service.capability.cases import TRTLLM, layer, on

from expertd.capability.device import ARCHS
from expertd.capability.explain import explain, explain_request
from expertd.capability.report import capabilities, cell_reports
from expertd.capability.row import State
from expertd.capability.rows import ROWS
from expertd.capability.spec import FIELDS, call_form, parse_spec
from expertd.cli import main
from expertd.core import ActivationKind, PlanMode, QuantScheme, RoutingForm, RoutingMethod
from expertd.errors import InvalidArgument
from expertd.routing.methods import TRAITS
from expertd.weights.demo import write_demo

DEEPSEEK: dict[str, Any] = {
    "num_experts": 256,
    "top_k": 8,
    "hidden": 7168,
    "intermediate": 2048,
    "activation": "swiglu",
    "routing": "DeepSeekV3",
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "bias": True,
    "quant": "fp8_block128",
    "logits_dtype": "float32",
}


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any], str]:
    code = main(["explain", "--json", *arguments])
    said = capsys.readouterr()
    return code, json.loads(said.out) if said.out else {}, said.err


def spec(**changes: object) -> str:
    return json.dumps({**DEEPSEEK, **changes})


def test_the_answer_has_the_promised_shape(capsys: pytest.CaptureFixture[str]) -> None:
    code, answer, _ = run(capsys, "--spec", spec(), "--device", "cpu")
    assert code == 0 and answer["routing_method"] == "DeepSeekV3"
    assert answer["plans"] == [
        {
            "backend": "grouped",
            "mode": "routed",
            "entry": "grouped",
            "activation": "bf16",
            "state": "present",
        }
    ]
    for entry in answer["rejected"]:
        assert entry["backend"] and entry["mode"] in tuple(PlanMode) and entry["entry"]
        for reason in entry["reasons"]:
            assert list(reason) == ["code", "field", "given", "accepted", "text"]
    assert len(answer["plans"]) + len(answer["rejected"]) == len(ROWS)


@pytest.mark.usefixtures("kernels")
def test_blackwell_and_hopper(capsys: pytest.CaptureFixture[str]) -> None:
    code, answer, _ = run(capsys, "--spec", spec(), "--device", "sm100")
    first = [(p["backend"], p["mode"], p["activation"], p["state"]) for p in answer["plans"]][:2]
    assert code == 0
    assert first == [
        (TRTLLM, "monolithic", "fp8_group128", "declared"),
        (TRTLLM, "routed", "fp8_group128", "declared"),
    ]
    code, answer, _ = run(capsys, "--spec", spec(), "--device", "sm90")
    assert (code, answer["plans"][0]["backend"]) == (0, "flashinfer_cutlass")
    refused = [entry for entry in answer["rejected"] if entry["backend"] == TRTLLM]
    assert all("arch" in {r["code"] for r in entry["reasons"]} for entry in refused)


@pytest.mark.usefixtures("kernels")
def test_the_version_that_is_asked_about_decides(capsys: pytest.CaptureFixture[str]) -> None:
    ungrouped = spec(n_group=1, topk_group=1)
    for version, modes in (("0.6.17", {"routed"}), ("0.6.18", {"monolithic", "routed"})):
        question = ("--spec", ungrouped, "--device", "sm100", "--flashinfer", version)
        _, answer, _ = run(capsys, *question, "--backend", TRTLLM)
        assert {plan["mode"] for plan in answer["plans"]} == modes


def test_reference_only_when_it_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    code, answer, _ = run(capsys, "--spec", spec(), "--device", "cpu", "--backend", "reference")
    assert (code, [plan["entry"] for plan in answer["plans"]]) == (0, ["reference"])
    code, answer, _ = run(capsys, "--spec", spec(), "--device", "sm90", "--backend", "grouped")
    assert (code, answer["plans"]) == (3, [])
    assert "grouped" in answer["advice"] and "device: cpu" in answer["advice"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--spec", "{"), "not JSON"),
        (("--spec", "[]"), "JSON object"),
        (("--spec", spec(quant="fp9")), "quant='fp9'.*nvfp4"),
        (("--spec", spec(activation="relu")), "activation='relu'.*relu2"),
        (("--spec", spec(routing="Deepseek")), "routing='Deepseek'.*MiniMax2"),
        (("--spec", spec(experts_count=4)), "experts_count.*num_experts"),
        (("--spec", spec(top_k=300)), "top_k=300"),
        (("--spec", spec(topk_group=9)), "topk_group=9"),
        (("--spec", spec(routing="Renormalize", bias=False)), "n_group=8"),
        (("--spec", spec(routed_scaling_factor=-1)), "routed_scaling_factor"),
        (("--spec", spec(scoring="softmax")), "scoring='softmax'"),
        (("--spec", spec(alpha=1.7)), "alpha"),
        (("--spec", spec(experts="0-256")), "experts='0-256'"),
        (("--spec", spec(experts="7-3")), "experts"),
        (("--spec", spec(hidden=True)), "hidden=True"),
        (("--spec", spec(hidden=2.5)), "hidden=2.5"),
        (("--spec", spec(limit=float("inf"))), "limit=inf"),
        (("--spec", spec(), "--device", "sm42"), "sm42.*sm103"),
        (("--spec", spec(), "--flashinfer", "0.1.2"), "recorded: 0.6.6"),
        (("--spec", spec(), "--backend", "cutlass"), "flashinfer_cutlass"),
    ],
)
def test_bad_input_is_told_by_field_and_ends_in_2(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], told: str
) -> None:
    code, _, error = run(capsys, *arguments)
    assert code == 2
    assert re.search(told, error), error


def test_everything_wrong_is_told_at_once() -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_spec({"num_experts": 0, "quant": "int3", "color": "red"})
    fields = {refusal.field for refusal in caught.value.refusals}
    assert fields == {
        "num_experts",
        "quant",
        "color",
        "top_k",
        "hidden",
        "intermediate",
        "routing",
    }


def test_every_field_of_the_contract_is_read() -> None:
    promised = """num_experts top_k hidden intermediate activation alpha beta limit routing scoring
    renormalize n_group topk_group routed_scaling_factor bias expert_bias experts quant
    logits_dtype"""
    assert set(FIELDS) == set(promised.split())
    described = parse_spec(
        {
            **{k: v for k, v in DEEPSEEK.items() if k not in ("routing", "n_group", "topk_group")},
            "scoring": "sigmoid",
            "renormalize": True,
            "activation": "swiglu_oai",
            "alpha": 1.5,
            "limit": 7,
            "experts": "64-127",
            "expert_bias": True,
            "topk_group": None,
        }
    )
    found = described.spec
    assert found.routing is not None and found.routing.method is RoutingMethod.MINIMAX2
    assert (found.expert_begin, found.expert_end, found.held) == (64, 128, 64)
    assert (found.activation.alpha, found.activation.beta, found.activation.limit) == (1.5, 1.0, 7)
    assert found.expert_bias and found.routing.routed_scaling_factor == 2.5


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("method", RoutingMethod)
def test_every_method_has_a_plan_on_every_card(method: RoutingMethod) -> None:
    for arch in ARCHS:
        found = layer(QuantScheme.BF16, method, kind=ActivationKind.SWIGLU)
        answer = explain(found, call_form(found), on(arch))
        assert answer["plans"], (method, arch)
        assert answer["routing_method"] == method
    unknown = method in ("Custom", "Simulated", "Unspecified")
    assert (call_form(found).routing is RoutingForm.TOPK) == unknown
    assert method in TRAITS


def test_a_checkpoint_is_explained_layer_by_layer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for family, method in (("qwen3_moe", "RenormalizeNaive"), ("deepseek_v3", "DeepSeekV3")):
        root = tmp_path / family
        write_demo(root, family)
        code, answer, _ = run(capsys, "--model", str(root), "--device", "cpu")
        assert code == 0
        (entry,) = answer["layers"]
        assert (entry["layers"], entry["routing_method"]) == ("0-1", method)
        code, answer, _ = run(capsys, "--model", str(root), "--layer", "1", "--device", "cpu")
        assert (code, answer["routing_method"]) == (0, method)


def test_the_tables_for_a_person_say_what_to_change(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--spec", spec(), "--device", "cpu"]) == 0
    assert "grouped" in capsys.readouterr().out
    assert main(["explain", "--spec", spec(), "--device", "sm80", "--backend", "grouped"]) == 3
    said = capsys.readouterr().out
    assert "no plan:" in said and "cpu" in said
    assert main(["capabilities", "--device", "cpu"]) == 0
    assert "reference" in capsys.readouterr().out


def test_the_body_of_the_http_question() -> None:
    body = {"spec": DEEPSEEK, "device": "cpu", "backend": "reference"}
    assert [plan["entry"] for plan in explain_request(body)["plans"]] == ["reference"]
    for bad in ({}, [], {"spec": DEEPSEEK, "model": "x"}, {"spec": DEEPSEEK, "device": 3}):
        with pytest.raises(InvalidArgument):
            explain_request(bad)


def test_capabilities_has_every_cell_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["capabilities", "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["device", "flashinfer", "cells", "drift"]
    wanted = ["backend", "entry", "mode", "activation_quant", "quant", "state", "why"]
    assert all(list(cell) == wanted for cell in found["cells"])
    keys = [tuple(cell[name] for name in wanted[:5]) for cell in found["cells"]]
    assert len(set(keys)) == len(keys) == sum(len(row.quants) for row in ROWS)
    state = {cell["backend"]: cell["state"] for cell in found["cells"]}
    assert (state["grouped"], state["triton"]) == ("present", "declared")


@pytest.mark.usefixtures("kernels")
def test_a_cell_that_cannot_run_is_declared_and_says_why() -> None:
    for report in cell_reports(on("sm90", "0.6.7")):
        assert bool(report.why) == (
            report.cell.backend in (TRTLLM, "grouped") or "0.6" in report.why
        )
        assert report.state is State.DECLARED
    proven = {ROWS[0].cell(QuantScheme.BF16): State.PROVEN}
    shown = capabilities(on("sm100"), proven)["cells"][0]
    assert (shown["entry"], shown["state"]) == ("trtllm_bf16_moe", "proven")


def test_a_failed_cell_is_no_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    found = layer()
    states = {row.cell(found.quant): State.FAILED for row in ROWS if row.backend == "grouped"}
    answer = explain(found, call_form(found), on("cpu"), states=states)
    assert not answer["plans"]


ABSENT = {
    "nowhere": "sys.meta_path.insert(0, Nowhere())",
    "halted": "sys.modules['torch'] = None",
}
BASE_INSTALL = """
import sys
class Nowhere:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
{absent}
from expertd.cli import main
sys.exit(max(main(args) for args in {commands!r}))
"""


def in_a_base_install(absent: str, *commands: list[str]) -> subprocess.CompletedProcess[str]:
    """The commands in a process where importing torch fails."""
    code = BASE_INSTALL.format(absent=ABSENT[absent], commands=commands)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("absent", ABSENT)
def test_the_commands_work_without_torch(absent: str) -> None:
    done = in_a_base_install(
        absent,
        ["explain", "--json", "--device", "sm90", "--spec", spec()],
        ["explain", "--json", "--spec", spec()],
        ["capabilities", "--json", "--device", "sm100", "--flashinfer", "0.6.18"],
        ["capabilities", "--json"],
    )
    assert done.returncode in (0, 3), done.stderr
    assert done.stdout.count('"rejected"') == 2 and done.stdout.count('"drift"') == 2


@pytest.mark.parametrize("absent", ABSENT)
@pytest.mark.parametrize("command", [["serve", "--demo"], ["verify"], ["demo-model", "--out", "x"]])
def test_what_needs_torch_says_how_to_get_it(absent: str, command: list[str]) -> None:
    done = in_a_base_install(absent, command)
    assert done.returncode == 1 and done.stdout == ""
    assert "torch" in done.stderr and "expertd[server]" in done.stderr
    assert "Traceback" not in done.stderr
