"""expertd prebuild: what it shows, what it starts, and how it ends."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.service.flashinfer import fake_worker

from expertd.cli import main, prebuild

ROOT = Path(__file__).parents[3]


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """ninja and nvcc on a PATH of their own, a fake in place of the process that builds."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("ninja", "nvcc"):
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)
    for name in ("CUDA_HOME", "CUDA_PATH", "FLASHINFER_NVCC", "FLASHINFER_DISABLE_JIT", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("FLASHINFER_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(prebuild, "WORKER", fake_worker.__name__)
    return folder


def run(monkeypatch: pytest.MonkeyPatch, saying: str, *arguments: str) -> int:
    monkeypatch.setenv("FAKE_WORKER", saying)
    return main(["prebuild", *arguments])


def log(tmp_path: Path, name: str, kind: str = "prebuild") -> str:
    return (tmp_path / "cache" / "expertd" / f"{kind}-{name}.log").read_text()


def test_each_architecture_is_built_apart(
    tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """FlashInfer looks for modules in a directory named after all architectures it is told."""
    kernels = tmp_path / "copy"
    kernels.mkdir()
    words = ("--arch", "90a,sm100", "--jobs", "3", "--kernels", str(kernels))
    assert run(monkeypatch, "builds", *words) == 0
    told = [f"{name}: one {word}" for name in ("sm90", "sm100") for word in prebuild.WORDS.values()]
    assert capsys.readouterr().out.splitlines() == [line for line in told if "there" not in line]
    for arch in ("9.0", "10.0"):
        assert log(tmp_path, arch).startswith(f"{arch} 3 {kernels} []\n")


def test_for_the_cards_that_are_here(
    tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prebuild, "default_jobs", lambda: 5)
    assert run(monkeypatch, "builds") == 0
    assert log(tmp_path, "here").startswith("- 5 - []\n")
    monkeypatch.setenv("MAX_JOBS", "2")
    assert run(monkeypatch, "builds") == 0
    assert log(tmp_path, "here").startswith("- 2 - []\n")


def test_a_failed_build_shows_what_the_compiler_said(
    tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "fails", "--arch", "90a") == 1
    said = capsys.readouterr().err
    assert "two.cu:7: error: no such thing" in said and "Ninja build failed" in said
    assert "long/way" not in said and "earlier" not in said
    assert "prebuild-9.0.log" in said and "long/way" in log(tmp_path, "9.0")


@pytest.mark.parametrize(
    ("saying", "code", "word"), [("nothing", 2, "no card"), ("dies", 1, "last")]
)
def test_how_it_ends(
    tools: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    saying: str,
    code: int,
    word: str,
) -> None:
    assert run(monkeypatch, saying) == code
    assert word in capsys.readouterr().err


def test_check_needs_no_compiler_and_says_what_is_missing(
    tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run(monkeypatch, "lacks", "--check") == 1
    said = capsys.readouterr()
    assert said.out.splitlines() == [
        "this machine: one is there",
        "this machine: two is not built here",
    ]
    assert "without a word" not in said.err
    assert run(monkeypatch, "builds", "--check") == 0
    assert "['--check']" in log(tmp_path, "here", "check")


@pytest.mark.parametrize(
    ("words", "named"),
    [(("--arch", "80"), "90"), (("--jobs", "0"), ">= 1"), (("--kernels", "/nowhere"), "/nowhere")],
)
def test_bad_words(
    tools: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    named: str,
) -> None:
    assert run(monkeypatch, "builds", *words) == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize(
    ("missing", "code", "advice"),
    [("ninja", 1, "pip install ninja"), ("nvcc", 1, "CUDA_HOME")],
)
def test_tools_that_are_not_there(
    tools: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    missing: str,
    code: int,
    advice: str,
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tools.parent))
    (tools / missing).unlink()
    assert run(monkeypatch, "builds") == code
    assert advice in capsys.readouterr().err


def test_flashinfer_may_not_build(
    tools: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FLASHINFER_DISABLE_JIT", "0")
    assert run(monkeypatch, "builds") == 2
    assert "unset" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("cores", "gib", "limit", "jobs"),
    [
        (16, 128, "max", 16),
        (64, 128, "max", 16),
        (2, 7, "max", 1),
        (64, 512, str(64 << 30), 8),
        (4, 64, None, 4),
    ],
)
def test_jobs_fit_the_machine_and_the_container(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    cores: int,
    gib: int,
    limit: str | None,
    jobs: int,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": (gib << 30) // 4096}
    monkeypatch.setattr(os, "sysconf", pages.__getitem__)
    monkeypatch.setattr(prebuild, "CGROUP_LIMIT", tmp_path / "memory.max")
    if limit is not None:
        (tmp_path / "memory.max").write_text(f"{limit}\n")
    assert prebuild.default_jobs() == jobs
