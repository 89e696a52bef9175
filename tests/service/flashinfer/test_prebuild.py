"""What is built and fetched for a card: by FlashInfer's own functions, under the names it loads."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.service.flashinfer.conftest import BMM, Home

from expertd.backends.flashinfer import kernels, modules, prebuild
from expertd.capability.device import installed_flashinfer
from expertd.capability.rows.flashinfer_cutlass import ROWS as CUTLASS
from expertd.capability.rows.flashinfer_trtllm import ROWS as TRTLLM
from expertd.cli.prebuild import ARCHS

Saying = list[dict[str, Any]]
TARGETS = {
    "89": (8, "9"),
    "90": (9, "0a"),
    "100": (10, "0a"),
    "103": (10, "3a"),
    "107": (10, "7a"),
    "120": (12, "0f"),
    "121": (12, "1a"),
}


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[[], Saying]:
    return lambda: [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_every_architecture_of_a_row_can_be_prebuilt() -> None:
    rows = {arch.removeprefix("sm") for row in (*CUTLASS, *TRTLLM) for arch in row.archs}
    assert rows == set(modules.CUTLASS) == set(ARCHS) == set(TARGETS)
    assert {arch for row in TRTLLM for arch in row.archs} == {f"sm{n}" for n in modules.TRTLLM}


def test_what_a_card_needs() -> None:
    assert prebuild.wanted(["90"]) == ("trtllm_utils", "fused_moe_90")
    assert prebuild.wanted(["100", "103"]) == (
        "trtllm_utils",
        "fused_moe_trtllm_sm100",
        "fused_moe_100",
        "fused_moe_103",
    )
    assert prebuild.wanted(["80"]) == ()


@pytest.mark.parametrize("name", modules.GENERATORS)
def test_flashinfer_builds_it_under_the_name_that_is_loaded(
    home: Home, card: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """FlashInfer's own function runs; only what it compiles and downloads is left out."""
    from flashinfer.jit import fused_moe, tllm_utils

    generator = modules.GENERATORS[name]
    where, _, function = generator.function.partition(":")
    inspect.signature(getattr(import_module(where), function)).bind(**dict(generator.options))
    for module in (fused_moe, tllm_utils):
        monkeypatch.setattr(
            module, "gen_jit_spec", lambda name, *_, **__: SimpleNamespace(name=name)
        )
    for left_out in ("generate_gemm_operations", "ensure_symlink", "verify_symlinked_headers"):
        monkeypatch.setattr(fused_moe, left_out, lambda *_: None)
    monkeypatch.setattr(fused_moe, "write_filtered_metainfo", lambda *_: None)
    monkeypatch.setattr(fused_moe, "get_meta_hash", lambda *_: "")
    monkeypatch.setattr(fused_moe, "get_artifact", lambda *_: b"content")
    monkeypatch.setattr(fused_moe, "is_cuda_version_at_least", lambda _: True)
    monkeypatch.setattr("flashinfer.compilation_context._nvcc_supports_sm107", lambda: True)
    monkeypatch.setattr("flashinfer.jit.env.FLASHINFER_GEN_SRC_DIR", home.root / "generated")
    context = fused_moe.current_compilation_context
    monkeypatch.setattr(context, "TARGET_CUDA_ARCHS", set(TARGETS.values()))
    card.multi_processor_count = 78 if name == modules.H20 else 132
    assert modules.spec_of(name).name == name


def test_only_what_is_missing_is_built(
    home: Home, monkeypatch: pytest.MonkeyPatch, said: Callable[[], Saying]
) -> None:
    def spec_of(name: str) -> SimpleNamespace:
        def build(*, verbose: bool, need_lock: bool) -> None:
            assert verbose and need_lock
            home.built(name)

        return SimpleNamespace(name=name, build=build)

    monkeypatch.setattr(modules, "spec_of", spec_of)
    names = prebuild.wanted(["90"])
    home.built(names[0])
    assert not prebuild.check(names)
    assert [event["event"] for event in said()] == ["there", "missing"]
    prebuild.make(names)
    assert [event["event"] for event in said()] == ["there", "building", "built"]
    assert prebuild.check(names)


