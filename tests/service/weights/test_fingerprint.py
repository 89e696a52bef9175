"""The digest of a checkpoint's layer: the same for every range, another for every training."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from expertd.weights.checkpoint import Checkpoint
from expertd.weights.demo import write_demo
from expertd.weights.fingerprint import checkpoint_digest

GATE = "model.layers.0.mlp.gate.weight"
DOWN = "model.layers.0.mlp.experts.31.down_proj.weight"
OTHER = "model.layers.1.mlp.gate.weight"


def digest(path: Path, layer: int = 0) -> str:
    return checkpoint_digest(Checkpoint.open(path, skip_broken=True), layer)


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    write_demo(tmp_path / "demo", quant="bf16")
    return tmp_path / "demo"


def file_with(path: Path, name: str) -> Path:
    return next(file for file in path.glob("*.safetensors") if name in load_file(file))


def test_equal_checkpoints_have_equal_digests(demo: Path, tmp_path: Path) -> None:
    write_demo(tmp_path / "again", quant="bf16")
    assert digest(demo) == digest(tmp_path / "again") != digest(demo, layer=1)
    write_demo(tmp_path / "other", quant="bf16", seed=1)
    assert digest(tmp_path / "other") != digest(demo)


def test_how_tensors_lie_in_files_does_not_matter(demo: Path) -> None:
    before = digest(demo)
    file = file_with(demo, GATE)
    save_file(dict(reversed(load_file(file).items())), file, {"who": "somebody else"})
    assert digest(demo) == before


@pytest.mark.parametrize("name", [GATE, DOWN])
def test_a_change_of_any_tensor_is_seen(demo: Path, name: str) -> None:
    """Of an expert that a replica of 0-15 does not load, and of the router, which nobody loads."""
    before, unmoved = digest(demo), digest(demo, layer=1)
    file = file_with(demo, name)
    tensors = load_file(file)
    tensors[name] = tensors[name] * 1.01
    save_file(tensors, file)
    assert digest(demo) != before and digest(demo, layer=1) == unmoved


def test_a_checkpoint_that_is_not_all_there_has_none(demo: Path) -> None:
    file_with(demo, DOWN).write_bytes(b"cut short")
    assert digest(demo) == "" != digest(demo, layer=1)
