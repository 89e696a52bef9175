"""What a kernel's exceptions mean: no memory is the batch's, a lost device is everybody's."""

from __future__ import annotations

import pytest
import torch
from tests.service.engine.parts import resident, running
from tests.strategies import generator, layer_spec, wire_call

from expertd.backends.base import Batch
from expertd.engine.faults import DeviceLost, meaning
from expertd.engine.staging import Staging
from expertd.errors import Internal, InvalidArgument, Overloaded, Unavailable

SPEC = layer_spec()
NO_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    MemoryError(),
]
LOST = [
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    torch.AcceleratorError("anything at all"),
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("CUDA driver error: unspecified launch failure"),
    RuntimeError("Check failed: cudaErrorLaunchFailure"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"),
]


@pytest.mark.parametrize("error", NO_MEMORY, ids=repr)
def test_no_memory_is_overload(error: Exception) -> None:
    told = meaning(error)
    assert isinstance(told, Overloaded) and told.retry_seconds is not None
    assert "no memory" in str(told) and "GiB" not in str(told)


@pytest.mark.parametrize("error", LOST, ids=repr)
def test_an_error_of_the_device_loses_it(error: Exception) -> None:
    with pytest.raises(DeviceLost):
        meaning(error)


def test_other_errors_are_the_batchs_own() -> None:
    assert isinstance(meaning(ValueError("shape")), Internal)
    ours = InvalidArgument("CUDA error: said a caller")
    assert meaning(ours) is ours


def call(random: torch.Generator, tokens: int) -> object:
    rows = torch.randn(tokens, SPEC.hidden, generator=random)
    logits = torch.randn(tokens, SPEC.num_experts, generator=random)
    return wire_call(hidden_states=rows, router_logits=logits)


class Recovering(Staging):
    """A way that counts how often it had to recover, and may fail at that too."""

    recovered = 0
    fails = False

    def recover(self) -> None:
        self.recovered += 1
        if self.fails:
            raise torch.AcceleratorError("CUDA error: out of memory")


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("error", NO_MEMORY, ids=repr)
def test_a_launch_without_memory_is_refused_and_the_next_one_runs(
    error: Exception, count: int
) -> None:
    random = generator(81)

    def script(batch: Batch) -> None:
        if batch.rows.shape[0] == 7:
            raise error
        batch.out.copy_(batch.rows)

    ways = [Recovering() for _ in range(count)]
    with running(resident(SPEC, random, script), ways=ways) as engine:
        for _ in range(3):
            with pytest.raises(Overloaded):
                engine.submit(call(random, 7), "test", None).future.result(10)
            assert engine.submit(call(random, 2), "test", None).future.result(10)
        assert engine.healthy and not engine.device_lost
    assert sum(way.recovered for way in ways) == 3


@pytest.mark.parametrize("count", [1, 2])
def test_a_device_that_cannot_recover_is_lost(count: int) -> None:
    random = generator(82)

    def script(batch: Batch) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    ways = [Recovering() for _ in range(count)]
    for way in ways:
        way.fails = True
    with running(resident(SPEC, random, script), ways=ways) as engine:
        with pytest.raises(Overloaded):
            engine.submit(call(random, 7), "test", None).future.result(10)
        assert engine.drain(10)
        assert engine.device_lost


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("error", LOST[:3], ids=repr)
def test_a_lost_device_takes_no_more_calls(error: Exception, count: int) -> None:
    random, lost = generator(83), []

    def script(batch: Batch) -> None:
        raise error

    ways = [Staging() for _ in range(count)]
    layer = resident(SPEC, random, script)
    options = {"max_batch_tokens": 2, "start": False, "on_lost": lambda: lost.append(True)}
    with running(layer, ways=ways, **options) as engine:
        tickets = [engine.submit(call(random, 2), "test", None) for _ in range(4)]
        engine.start()
        for ticket in tickets:
            with pytest.raises(Unavailable, match="its device is lost"):
                ticket.future.result(10)
        assert engine.device_lost and not engine.healthy and lost == [True]
        assert layer.queued_tokens == 0 and engine.drain(10)
