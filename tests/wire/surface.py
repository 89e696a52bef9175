"""The wire's surface, one line per field and method.

`python tests/wire/surface.py > tests/wire/surface.txt` records it after an addition.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto

from expertd_wire.v1 import experts_pb2 as pb

RECORD = Path(__file__).with_name("surface.txt")


def surface() -> list[str]:
    """Every message, field and method of the descriptor that is compiled in."""
    file = FileDescriptorProto()
    pb.DESCRIPTOR.CopyToProto(file)
    assert not file.enum_type, "enums are not recorded yet"
    messages = [line for message in file.message_type for line in _message(message, file.package)]
    return messages + [line for service in file.service for line in _service(service, file.package)]


def _message(message: Any, scope: str) -> Iterator[str]:
    name = f"{scope}.{message.name}"
    yield f"message {name}"
    for field in message.field:
        yield f"{name} {field.number} {field.name}: {_type(field)}"
    for inner in message.nested_type:
        yield from _message(inner, name)


def _type(field: Any) -> str:
    scalar = FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()
    name = field.type_name.removeprefix(".") or scalar
    repeated = field.label == FieldDescriptorProto.LABEL_REPEATED
    return "repeated " * repeated + "optional " * field.proto3_optional + name


def _service(service: Any, scope: str) -> Iterator[str]:
    for method in service.method:
        took = "stream " * method.client_streaming + method.input_type
        gave = "stream " * method.server_streaming + method.output_type
        yield f"rpc {scope}.{service.name}.{method.name}({took}) returns ({gave})"


if __name__ == "__main__":
    print("\n".join(surface()))
