"""What is wrong in a layer is refused by name; loading takes little memory; digests differ."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.processes import assert_runs
from tests.service.weights.files import (
    EXPERTS,
    HIDDEN,
    INT4_PARTS,
    NVFP4_PARTS,
    PLAIN_PARTS,
    WIDTH,
    edit_json,
    edit_tensors,
    large,
    qwen,
    qwen_layer,
)
from tests.service.weights.stored import compressed, modelopt
from tests.service.weights.test_formats import write

from expertd.core import LayerSpec
from expertd.errors import ExpertdError, FailedPrecondition, InvalidArgument, NotFound
from expertd.weights import reader
from expertd.weights.checkpoint import Checkpoint
from expertd.weights.digest import weights_digest
from expertd.weights.layers import layer_specs
from expertd.weights.load import _stream_of_its_own, load_layer

FIRST = "model-00001-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
UP = "model.layers.0.mlp.experts.2.up_proj.weight"
SCALE = "model.layers.0.mlp.experts.2.up_proj.weight_scale_inv"
Tensors = dict[str, torch.Tensor]


def load(root: Path, layer: int = 0) -> Any:
    checkpoint = Checkpoint.open(root)
    return load_layer(checkpoint, layer, layer_specs(checkpoint)[layer], "cpu")


def quantized(root: Path) -> Path:
    """The two layers in fp8 blocks, zeros with scales of one."""
    qwen(root, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    for number, name in enumerate((FIRST, FIRST.replace("00001", "00002", 1))):
        tensors: Tensors = {}
        for key, w in qwen_layer(number, 1).items():
            tensors[key] = torch.zeros(w.shape).to(torch.float8_e4m3fn)
            tensors[f"{key}_scale_inv"] = torch.ones(w.shape[0] // 128, w.shape[1] // 128)
        edit_tensors(root / name, lambda held, new=tensors: held.update(new))
        edit_json(
            root / INDEX,
            lambda i, file=name, new=tensors: i["weight_map"].update(dict.fromkeys(new, file)),
        )
    return root


def drop(name: str) -> Callable[[Path], object]:
    return lambda root: edit_json(root / INDEX, lambda index: index["weight_map"].pop(name))


def put(name: str, tensor: torch.Tensor) -> Callable[[Path], object]:
    return lambda root: edit_tensors(root / FIRST, lambda held: held.update({name: tensor}))


def scales(value: float) -> torch.Tensor:
    return torch.full((WIDTH // 128, HIDDEN // 128), value)


def config(**changes: Any) -> Callable[[Path], object]:
    return lambda root: edit_json(root / "config.json", lambda held: held.update(changes))


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing weight": (drop(UP), UP),
    "missing scale": (drop(SCALE), SCALE),
    "width against config": (config(moe_intermediate_size=64), rf"{FIRST}.*\[64, 256\]"),
    "hidden against config": (config(hidden_size=512), rf"{FIRST}.*512"),
    "more experts than there are": (config(num_experts=5), "experts.4.up_proj.weight' is missing"),
    "weight of another dtype": (
        put(UP, torch.zeros(WIDTH, HIDDEN).bfloat16()),
        f"{FIRST}.*{UP}.*BF16.*F8_E4M3",
    ),
    "scale of another shape": (put(SCALE, torch.ones(3, 3)), rf"{FIRST}.*{SCALE}.*\[3, 3\]"),
    "scale of another kind": (put(SCALE, torch.ones(1, 2, dtype=torch.int32)), f"{SCALE}.*I32"),
    "NaN scale": (put(SCALE, scales(float("nan"))), f"{FIRST}.*{SCALE}.*NaN"),
    "infinite scale": (put(SCALE, scales(float("inf"))), f"{FIRST}.*{SCALE}.*NaN"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_layer_is_refused_by_name_and_the_other_loads(case: str, tmp_path: Path) -> None:
    spoil, text = WRONG[case]
    root = quantized(tmp_path / "m")
    load(root)
    spoil(root)
    with pytest.raises(FailedPrecondition, match=text):
        load(root)
    if not case.endswith(("config", "there are")):
        load(root, 1)


def test_a_model_without_its_correction_bias_is_refused(tmp_path: Path) -> None:
    root = qwen(tmp_path / "m", model_type="minimax_m2", n_routed_experts=EXPERTS)
    with pytest.raises(ExpertdError, match="layers.N.block_sparse_moe.experts"):
        load(root)
    root = qwen(tmp_path / "n", model_type="deepseek_v3", n_group=2, topk_group=1)
    with pytest.raises(FailedPrecondition, match="e_score_correction_bias' is missing"):
        load(root)


def test_a_file_cut_while_it_is_served_is_noticed(tmp_path: Path) -> None:
    root = qwen(tmp_path / "m")
    checkpoint = Checkpoint.open(root)
    spec = layer_specs(checkpoint)[0]
    with open(root / FIRST, "r+b") as file:
        file.truncate(4096)
    with pytest.raises(FailedPrecondition, match=FIRST):
        load_layer(checkpoint, 0, spec, "cpu")


def test_blocks_that_straddle_gate_and_up_are_refused(tmp_path: Path) -> None:
    """A fused tensor of 2 x 192 rows has three rows of scales: the middle one is nobody's own."""
    root = tmp_path / "m"
    qwen(
        root,
        moe_intermediate_size=192,
        quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]},
    )
    e4m3 = torch.float8_e4m3fn
    fused = {
        "gate_up_proj": torch.zeros(EXPERTS, 384, HIDDEN).to(e4m3),
        "gate_up_proj_scale_inv": torch.ones(EXPERTS, 3, 2),
        "down_proj": torch.zeros(EXPERTS, HIDDEN, 192).to(e4m3),
        "down_proj_scale_inv": torch.ones(EXPERTS, 2, 2),
    }
    tensors = {f"model.layers.0.mlp.experts.{name}": t for name, t in fused.items()}
    for name in qwen_layer(0, 1):
        drop(name)(root)
    edit_tensors(root / FIRST, lambda held: (held.clear(), held.update(tensors)))
    edit_json(root / INDEX, lambda i: i["weight_map"].update(dict.fromkeys(tensors, FIRST)))
    with pytest.raises(FailedPrecondition, match="gate_up_proj_scale_inv.*share a scale"):
        load(root)


