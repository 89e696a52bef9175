"""The bytes of an Open Inference Protocol call: one FP16 tensor `hidden_states` of model `echo`."""

from __future__ import annotations

from expertd_wire.varints import LEN, varint

METHOD = "/inference.GRPCInferenceService/ModelInfer"
MODEL = "echo"


def infer(rows: int, columns: int, data: bytes) -> bytes:
    """A ModelInferRequest: model_name = 1, inputs = 5, raw_input_contents = 7."""
    shape = b"".join(map(varint, (rows, columns)))
    tensor = _field(1, b"hidden_states") + _field(2, b"FP16") + _field(3, shape)
    return _field(1, MODEL.encode()) + _field(5, tensor) + _field(7, data)


def _field(number: int, value: bytes) -> bytes:
    return varint(number << 3 | LEN) + varint(len(value)) + value