@pytest.fixture
def published(home: Home, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Home:
    """Another directory that holds a complete set, which FlashInfer is told to fetch from."""
    from flashinfer.jit import cubin_loader

    source = Home(tmp_path / "source")
    pin = source.published(("Bmm_one.cubin", "Bmm_two.cubin", "include/flashinferMetaInfo.h"))
    monkeypatch.setattr("flashinfer.artifacts.CheckSumHash.TRTLLM_GEN_BMM", pin)
    monkeypatch.setattr(cubin_loader, "FLASHINFER_CUBINS_REPOSITORY", str(source.root / "cubins"))
    monkeypatch.setattr(cubin_loader, "FLASHINFER_CUBIN_DIR", home.root / "cubins")
    return source


def test_kernels_from_a_local_directory(
    published: Home, home: Home, said: Callable[[], Saying]
) -> None:
    prebuild.fetch()
    assert [event["event"] for event in said()] == ["building", *["fetched"] * 3, "built"]
    assert list(kernels.missing()) == []
    (home.root / "cubins" / BMM / "Bmm_two.cubin").write_bytes(b"damaged")
    prebuild.fetch()
    assert [event.get("of") for event in said()] == [None, 1, None]
    assert list(kernels.missing()) == []
    prebuild.fetch()
    assert [event["event"] for event in said()] == ["there"]


def test_kernels_that_cannot_be_had(published: Home) -> None:
    """The others come nevertheless."""
    (published.root / "cubins" / BMM / "Bmm_one.cubin").write_bytes(b"damaged")
    with pytest.raises(
        OSError, match=r"1 files, first .*Bmm_one\.cubin, cannot be had from .*source"
    ):
        prebuild.fetch()
    (text,) = kernels.missing()
    assert text.startswith("1 of 3 kernels")


@pytest.mark.parametrize(
    ("archs", "code", "event"), [((), 2, "no card here"), (((9, "0a"),), 1, "OSError: no space")]
)
def test_a_failure_is_told(
    home: Home,
    monkeypatch: pytest.MonkeyPatch,
    said: Callable[[], Saying],
    archs: tuple[tuple[int, str], ...],
    code: int,
    event: str,
) -> None:
    def spec_of(name: str) -> None:
        raise OSError("no space")

    monkeypatch.setattr(modules, "spec_of", spec_of)
    context = import_module("flashinfer.jit.core").current_compilation_context
    monkeypatch.setattr(context, "TARGET_CUDA_ARCHS", set(archs))
    assert prebuild.main([]) == code
    last = said()[-1]
    assert last["event"] == "failed" and event in last["why"]


@pytest.mark.slow
def test_a_server_finds_what_was_prebuilt_for_its_card(tmp_path: Path) -> None:
    """FlashInfer itself, imported anew, looks in the directory of that architecture."""
    version = installed_flashinfer()
    ops = tmp_path / ".cache" / "flashinfer" / f"{version}" / "90a" / "cached_ops"
    says = {"ninja": "ninja: no work to do.", "nvcc": "Cuda compilation tools, release 13.0, V13.0"}
    for tool, words in says.items():
        script(tmp_path / "bin" / tool, f"echo '{words}'")
    for name in ("trtllm_utils", "fused_moe_90"):
        script(ops / name / f"{name}.so", "")
    own = {
        "FLASHINFER_WORKSPACE_BASE": str(tmp_path),
        "XDG_CACHE_HOME": str(tmp_path),
        "CUDA_HOME": str(tmp_path),
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
    }
    environment = {**os.environ, **own}
    environment.pop("FLASHINFER_DISABLE_JIT", None)
    main = "import sys; from expertd.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", main, "prebuild", "--check", "--arch"]
    for arch, code in (("90a", 0), ("100a", 1)):
        ended = subprocess.run(
            [*command, arch], env=environment, capture_output=True, text=True, check=False
        )
        assert ended.returncode == code, ended.stdout + ended.stderr
    assert "fused_moe_trtllm_sm100 is not built here" in ended.stdout
    assert "kernels" in ended.stdout and "expertd prebuild --kernels DIR" in ended.stdout


def script(path: Path, line: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)
