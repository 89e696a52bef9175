"""What is not a sound checkpoint is refused by name of file and tensor; bytes are read exactly."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.processes import assert_runs
from tests.service.weights.files import edit_header, edit_json, edit_tensors, qwen, qwen_layer

from expertd.errors import ExpertdError, FailedPrecondition, InvalidArgument
from expertd.weights.checkpoint import Checkpoint

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
A_TENSOR = "model.layers.0.mlp.experts.2.up_proj.weight"


def test_reads_rows_exactly(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(qwen(tmp_path / "m"))
    expected = qwen_layer(0, 10)[A_TENSOR]
    assert torch.equal(checkpoint.read(A_TENSOR), expected)
    assert torch.equal(checkpoint.read(A_TENSOR, 3, 77), expected[3:77])
    assert checkpoint.read(A_TENSOR, 5, 5).shape == (0, expected.shape[1])
    for begin, end in ((-1, 3), (4, 3), (0, 129)):
        with pytest.raises(InvalidArgument, match="rows"):
            checkpoint.read(A_TENSOR, begin, end)


def test_reads_scalars_and_every_dtype(tmp_path: Path) -> None:
    values = torch.tensor([0, 1, 130, 127], dtype=torch.uint8)
    tensors = {
        "scalar": torch.tensor(2.5),
        "fp8": torch.tensor([1.0, -448.0]).to(torch.float8_e4m3fn),
        "e8m0": values.view(torch.float8_e8m0fnu),
        "half": torch.tensor([[1.5]], dtype=torch.float16),
        "int": torch.tensor([-7], dtype=torch.int32),
        "rank 5": torch.ones(2, 1, 1, 2, 1),
    }
    root = qwen(tmp_path / "m")
    edit_tensors(root / FIRST, lambda held: held.update(tensors))
    edit_json(root / INDEX, lambda i: i["weight_map"].update(dict.fromkeys(tensors, FIRST)))
    checkpoint = Checkpoint.open(root)
    for name, tensor in tensors.items():
        got = checkpoint.read(name)
        assert got.shape == tensor.shape
        assert torch.equal(got[None].view(torch.uint8), tensor[None].view(torch.uint8))
    assert torch.equal(checkpoint.read("e8m0"), values)


def test_single_file_without_index(tmp_path: Path) -> None:
    root = qwen(tmp_path / "m")
    (root / INDEX).unlink()
    (root / SECOND).unlink()
    (root / FIRST).rename(root / "model.safetensors")
    assert A_TENSOR in Checkpoint.open(root).tensors


def test_links_within_the_hugging_face_cache_are_followed(tmp_path: Path) -> None:
    snapshot = qwen(tmp_path / "models--x" / "snapshots" / "revision")
    blobs = tmp_path / "models--x" / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(Path("../../blobs") / str(number))
    assert A_TENSOR in Checkpoint.open(snapshot).tensors


def truncate(root: Path) -> None:
    os.truncate(root / FIRST, (root / FIRST).stat().st_size - 1)


def link_out(root: Path) -> None:
    (root / FIRST).rename(root.parent / "elsewhere")
    (root / FIRST).symlink_to("../elsewhere")


def fifo(root: Path) -> None:
    (root / FIRST).unlink()
    os.mkfifo(root / FIRST)


def pickles_only(root: Path) -> None:
    for name in (FIRST, SECOND, INDEX):
        (root / name).unlink()
    (root / "pytorch_model.bin").write_bytes(b"\x80\x04")


def swallow_index(change: Callable[[dict[str, str]], object]) -> Callable[[Path], None]:
    return lambda root: edit_json(root / INDEX, lambda index: change(index["weight_map"]))


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, FIRST),
    "header length": (lambda root: (root / FIRST).write_bytes(b"\xff" * 64), FIRST),
    "empty file": (lambda root: (root / FIRST).write_bytes(b""), FIRST),
    "header not JSON": (lambda root: (root / FIRST).write_bytes(b"\2" + b"\0" * 7 + b"{]"), FIRST),
    "offsets outside": (
        lambda root: edit_header(
            root / FIRST, lambda h: h[A_TENSOR].update(data_offsets=[1 << 40, (1 << 40) + 65536])
        ),
        FIRST,
    ),
    "shape against bytes": (
        lambda root: edit_header(root / FIRST, lambda h: h[A_TENSOR].update(shape=[9, 9])),
        A_TENSOR,
    ),
    "unknown dtype": (
        lambda root: edit_header(root / FIRST, lambda h: h[A_TENSOR].update(dtype="X9")),
        A_TENSOR,
    ),
    "shard missing": (lambda root: (root / SECOND).unlink(), SECOND),
    "tensor not in its file": (
        lambda root: edit_tensors(root / FIRST, lambda t: t.pop(A_TENSOR)),
        f"{FIRST}.*{A_TENSOR}",
    ),
    "index leads out": (
        swallow_index(lambda files: files.update({A_TENSOR: "../../etc/passwd"})),
        "outside the checkpoint directory",
    ),
    "absolute index": (
        swallow_index(lambda files: files.update({A_TENSOR: "/etc/passwd"})),
        "outside the checkpoint directory",
    ),
    "link leads out": (link_out, "outside the checkpoint directory"),
    "not a file": (fifo, "not a regular file"),
    "index without map": (
        lambda root: edit_json(root / INDEX, lambda i: i.pop("weight_map")),
        "weight_map",
    ),
    "index of numbers": (swallow_index(lambda files: files.update({A_TENSOR: 3})), A_TENSOR),
    "index not JSON": (lambda root: (root / INDEX).write_text("{"), INDEX),
    "config not an object": (lambda root: (root / "config.json").write_text("[]"), "config.json"),
    "config missing": (lambda root: (root / "config.json").unlink(), "config.json"),
    "pickles": (pickles_only, "only safetensors and JSON are read"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoints_are_refused_by_name(tmp_path: Path, case: str) -> None:
    spoil, names = BROKEN[case]
    root = qwen(tmp_path / "m")
    Checkpoint.open(root)
    spoil(root)
    with pytest.raises(FailedPrecondition, match=names):
        Checkpoint.open(root)


@pytest.mark.parametrize("path", ["nowhere", "m/config.json"])
def test_what_is_no_directory_is_the_callers_mistake(tmp_path: Path, path: str) -> None:
    qwen(tmp_path / "m")
    with pytest.raises(InvalidArgument, match="directory"):
        Checkpoint.open(tmp_path / path)


def test_a_file_that_changes_under_us_is_noticed(tmp_path: Path) -> None:
    root = qwen(tmp_path / "m")
    checkpoint = Checkpoint.open(root)
    edit_tensors(root / FIRST, lambda t: t[A_TENSOR].zero_())
    with pytest.raises(FailedPrecondition, match=f"{FIRST}.*changed"):
        checkpoint.read(A_TENSOR)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExpertdError, match="'no.such'"):
        Checkpoint.open(qwen(tmp_path / "m")).read("no.such")


def test_headers_are_read_without_torch(tmp_path: Path) -> None:
    root = qwen(tmp_path / "m")
    code = (
        "import sys; from expertd.weights.checkpoint import Checkpoint; "
        "from expertd.weights.layers import layer_specs; "
        f"assert len(layer_specs(Checkpoint.open({str(root)!r}))) == 2; "
        "assert 'torch' not in sys.modules"
    )
    assert_runs(code)
