"""What is wrong with a layer fails that layer by name, and the others are served."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.e2e.local import Local
from tests.e2e.servers import PORTS, expertd, in_process
from tests.service.weights.files import HIDDEN, edit_json, edit_tensors, qwen
from tests.waiting import until

from expertd.engine.resident import LayerState
from expertd.weights.checkpoint import Checkpoint
from expertd.weights.layers import layer_specs
from expertd_client import Client

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"
DOWN = "model.layers.1.mlp.experts.3.down_proj.weight"
MIXED = {
    "quant_method": "modelopt",
    "quant_algo": "MIXED_PRECISION",
    "quantized_layers": {"model.layers.1.mlp.experts*": {"quant_algo": "W4A8_AWQ"}},
}


def truncated(root: Path) -> None:
    os.truncate(root / SHARDS[1], (root / SHARDS[1]).stat().st_size - 1)


def led_out(root: Path) -> None:
    (root / SHARDS[1]).rename(root.parent / "elsewhere")
    (root / SHARDS[1]).symlink_to("../elsewhere")


def pickled(root: Path) -> None:
    (root / SHARDS[1]).write_bytes(b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x02os")


def put(tensor: torch.Tensor) -> Callable[[Path], object]:
    return lambda root: edit_tensors(root / SHARDS[1], lambda held: held.update({DOWN: tensor}))


def index(file: str, name: str = DOWN) -> Callable[[Path], object]:
    return lambda root: edit_json(
        root / INDEX, lambda index: index["weight_map"].update({name: file})
    )


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "a quantisation that nothing reads": (
        lambda root: edit_json(
            root / "config.json", lambda config: config.update(quantization_config=MIXED)
        ),
        "config.json: quant_algo 'W4A8_AWQ' cannot be read; readable: FP8, ",
    ),
    "another dtype than the config declares": (
        lambda root: edit_json(
            root / "config.json",
            lambda config: config.update(
                quantization_config=MIXED
                | {"quantized_layers": {"model.layers.1.mlp*": {"quant_algo": "NVFP4"}}}
            ),
        ),
        f"{SHARDS[1]}: tensor 'model.layers.1.*is BF16.*; ModelOpt nvfp4.* has U8",
    ),
    "a truncated shard": (truncated, SHARDS[1]),
    "a shard that is not there": (lambda root: (root / SHARDS[1]).unlink(), SHARDS[1]),
    "a router in a shard that is not there": (
        index("model-00003-of-00002.safetensors", "model.layers.1.mlp.gate.weight"),
        "model-00003-of-00002.safetensors: No such file",
    ),
    "a pickle in place of a shard": (pickled, SHARDS[1]),
    "a link that leads out": (led_out, f"{SHARDS[1]}: leads to .*outside the checkpoint"),
    "an index that leads out": (index("../../secret"), "leads to .*outside the checkpoint"),
    "a tensor that is not in its file": (
        lambda root: edit_tensors(root / SHARDS[1], lambda held: held.pop(DOWN)),
        f"{SHARDS[1]}: tensor {DOWN!r} is missing",
    ),
    "a shape against the config": (put(torch.zeros(3, 3).bfloat16()), f"{DOWN!r}.*\\[3, 3\\]"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_layer_fails_by_name_and_the_other_is_served(case: str, tmp_path: Path) -> None:
    spoil, words = BAD[case]
    root = qwen(tmp_path / "m")
    spoil(root)
    with in_process("--model", f"m={root}") as (app, addresses):
        assert not app.wait_ready()
        local = Local(app, addresses)
        until(lambda: app.residents.get("m", 0).state is LayerState.READY)
        fields: dict[str, Any] = {
            "model": "m",
            "hidden_states": torch.ones(2, HIDDEN),
            "topk_ids": torch.tensor([[0, 1], [2, 3]], dtype=torch.int32),
            "topk_weights": torch.ones(2, 2),
        }
        assert local.ask("grpc", **fields).code == "OK"
        answer = local.ask("grpc", **fields | {"layer": 1})
        assert answer.reason == "LAYER_FAILED" and re.search(words, answer.message)
        with Client(addresses.grpc) as client:
            good, bad = client.layers("m")
        assert (good.state, bad.state) == ("ready", "failed")
        assert good.plans and not bad.plans and re.search(words, bad.detail)
        held = app.residents.get("m", 1)
        assert held.weights is None and held.backends == {} and held.nbytes == 0


def test_a_layer_that_is_mended_loads_while_the_other_serves(tmp_path: Path) -> None:
    root = qwen(tmp_path / "m")
    whole = (root / SHARDS[1]).read_bytes()
    truncated(root)
    with in_process("--model", f"m={root}") as (app, addresses):
        assert not app.wait_ready()
        (root / SHARDS[1]).write_bytes(whole)
        app.steward.load("m", [1])
        until(lambda: app.residents.get("m", 1).state is LayerState.READY)
        assert app.residents.get("m", 1).spec == layer_specs(Checkpoint.open(root))[1]


def test_a_model_of_nothing_but_bad_layers_is_refused(home: Path, tmp_path: Path) -> None:
    root = qwen(tmp_path / "m", quantization_config={"quant_method": "awq"})
    ended = expertd(home, "serve", *PORTS, "--model", f"m={root}")
    assert ended.returncode == 1 and ended.stdout == "" and "Traceback" not in ended.stderr
    assert "quant_method 'awq' cannot be read" in ended.stderr


FLAGS_AMISS = {
    "layers": (("--layers", "0,7"), "--layers of model m: .*layer 7 has no routed .*: 0-1"),
    "experts": (("--experts", "2-4"), "experts 2-4 asked, layer 0 has 0-3"),
}


@pytest.mark.parametrize("case", FLAGS_AMISS)
def test_what_the_flags_ask_for_and_is_not_there_exits_2(
    case: str, home: Path, tmp_path: Path
) -> None:
    flags, words = FLAGS_AMISS[case]
    ended = expertd(home, "serve", *PORTS, "--model", f"m={qwen(tmp_path / 'm')}", *flags)
    assert ended.returncode == 2, ended.stderr
    assert re.search(words, ended.stderr) and "Traceback" not in ended.stderr
    assert ended.stdout == ""
