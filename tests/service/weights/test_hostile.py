"""A config with anything anywhere is refused in words or served, and never an exception of ours."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.service.weights.files import EXPERTS, HIDDEN, WIDTH, qwen, qwen_config
from tests.service.weights.stored import FP8, compressed

from expertd.errors import ExpertdError
from expertd.weights.checkpoint import Checkpoint
from expertd.weights.layers import layer_specs
from expertd.weights.load import load_layer

MIXED = {
    "quant_method": "modelopt",
    "quant_algo": "MIXED_PRECISION",
    "quantized_layers": {"model.layers.0.mlp.experts*": {"quant_algo": "NVFP4"}},
    "exclude_modules": ["lm_head"],
}
CONFIGS = (
    qwen_config(),
    qwen_config(quantization_config=FP8 | {"modules_to_not_convert": ["lm_head"]}),
    qwen_config(quantization_config=MIXED),
    qwen_config(quantization_config=compressed(num_bits=4, type="float", strategy="group")),
    {"model_type": "outer", "text_config": qwen_config(swiglu_limit=7.0)},
    qwen_config(
        model_type="deepseek_v4", n_routed_experts=EXPERTS, swiglu_limit=[1.0, 2.0], hidden=HIDDEN
    ),
    qwen_config(model_type="gpt_oss", intermediate_size=WIDTH, swiglu_alpha=1.7),
)
ODD = (None, True, -1, 0, 1 << 70, 1.5, float("nan"), float("inf"), "", "x", "re:(", [], {}, [[]])
ODD += ([None], {"a": {}}, {"__float__": []}, {"__float__": "Infinity"}, ["re:["], "*", ["*"])


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of everything in a JSON value but the whole."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in pairs if isinstance(value, dict | list) else ():
        yield (*path, key)
        if isinstance(inner, dict | list):
            yield from places(inner, (*path, key))


def replaced(config: Any, path: tuple[Any, ...], odd: Any) -> Any:
    config = copy.deepcopy(config)
    holder = config
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = odd
    return config


CASES = [(config, path) for config in CONFIGS for path in places(config)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen(tmp_path_factory.mktemp("hostile") / "m")


@given(st.sampled_from(CASES), st.sampled_from(ODD))
def test_an_odd_value_anywhere(root: Path, case: Any, odd: Any) -> None:
    config, path = case
    (root / "config.json").write_text(json.dumps(replaced(config, path, odd)))
    try:
        checkpoint = Checkpoint.open(root)
        for layer, spec in layer_specs(checkpoint).items():
            load_layer(checkpoint, layer, spec, "cpu")
    except ExpertdError as error:
        assert len(str(error)) > 20
