"""Answers come in kind: numpy for numpy, torch for torch, dtype for dtype."""

from __future__ import annotations

import subprocess
import sys
import warnings

import ml_dtypes
import numpy as np
import pytest
import torch
from tests.clients.servers import echo

from expertd_client import Client, InvalidArgument
from expertd_client import numpy as numpy_kind
from expertd_client import torch as torch_kind
from expertd_client.arrays import kind_of
from expertd_client.transport.in_process import InProcessTransport
from expertd_wire.tensors import DTYPES, to_numpy

SHAPES = [(2, 3), (0, 5), (4,), (), (2, 1, 3)]


@pytest.fixture
def client() -> Client:
    return Client(InProcessTransport(lambda path, request: echo(request)))


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_numpy_in_numpy_out(client: Client, dtype: str, shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(3).integers(0, 100, shape).astype(DTYPES[dtype])
    answer = client.forward("demo", 0, array)
    assert type(answer) is np.ndarray
    assert (answer.dtype, answer.shape) == (array.dtype, shape)
    np.testing.assert_array_equal(answer, array)
    assert answer.flags.writeable
    assert not np.shares_memory(answer, array)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_torch_in_torch_out(client: Client, dtype: str, shape: tuple[int, ...]) -> None:
    tensor = torch.randint(0, 100, shape).to(getattr(torch, dtype))
    answer = client.forward("demo", 0, tensor)
    assert isinstance(answer, torch.Tensor)
    assert (answer.dtype, answer.shape, answer.device) == (tensor.dtype, shape, tensor.device)
    assert torch.equal(answer.float(), tensor.float())
    answer.zero_()
    assert answer.numel() == 0 or answer.data_ptr() != tensor.data_ptr()


def test_numpy_and_torch_agree_on_the_bits_of_bfloat16() -> None:
    values = np.array([1.0, -2.5, 3e38, np.inf, 1e-40], np.float32)
    by_torch = torch_kind.to_wire(torch.from_numpy(values).bfloat16())
    by_numpy = numpy_kind.to_wire(values.astype(ml_dtypes.bfloat16))
    assert by_torch == by_numpy


def test_the_replys_dtype_wins_over_the_rows(client: Client) -> None:
    empty = torch.zeros((0, 4), dtype=torch.bfloat16)
    assert client.forward("demo", 0, empty, reply_dtype="float32").dtype is torch.float32
    assert client.forward("demo", 0, np.zeros((0, 4), np.float16), reply_dtype="int64").dtype == (
        np.int64
    )


def test_kinds_may_be_mixed_and_the_rows_decide(client: Client) -> None:
    rows, weights = np.zeros((2, 3), np.float32), torch.ones((2, 1))
    answer = client.forward(
        "demo", 0, rows, topk_ids=np.ones((2, 1), np.int32), topk_weights=weights
    )
    assert type(answer) is np.ndarray


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6.0).reshape(2, 3).T,
        torch.arange(12.0).reshape(3, 4)[:, ::2],
        torch.ones(1, 3).expand(4, 3),
        torch.ones(2, 3, requires_grad=True),
        torch.nn.Parameter(torch.ones(2, 3)),
        torch.ones(2, 3, requires_grad=True) * 2,
    ],
    ids=["transposed", "strided", "expanded", "with gradient", "parameter", "of a graph"],
)
def test_any_torch_tensor_travels(client: Client, tensor: torch.Tensor) -> None:
    before = tensor.detach().clone()
    answer = client.forward("demo", 0, tensor)
    assert torch.equal(answer, before)
    assert not answer.requires_grad
    assert torch.equal(tensor, before)


def test_a_row_major_tensor_is_not_copied_before_it_is_sent() -> None:
    tensor = torch.zeros(2, 3)
    wire = torch_kind.to_wire(tensor)
    tensor[1, 2] = 7
    assert to_numpy(wire)[1, 2] == 7


def test_inference_mode_and_default_devices_change_nothing(client: Client) -> None:
    with torch.inference_mode(), torch.device("meta"):
        answer = client.forward("demo", 0, torch.ones(2, 3, device="cpu"))
    assert answer.device.type == "cpu"
    assert answer.sum() == 6


@pytest.mark.parametrize("dtype", [torch.float64, torch.bool, torch.complex64, torch.float8_e5m2])
def test_other_torch_dtypes_are_refused(client: Client, dtype: torch.dtype) -> None:
    with pytest.raises(InvalidArgument, match="router_logits: dtype .* cannot travel"):
        client.forward("d", 0, np.ones((1, 2), "f4"), router_logits=torch.zeros(1, 2, dtype=dtype))


def test_a_half_imported_torch_is_no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", type(sys)("torch"))
    assert kind_of("x", np.zeros(1)).__name__ == "expertd_client.numpy"  # type: ignore[attr-defined]


IMPORTS = """
import sys
import numpy as np
import expertd_client
from expertd_client.transport.in_process import InProcessTransport
from expertd_wire.codec import decode_forward_call, encode_forward_reply
from expertd_wire.messages import ForwardReply

def echo(path, request):
    return encode_forward_reply(ForwardReply(output=decode_forward_call(request).hidden_states))

rows = np.ones((2, 3), np.float32)
answer = expertd_client.Client(InProcessTransport(echo)).forward("m", 0, rows)
assert (answer == rows).all()
print(sorted({name.split(".")[0] for name in sys.modules} & {"torch", "expertd", "triton"}))
"""


def test_importing_and_using_the_client_pulls_in_neither_torch_nor_the_server() -> None:
    command = [sys.executable, "-W", "error", "-c", IMPORTS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_no_conversion_warns(client: Client) -> None:
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        client.forward("demo", 0, torch.ones(2, 3))
        client.forward("demo", 0, np.ones((2, 3), np.float32))
    assert warned == []
