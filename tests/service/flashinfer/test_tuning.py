"""What FlashInfer's tuner is asked for, and that nothing else runs while it tunes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.service.flashinfer.conftest import Home

from expertd.backends.flashinfer import library, tuning
from expertd.backends.flashinfer.once import warn_once

CPU = torch.device("cpu")


class Tuned:
    """FlashInfer's names around a tuner that keeps what it was told."""

    def __init__(self) -> None:
        self.told: list[dict[str, Any]] = []
        self.inside = False

    @contextmanager
    def autotune(self, tune_mode: bool, **told: Any) -> Iterator[None]:
        assert tune_mode
        self.told.append(told)
        self.inside = True
        yield
        self.inside = False

    def __getattr__(self, name: str) -> Any:
        return getattr(library._flashinfer(), name)


@pytest.fixture
def tuned(
    home: Home, card: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Tuned:
    found = Tuned()
    monkeypatch.setattr(tuning, "library", lambda: found)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return found


def test_one_file_for_a_version_and_a_card(tuned: Tuned, home: Home) -> None:
    home.built("trtllm_utils")
    with tuning.tuner((1,), CPU) as tunes:
        assert tunes and tuned.inside
    (told,) = tuned.told
    path = Path(told["cache"])
    assert path.parent.is_dir() and path.parent.name == "autotune"
    assert path.name == f"flashinfer-{tuning.installed_flashinfer()}-NVIDIA-B200-test.json"


def test_every_size_of_flashinfers_own_is_tuned(tuned: Tuned, home: Home) -> None:
    """A batch is rounded up to one of these at run time: what lies between is never looked up."""
    home.built("trtllm_utils")
    with tuning.tuner((1, 300), CPU):
        pass
    assert tuned.told[0]["tuning_buckets"] == (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
    assert tuning.buckets((1,)) == (1,)
    assert tuning.buckets((100_000,))[-1] == tuning.TUNE_TOKENS
    from flashinfer.fused_moe.utils import map_to_hybrid_bucket

    sizes = tuning.buckets((3000,))
    assert {map_to_hybrid_bucket(n, tuning.TUNE_TOKENS) for n in range(1, 3001)} == set(sizes)


@pytest.mark.parametrize("disabled", ["", "1"])
def test_without_its_timing_module_it_does_not_tune_and_says_so(
    tuned: Tuned,
    home: Home,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    disabled: str,
) -> None:
    """FlashInfer would build it at once, or fail every tactic in silence if it may not build."""
    monkeypatch.setenv("FLASHINFER_DISABLE_JIT", disabled)
    if disabled:
        home.built("trtllm_utils")
    warn_once.cache_clear()
    for _ in range(2):
        with tuning.tuner((1,), CPU) as tunes:
            assert not tunes
    assert tuned.told == []
    assert "trtllm_utils" in caplog.text and "expertd prebuild" in caplog.text
    assert len(caplog.records) == 1, "and it says so once"


def test_nothing_else_runs_while_it_tunes(tuned: Tuned, home: Home) -> None:
    """FlashInfer's tuning mode is the whole process's: it would tune other threads' calls too."""
    home.built("trtllm_utils")
    free: list[bool] = []

    def other() -> None:
        free.append(library.alone.acquire(blocking=False))

    with tuning.tuner((1,), CPU):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert free == [False]


def test_a_simulation_is_not_tuned(monkeypatch: pytest.MonkeyPatch, tuned: Tuned) -> None:
    monkeypatch.setattr(tuning, "simulated", lambda: True)
    with tuning.tuner((1,), CPU):
        pass
    assert tuned.told == []
