"""On a card of any kind: scales as FlashInfer's kernel swizzles them, and nothing ever waits.

The entries themselves need SM100; here a recording stands in for them.
"""

from __future__ import annotations

import ctypes
import inspect
import shutil
import subprocess
from collections.abc import Callable, Iterator
from enum import IntEnum
from importlib import util
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.service.trtllm.layers import ACTIVATIONS, layer, raw, with_inputs
from tests.service.trtllm.recording import Recording
from tests.strategies import generator, random_weights
from torch import Tensor

from expertd.backends.base import Backend
from expertd.backends.flashinfer import tuning
from expertd.backends.flashinfer.library import stand_in
from expertd.backends.flashinfer_trtllm import backend as trtllm
from expertd.backends.flashinfer_trtllm.pad import Sizes
from expertd.backends.flashinfer_trtllm.permute import shuffled, take_rows
from expertd.backends.flashinfer_trtllm.swizzle import swizzle
from expertd.backends.flashinfer_trtllm.weights import native
from expertd.capability.library import recorded, recorded_versions
from expertd.capability.row import Row
from expertd.capability.rows.flashinfer_trtllm import ROWS
from expertd.core import ActivationKind
from expertd.weights.canonical import ExpertWeights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA card"),
]
CARD = torch.device("cuda:0")
CASES = [
    pytest.param(row, kind, id=f"{row.entry}-{row.activation_quant}-{row.quants[0]}-{kind}")
    for row in ROWS
    for kind in row.activations
]


class Recorded:
    """The newest recorded FlashInfer as an object with its names, where none is installed."""

    def __init__(self) -> None:
        self._library = recorded(recorded_versions()[-1])

    def __getattr__(self, name: str) -> Any:
        if name == "SfLayout":
            return IntEnum(name, {"layout_128x4": 0, "layout_8x4": 1, "layout_linear": 2})
        if not name.startswith("trtllm_"):
            return IntEnum(name, dict(self._library.members(name)))

        def entry(**_: Any) -> None:
            raise AssertionError("only its signature is used")

        names = sorted(self._library.functions[name].names)
        kind = inspect.Parameter.KEYWORD_ONLY
        entry.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [inspect.Parameter(one, kind, default=None) for one in names]
        )
        return entry


@pytest.fixture
def on_card() -> Iterator[Recording]:
    library = Recording(Recorded())
    stand_in(library)
    yield library
    stand_in(None)


@pytest.fixture(scope="module")
def interleave(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Tensor], Tensor]:
    """FlashInfer's kernel from the installed sources, built by nvcc."""
    found, nvcc = util.find_spec("flashinfer"), shutil.which("nvcc")
    if found is None or not found.submodule_search_locations or nvcc is None:
        pytest.skip("needs FlashInfer's sources and nvcc")
    data = Path(found.submodule_search_locations[0]) / "data"
    source = data / "csrc" / "nv_internal"
    common = ("envUtils.cpp", "logger.cpp", "stringUtils.cpp", "tllmException.cpp")
    includes = (source, source / "include", data / "include", data / "cutlass" / "include")
    built = tmp_path_factory.mktemp("interleave") / "interleave.so"
    command = [
        *(nvcc, "-O2", "-std=c++17", "-shared", "-Xcompiler", "-fPIC", "-arch=native"),
        *("-DENABLE_BF16", "-DENABLE_FP8", "-DENABLE_FP4", "--expt-relaxed-constexpr", "-lcuda"),
        *(f"-I{path}" for path in includes),
        str(Path(__file__).with_name("interleave.cu")),
        str(source / "cpp" / "kernels" / "quantization.cu"),
        str(source / "cpp" / "common" / "memoryUtils.cu"),
        *(str(source / "cpp" / "common" / name) for name in common),
        *("-o", str(built)),
    ]
    subprocess.run(command, check=True, capture_output=True)
    library = ctypes.CDLL(str(built))

    def run(scales: Tensor) -> Tensor:
        out = torch.zeros_like(scales)
        function = getattr(library, "interleave_" + str(scales.dtype).removeprefix("torch."))
        function(*scales.shape, *(ctypes.c_void_p(t.data_ptr()) for t in (scales, out)))
        torch.cuda.synchronize()
        return out

    return run


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns"), [(128, 4), (384, 8), (2944, 92), (4096, 224)])
def test_scales_are_swizzled_as_on_the_card(
    interleave: Callable[[Tensor], Tensor], dtype: torch.dtype, rows: int, columns: int
) -> None:
    scales = torch.randint(0, 250, (3, rows, columns), device=CARD).to(dtype)
    assert torch.equal(raw(swizzle(scales)), raw(interleave(scales)))
    # shuffle_matrix_sf_a is this kernel on shuffled rows.
    ordered = take_rows(scales, shuffled(rows))
    assert torch.equal(raw(swizzle(ordered)), raw(interleave(ordered)))


def prepared(row: Row, kind: ActivationKind) -> Backend:
    """A backend on the card whose weights were compared with those that the CPU prepares."""
    spec = layer(
        row.quants[0],
        intermediate=192,
        activation=ACTIVATIONS[kind],
        expert_bias=row.expert_bias,
    )
    random = generator(61)
    here = with_inputs(random_weights(spec, random), random)
    there = ExpertWeights(here.quant, **{n: t.to(CARD) for n, t in here.tensors.items()})
    sizes = Sizes(spec.hidden, spec.intermediate, *row.padded(spec))
    expected = native(here, spec, sizes).arguments
    for name, found in native(there, spec, sizes).arguments.items():
        assert same(found, expected[name]), name
    backend: Backend = getattr(trtllm, row.load.partition(":")[2])(row, spec, CARD)
    assert backend.check() == ()
    backend.prepare_weights(there, None)
    backend.warm_up((1, 64))
    return backend


def same(found: Tensor | None, expected: Tensor | None) -> bool:
    if found is None or expected is None:
        return found is expected
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    if found.dtype == torch.float32:  # quotients, which a card rounds otherwise
        return torch.allclose(found.cpu(), expected, rtol=3e-7, atol=0)
    return torch.equal(raw(found.cpu()), raw(expected))


# torch itself calls the mode a prototype, once.
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
@pytest.mark.parametrize(("row", "kind"), CASES)
def test_a_call_waits_for_nothing_and_can_be_captured(
    on_card: Recording, row: Row, kind: ActivationKind
) -> None:
    backend = prepared(row, kind)
    batch = tuning.probe(row, backend.spec, 37, CARD)
    torch.cuda.set_sync_debug_mode("error")
    try:
        backend.forward(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        backend.forward(batch)
    graph.replay()
    torch.cuda.synchronize()
    tensors = [value for value in on_card.last.values() if isinstance(value, Tensor)]
    assert all(tensor.device == CARD for tensor in tensors)
