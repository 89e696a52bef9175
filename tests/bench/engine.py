"""What the engine adds to a lone call, and what it asks of torch and of a card for each batch.

python -m tests.bench.engine [--device cuda:0] [--tokens 1 16 64] [--rounds 400]

The layer is of DeepSeek-V3's shape. On a processor a copy of the rows stands for its experts, so
that what is left is the engine's own; on a card they run, replayed, on random weights in fp8
blocks, and their times without the engine are in the same line.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median

import torch
from tests.bench.kernels.weights import random_weights
from tests.service.engine.parts import CPU, Reports, resident
from tests.strategies import generator, layer_spec
from torch.profiler import ProfilerActivity, profile

from expertd.backends.base import Backend, Batch
from expertd.backends.build import build
from expertd.capability.device import detect
from expertd.capability.match import layer_refusals
from expertd.capability.rows import triton
from expertd.core import LayerSpec, QuantScheme, RoutingMethod, RoutingSpec
from expertd.core.buckets import token_buckets
from expertd.engine.checks import warm_up_checks
from expertd.engine.engine import Engine, EngineOptions
from expertd.engine.graphs import LARGEST, graphs_for
from expertd.engine.resident import LayerState, Resident, Residents, Trust
from expertd.proof.batches import random_batch
from expertd_wire.messages import ForwardCall
from expertd_wire.tensors import WireTensor

HIDDEN, WIDTH, EXPERTS, TOP_K = 7168, 2048, 256, 8
ROUTING = RoutingSpec(RoutingMethod.RENORMALIZE, "softmax", TOP_K)
MOST_SHOWN = 40


def spec_of(quant: QuantScheme, hidden: int, width: int) -> LayerSpec:
    return layer_spec(
        hidden=hidden,
        intermediate=width,
        num_experts=EXPERTS,
        expert_end=EXPERTS,
        quant=quant,
        routing=ROUTING,
    )


def layer_on(device: torch.device) -> Resident:
    """The ready layer m/0."""
    if device.type == "cpu":
        # Nobody reads the weights: as narrow as can be.
        return resident(spec_of(QuantScheme.BF16, HIDDEN, 8), generator(0), echo)
    spec = spec_of(QuantScheme.FP8_BLOCK128, HIDDEN, WIDTH)
    found = Resident("m", 0, spec, detect(str(device)), trust=Trust(declared=True))
    row = next(row for row in triton.ROWS if not layer_refusals(row, spec, found.device))
    buckets = token_buckets(LARGEST)
    backend = build(row, spec, random_weights(spec, device), None, device, buckets)
    found.backends[row.cell(spec.quant)] = backend
    warm_up_checks(spec, device)
    graphs_for(device, buckets, enabled=True).attach([backend])
    found.state = LayerState.READY
    return found


def echo(batch: Batch) -> None:
    batch.out.copy_(batch.rows)


def call_of(batch: Batch) -> ForwardCall:
    """The same rows, ids and weights as a call."""
    assert batch.ids is not None and batch.weights is not None
    return ForwardCall(
        "m",
        0,
        wire("bfloat16", batch.rows),
        topk_ids=wire("int32", batch.ids),
        topk_weights=wire("float32", batch.weights),
    )


def wire(dtype: str, tensor: torch.Tensor) -> WireTensor:
    data = bytes(tensor.cpu().contiguous().view(torch.uint8).numpy().data.cast("B"))
    return WireTensor(dtype, tuple(tensor.shape), memoryview(data))


@contextmanager
def engine_of(layer: Resident, device: torch.device) -> Iterator[Engine]:
    residents = Residents()
    residents.add(layer)
    engine = Engine(residents, device, EngineOptions(), Reports())
    engine.start()
    try:
        yield engine
    finally:
        engine.drain(10)


def ask(engine: Engine, call: ForwardCall) -> None:
    engine.submit(call, "bench", None).future.result()


def compute(backend: Backend, batch: Batch) -> None:
    """The backend by itself, until its result is there."""
    backend.forward(batch)
    if batch.rows.device.type == "cuda":
        torch.cuda.synchronize()


def microseconds(run: Callable[[], None], rounds: int) -> list[float]:
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        run()
        times.append((time.perf_counter() - begin) * 1e6)
    return sorted(times)


def tell_times(engine: Engine, backend: Backend, batch: Batch, rounds: int) -> None:
    """Both ways in turn, by tens."""
    ways = {
        "engine": partial(ask, engine, call_of(batch)),
        "alone": partial(compute, backend, batch),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds // 10):
        for name, run in ways.items():
            found[name] += microseconds(run, 11)[:-1]
    shown = ", ".join(f"{name} {median(t):.0f} (least {min(t):.0f})" for name, t in found.items())
    added = median(found["engine"]) - median(found["alone"])
    print(f"{len(batch.rows):5} tokens: {shown}; the engine adds {added:.0f} us", flush=True)


def tell_operations(engine: Engine, call: ForwardCall, calls: int = 10) -> None:
    """Every operation of torch, call to the driver and kernel, as many times as a batch has it."""
    everything = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    kinds = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        kinds.append(ProfilerActivity.CUDA)
    ask(engine, call)
    with profile(activities=kinds, experimental_config=everything) as seen:
        for _ in range(calls):
            ask(engine, call)
        time.sleep(0.05)
    counts = Counter(event.name[:90] for event in seen.events())
    print(f"a batch of {call.hidden_states.shape[0]} has, on the host and on the card:")
    for name, count in counts.most_common(MOST_SHOWN):
        print(f"{count / calls:8.1f}  {name}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", type=torch.device, default=CPU)
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 16, 64])
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--operations", action="store_true", help="list them, for each size")
    args = parser.parse_args()
    torch.set_num_threads(1)
    layer = layer_on(args.device)
    backend = next(iter(layer.backends.values()))
    with torch.inference_mode(), engine_of(layer, args.device) as engine:
        for tokens in args.tokens:
            batch = random_batch(layer.spec, tokens, args.device)
            ask(engine, call_of(batch))
            tell_times(engine, backend, batch, args.rounds)
            if args.operations:
                tell_operations(engine, call_of(batch))


if __name__ == "__main__":
    main()
