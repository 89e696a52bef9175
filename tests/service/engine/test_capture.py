"""Captures beside what other threads do on the same card, which stands in here."""

from __future__ import annotations

import gc
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import count
from types import SimpleNamespace

import pytest
import torch

from expertd.engine import capture
from expertd.engine.capture import CudaCapture
from expertd.engine.graphs import Graphs, graphs_for
from expertd.engine.layouts import Layouts
from expertd.engine.staging_cuda import CudaStaging

CARD = torch.device("cuda:0")
FORBIDDEN = "CUDA error: operation not permitted when stream is capturing"


class Card:
    """Which of its streams were made, and whether one of them captures."""

    def __init__(self) -> None:
        self.streams = 0
        self.capturing = False
        self.current = torch.device("cuda:0")
        self.pools_ended: list[tuple[int, object]] = []
        self.pools = count(7)
        self.recording: set[object] = set()
        self.graphs: Counter[object] = Counter()
        self.gone: set[object] = set()
        self.cards_of_pools: list[torch.device] = []

    @contextmanager
    def used(self, device: torch.device) -> Iterator[None]:
        self.current = device
        yield
        self.current = torch.device("cuda:0")

    def pool(self) -> tuple[int, int]:
        return 0, next(self.pools)

    def let_go(self, pool: object) -> None:
        """A graph in this pool is no more; torch does not take up one that had lost its last."""
        self.graphs[pool] -= 1
        if not self.graphs[pool]:
            self.gone.add(pool)

    def stream(self, device: torch.device) -> object:
        self.streams += 1
        return object()

    def wait(self, *_: object) -> None:
        if self.capturing:
            raise RuntimeError(FORBIDDEN)


class Graph:
    """A captured graph; ends_well: whether its capture can be ended."""

    ends_well = True

    def __init__(self, card: Card) -> None:
        self._card = card

    def capture_begin(self, pool: object, capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local"
        if pool in self._card.recording:  # which torch's allocator of pinned memory looks at last
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        if pool in self._card.gone:
            raise RuntimeError("it->second->use_count > 0 INTERNAL ASSERT FAILED")
        self._card.graphs[pool] += 1
        weakref.finalize(self, self._card.let_go, pool)
        self._card.cards_of_pools.append(self._card.current)
        self._card.capturing, self._pool = True, pool
        self._card.recording.add(pool)

    def capture_end(self) -> None:
        self._card.capturing = False
        if not self.ends_well:
            raise RuntimeError("CUDA error: operation failed due to a previous error")
        self._card.recording.remove(self._pool)

    def replay(self) -> None: ...


def nothing() -> None:
    """What a capture runs where it does not matter."""


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Card]:
    found = Card()
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "device", found.used)
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, found.wait)
    monkeypatch.setattr(torch.cuda, "Stream", found.stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Graph(found))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", found.pool)
    monkeypatch.setattr(torch, "zeros", lambda size, device: SimpleNamespace(zero_=nothing))
    ended = lambda device, pool: found.pools_ended.append((device, pool))  # noqa: E731
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", ended)
    capture._stream.cache_clear()
    yield found
    capture._stream.cache_clear()


def recover() -> None:
    way = CudaStaging.__new__(CudaStaging)
    way._device = CARD
    way.recover()


def make_room() -> None:
    Layouts(lambda: 0, CARD)._finish_kernels()


@pytest.mark.parametrize("wait", [recover, make_room])
def test_nobody_waits_for_a_card_that_captures(card: Card, wait: Callable[[], None]) -> None:
    """It would be an error for both, and end the process: the device would count as lost."""
    inside, go_on = threading.Event(), threading.Event()
    errors: list[Exception] = []

    def run() -> None:
        inside.set()
        go_on.wait(10)

    def waiting() -> None:
        try:
            wait()
        except Exception as error:
            errors.append(error)

    threads = [
        threading.Thread(target=CudaCapture(CARD), args=(nothing, run)),
        threading.Thread(target=waiting),
    ]
    threads[0].start()
    assert inside.wait(10)
    threads[1].start()
    threads[1].join(0.2)
    go_on.set()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert not errors


def test_graphs_take_their_memory_from_their_own_card(card: Card) -> None:
    """A pool belongs to the card that is the thread's own, for the main thread the first."""
    last = torch.device("cuda:3")
    CudaCapture(last)(nothing, nothing)
    assert set(card.cards_of_pools) == {last}


def test_captures_share_one_stream(card: Card) -> None:
    """torch's 32nd after the one for results is that very stream, where another thread copies."""
    graphs = graphs_for(CARD, (1, 2), enabled=True)
    for _ in range(40):
        with graphs.apart([]):
            pass
    assert card.streams == 1


def test_a_capture_that_fails_at_its_end_is_over_for_the_allocator(
    card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    captures = [CudaCapture(CARD) for _ in range(2)]
    for capture_one in captures:
        capture_one(nothing, nothing)
    monkeypatch.setattr(Graph, "ends_well", False)
    with pytest.raises(RuntimeError, match="previous error"):
        captures[0](nothing, nothing)
    assert card.pools_ended == [(0, (0, 7))]
    with pytest.raises(ZeroDivisionError):
        captures[1](nothing, lambda: print(1 / 0))
    assert len(card.pools_ended) == 2 and not capture.capturing.locked()


def test_after_a_capture_that_failed_at_its_end_others_go_on(
    card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With memory of their own: torch counts the old one's as under capture for good."""
    capture_one = CudaCapture(CARD)
    with monkeypatch.context() as failing, pytest.raises(RuntimeError, match="previous error"):
        failing.setattr(Graph, "ends_well", False)
        capture_one(nothing, nothing)
    for _ in range(2):
        capture_one(nothing, nothing)


def test_captures_go_on_when_all_graphs_are_gone(card: Card) -> None:
    """As after every layer was unloaded, or after a first capture whose run failed."""
    capture_one = CudaCapture(CARD)
    with pytest.raises(ZeroDivisionError):
        capture_one(nothing, lambda: print(1 / 0))
    for _ in range(2):
        capture_one(nothing, nothing)
        gc.collect()


def test_a_capture_that_cannot_begin_is_over_for_the_allocator(
    card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch tells its allocator before it begins."""
    capture_one = CudaCapture(CARD)
    card.recording.add((0, 7))
    with monkeypatch.context() as failing, pytest.raises(RuntimeError, match="already recording"):
        failing.setattr(Graph, "ends_well", False)
        capture_one(nothing, nothing)
    assert card.pools_ended == [(0, (0, 7))]
    capture_one(nothing, nothing)


def test_the_memory_of_graphs_apart_outlives_them() -> None:
    made: list[weakref.ref[object]] = []

    class Kept:
        def __call__(self, warm: Callable[[], None], run: Callable[[], None]) -> None: ...

    def new_capture() -> Kept:
        found = Kept()
        made.append(weakref.ref(found))
        return found

    with Graphs((1,), new_capture).apart([]):  # type: ignore[arg-type]
        gc.collect()
        assert made[-1]() is not None