def test_input_scales_of_some_experts_only_are_refused(tmp_path: Path) -> None:
    from tests.service.weights.stored import modelopt, nvfp4

    calls = iter(range(1000))

    def writer(w: Any) -> Any:
        parts, meant = nvfp4(w)
        if next(calls) == 5:
            del parts["input_scale"]
        return parts, meant

    checkpoint, _ = write(tmp_path / "m", {0: writer}, modelopt("NVFP4"))
    with pytest.raises(FailedPrecondition, match="only some experts have input"):
        load_layer(checkpoint, 0, layer_specs(checkpoint)[0], "cpu")


@pytest.mark.parametrize(
    ("experts", "layers", "kind"),
    [((0, 5), None, InvalidArgument), ((2, 2), None, InvalidArgument), (None, {7}, NotFound)],
)
def test_what_is_not_there_is_the_callers_mistake(
    experts: Any, layers: Any, kind: type[ExpertdError], tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(qwen(tmp_path / "m"))
    with pytest.raises(kind, match="0-"):
        layer_specs(checkpoint, layers, experts)


def test_layers_behind_the_stack_are_loaded_only_when_asked_for(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(qwen(tmp_path / "m", num_hidden_layers=1))
    assert list(layer_specs(checkpoint)) == [0]
    assert list(layer_specs(checkpoint, {1})) == [1]


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_staging_is_reused_without_mixing_experts(
    slots: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expert = 3 * WIDTH * HIDDEN * 2
    monkeypatch.setattr(reader, "STAGING_BYTES", slots * expert)
    monkeypatch.setattr(reader, "CHUNK_BYTES", 1000)
    weights, _ = load(qwen(tmp_path / "m"))
    written = qwen_layer(0, 10)
    for e in range(EXPERTS):
        up, gate, down = (
            written[f"model.layers.0.mlp.experts.{e}.{name}.weight"]
            for name in ("up_proj", "gate_proj", "down_proj")
        )
        assert torch.equal(weights.w13[e], torch.cat([up, gate]))
        assert torch.equal(weights.w2[e], down)


def test_progress_adds_up_to_the_layer(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(qwen(tmp_path / "m"))
    seen: list[int] = []
    weights, _ = load_layer(checkpoint, 0, layer_specs(checkpoint)[0], "cpu", progress=seen.append)
    assert sum(seen) == weights.nbytes and len(seen) == EXPERTS


FORMS: dict[str, tuple[int, Any, dict[str, Any]]] = {
    "bf16": (64, PLAIN_PARTS, {}),
    "nvfp4": (192, NVFP4_PARTS, {"quantization_config": modelopt("NVFP4")}),
    "int4 words": (
        192,
        INT4_PARTS,
        {
            "quantization_config": compressed(
                num_bits=4, type="int", strategy="group", group_size=32
            )
        },
    ),
}
"""Experts, parts and config of layers of some 500 MB."""


@pytest.mark.parametrize("form", FORMS)
def test_loading_takes_the_layer_and_little_more(form: str, tmp_path: Path) -> None:
    """A layer of 500 MB through 64 MiB of staging: the peak of anonymous memory says so."""
    experts, parts, declared = FORMS[form]
    code = f"""
import torch
from pathlib import Path
from expertd.weights import reader
from expertd.weights.checkpoint import Checkpoint
from expertd.weights.layers import layer_specs
from expertd.weights.load import _stream_of_its_own, load_layer
reader.STAGING_BYTES = 64 << 20
checkpoint = Checkpoint.open(Path({str(tmp_path / "m")!r}))
spec = layer_specs(checkpoint)[0]
def anonymous():
    lines = Path('/proc/self/status').read_text().splitlines()
    return sum(int(l.split()[1]) for l in lines if l.startswith(('RssAnon', 'RssShmem')))
peak = before = anonymous()
def look(_):
    global peak
    peak = max(peak, anonymous())
weights, _ = load_layer(checkpoint, 0, spec, 'cpu', look)
extra = (peak - before) * 1024 - weights.nbytes
assert weights.nbytes > 400 << 20 and extra < 80 << 20, (weights.nbytes, extra)
"""
    large(tmp_path / "m", experts, parts, **declared)
    assert_runs(code)


def test_the_digest_sees_every_byte_and_their_order(tmp_path: Path) -> None:
    weights, _ = load(qwen(tmp_path / "m"))
    digest = weights_digest(weights)
    assert digest == weights_digest(load(tmp_path / "m")[0])
    for change in (
        lambda w: w[3, -1, -1].view(torch.int16).bitwise_xor_(1),
        lambda w: w.copy_(w.flip(0)),
        lambda w: w[0].copy_(w[0].roll(1, 0)),
    ):
        changed = replace(weights, w13=weights.w13.clone())
        change(changed.w13)
        assert weights_digest(changed) != digest
    assert weights_digest(weights, torch.zeros(EXPERTS)) != digest


def test_the_digest_is_a_published_number(tmp_path: Path) -> None:
    """It is compared between servers of different versions: a change of it is a break."""
    weights, _ = load(qwen(tmp_path / "m"))
    zeros = replace(weights, w13=torch.zeros_like(weights.w13), w2=torch.ones_like(weights.w2))
    assert weights_digest(zeros).startswith(PUBLISHED)


PUBLISHED = "0a504128cbaf3f67"


def test_specs_say_what_the_config_says(tmp_path: Path) -> None:
    spec = layer_specs(Checkpoint.open(qwen(tmp_path / "m")), {1}, (1, 3))[1]
    assert isinstance(spec, LayerSpec)
    assert (spec.hidden, spec.intermediate, spec.num_experts) == (HIDDEN, WIDTH, EXPERTS)
    assert (spec.expert_begin, spec.expert_end, spec.quant) == (1, 3, "bf16")
    assert spec.routing is not None and spec.routing.method == "RenormalizeNaive"


def test_a_load_waits_for_whoever_had_its_memory_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a card a call's memory is free while its kernels still run, for its own stream only."""
    told: list[str] = []

    class Side:
        def wait_stream(self, other: str) -> None:
            told.append(f"waits for {other}")

        def synchronize(self) -> None:
            told.append("is done")

        def __enter__(self) -> None:
            told.append("begins")

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(torch, "Stream", lambda device: Side())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the calls'")
    with _stream_of_its_own(torch.device("cuda:0")):
        pass
    assert told == ["waits for the calls'", "begins", "is done"]
    told.clear()
    with pytest.raises(FailedPrecondition), _stream_of_its_own(torch.device("cuda:0")):
        raise FailedPrecondition("a tensor is missing")
    assert told[-1] == "is done", "else its copies would be written where calls now compute"
