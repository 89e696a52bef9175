"""FlashInfer's directories, fabricated: where it keeps modules and kernels."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from expertd.backends.flashinfer import modules

BMM = "0a1b2c/batched_gemm-1-2"


@dataclass(frozen=True)
class Home:
    """A machine's FlashInfer: nothing is built and nothing downloaded until a test says so."""

    root: Path

    def built(self, name: str, where: str = "jit") -> Path:
        """A module of that name, ahead of time or by FlashInfer itself."""
        return written(self.root / where / name / f"{name}.so", b"module")

    def published(self, names: tuple[str, ...]) -> str:
        """Kernels and the list of them, as FlashInfer lays them out; the list's own hash."""
        lines = [f"{digest(name.encode())} {name}" for name in names]
        text = "".join(f"{line}\n" for line in lines).encode()
        for name in names:
            written(self.root / "cubins" / BMM / name, name.encode())
        written(self.root / "cubins" / BMM / "checksums.txt", text)
        return digest(text)


def written(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Home:
    """An empty one, which FlashInfer's own variables point to; ninja is there and content."""
    from tests.service.trtllm import flashinfer_cpu

    assert flashinfer_cpu  # FlashInfer is imported with a workspace of its own
    monkeypatch.setattr("flashinfer.jit.env.FLASHINFER_AOT_DIR", tmp_path / "aot")
    monkeypatch.setattr("flashinfer.jit.env.FLASHINFER_JIT_DIR", tmp_path / "jit")
    monkeypatch.setattr("flashinfer.jit.env.FLASHINFER_CUBIN_DIR", tmp_path / "cubins")
    monkeypatch.setattr("flashinfer.artifacts.ArtifactPath.TRTLLM_GEN_BMM", f"{BMM}/")
    monkeypatch.delenv("FLASHINFER_DISABLE_JIT", raising=False)
    monkeypatch.setattr(modules, "_up_to_date", lambda name, built_ns: True)
    tools = written(tmp_path / "bin" / "ninja", b"#!/bin/sh\n")
    tools.chmod(0o755)
    monkeypatch.setenv("PATH", str(tools.parent))
    return Home(tmp_path)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """An NVIDIA card whose kind a test may change."""
    kind = SimpleNamespace(capability=(10, 0), multi_processor_count=148)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: kind.capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: kind)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA B200 / test")
    return kind
