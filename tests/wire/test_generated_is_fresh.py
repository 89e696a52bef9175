"""The committed protobuf code is what the pinned generator makes of the committed .proto."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
V1 = Path("expertd_wire/v1")
GENERATED = ("experts_pb2.py", "experts_pb2.pyi", "experts_pb2_grpc.py")


@pytest.mark.slow
def test_generated_is_fresh(tmp_path: Path) -> None:
    subprocess.run([ROOT / "tools/proto", tmp_path], check=True, timeout=280)
    for name in GENERATED:
        committed = (ROOT / "proto" / V1 / name).read_text()
        assert committed == (tmp_path / V1 / name).read_text(), f"{name}: run tools/proto"


@pytest.mark.parametrize(
    ("package", "name", "stamp"),
    [
        ("protobuf", "experts_pb2.py", r"Protobuf Python Version: (\d+\.\d+)\."),
        ("grpcio", "experts_pb2_grpc.py", r"GRPC_GENERATED_VERSION = '([\d.]+)'"),
    ],
)
def test_the_oldest_accepted_runtime_can_load_the_code(package: str, name: str, stamp: str) -> None:
    found = re.search(stamp, (ROOT / "proto" / V1 / name).read_text())
    assert found
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"{package}>={found[1]}" in project["dependencies"]
