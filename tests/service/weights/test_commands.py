"""inspect, quantize and demo-model as a user runs them."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.service.weights.files import qwen

from expertd.cli import main
from expertd.cli.inspect import size
from expertd.core import LayerSpec
from expertd.sources import demo_path
from expertd.weights.checkpoint import Checkpoint
from expertd.weights.layers import layer_specs
from expertd.weights.load import load_layer
from expertd.weights.placement import propose
from expertd.weights.storage import layer_bytes


def inspected(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["inspect", *arguments, "--json"]) == 0
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    return answer


def test_inspect_says_what_serving_would_hold(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "m"
    assert main(["demo-model", "--out", str(out), "--family", "deepseek_v3"]) == 0
    answer = inspected(capsys, str(out), "--device", "cpu")
    (kind,) = answer["layers"]
    assert answer["model_type"] == "deepseek_v3" and kind["layers"] == "0-1"
    assert kind["quant"] == "fp8_block128" and kind["routing"]["method"] == "DeepSeekV3"
    assert (kind["hidden"], kind["intermediate"], kind["num_experts"]) == (256, 128, 32)
    checkpoint = Checkpoint.open(out)
    held = [load_layer(checkpoint, n, s, "cpu")[0] for n, s in layer_specs(checkpoint).items()]
    assert answer["expert_bytes"] == sum(weights.nbytes for weights in held)
    assert kind["bytes"] == held[0].nbytes and kind["bytes_per_expert"] == held[0].nbytes // 32
    assert [plan["backend"] for plan in kind["plans"]]


def test_inspect_for_a_person(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(qwen(tmp_path / "m")), "--gpu", "1MiB", "--count", "2"]) == 0
    shown = capsys.readouterr().out
    assert "qwen3_moe" in shown and "--layers 0" in shown and "--layers 1" in shown
    assert main(["inspect", str(tmp_path / "m"), "--gpu", "100KiB"]) == 0
    assert "does not fit" in capsys.readouterr().out


def test_inspect_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None; from expertd.cli import main; "
        f"sys.exit(main(['inspect', {str(qwen(tmp_path / 'm'))!r}, '--device', 'sm90', '--json']))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["layers"][0]["quant"] == "bf16"


def test_inspect_names_the_layers_that_cannot_be_served(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = qwen(tmp_path / "m")
    (root / "model-00002-of-00002.safetensors").write_bytes(b"")
    capsys.readouterr()
    assert main(["inspect", str(root), "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert [kind["layers"] for kind in answer["layers"]] == ["0"]
    assert list(answer["refused"]) == ["1"]
    assert "model-00002-of-00002.safetensors" in answer["refused"]["1"]
    assert main(["inspect", str(root)]) == 1
    assert "layer 1 cannot be served" in capsys.readouterr().out


def test_inspect_names_tensors_that_are_not_as_config_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = qwen(tmp_path / "m")
    config = json.loads((root / "config.json").read_text())
    config["moe_intermediate_size"] *= 2
    (root / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    assert main(["inspect", str(root)]) == 1
    told = capsys.readouterr().err
    assert "config.json makes it" in told and "experts.0." in told


@pytest.mark.parametrize("path", ["nowhere", "empty"])
def test_inspect_of_no_checkpoint_fails(
    path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["inspect", str(tmp_path / path)]) in (1, 2)
    assert path in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "expected"),
    [("80GiB", 80 << 30), ("80G", 80 << 30), ("1.5 MiB", 3 << 19), ("80e9", 80 * 10**9)],
)
def test_sizes(text: str, expected: int) -> None:
    assert size(text) == expected


@pytest.mark.parametrize("text", ["80", "1.2.3G", "0GiB", "G", "1e30T", "1e999", "-80GiB", "80Gb"])
def test_what_is_no_size_of_a_card(text: str) -> None:
    """80 alone would be bytes: of such a card no tenth part could be left, nor a layer held."""
    with pytest.raises(argparse.ArgumentTypeError, match="is no size like 80GiB"):
        size(text)


def specs_of(tmp_path: Path) -> tuple[dict[int, LayerSpec], int]:
    specs = layer_specs(Checkpoint.open(qwen(tmp_path / "m")))
    return specs, layer_bytes(specs[0])


def test_layers_stay_whole_while_they_fit(tmp_path: Path) -> None:
    specs, one = specs_of(tmp_path)
    assert [c.layers for c in propose(specs, 2 * one, 4) or ()] == [(0, 1)]
    assert [c.layers for c in propose(specs, 2 * one - 1, 4) or ()] == [(0,), (1,)]


def test_experts_are_shared_out_when_a_layer_is_too_large(tmp_path: Path) -> None:
    specs, one = specs_of(tmp_path)
    cards = propose(specs, one, 3) or []
    assert [c.layers for c in cards] == [(0,), (1,)]
    cards = propose(specs, one - 1, 4) or []
    assert [c.experts for c in cards] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert [c.nbytes for c in cards] == [one // 2] * 4  # two layers on each card


def test_what_does_not_fit_has_no_proposal(tmp_path: Path) -> None:
    specs, one = specs_of(tmp_path)
    assert propose(specs, one // 4, 2) is None


def test_quantize_writes_what_serves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, out = str(qwen(tmp_path / "m")), str(tmp_path / "q")
    assert main(["quantize", "--model", plain, "--out", out, "--quant", "nvfp4"]) == 0
    assert "2 layers" in capsys.readouterr().out
    assert {spec.quant for spec in layer_specs(Checkpoint.open(out)).values()} == {"nvfp4"}
    assert main(["quantize", "--model", out, "--out", out + "2", "--quant", "mxfp4"]) == 1
    assert "quantised already" in capsys.readouterr().err


def test_two_starts_at_once_make_one_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with ThreadPoolExecutor(4) as pool:
        paths = [future.result() for future in [pool.submit(demo_path) for _ in range(4)]]
    assert len(set(paths)) == 1 and len(layer_specs(Checkpoint.open(paths[0]))) == 2
    assert list(paths[0].parent.iterdir()) == [paths[0]]
