"""The CPU's experts beside transformers' own, and what merging calls gains and costs.

Hidden 2048, intermediate 768, 128 experts, top-8, bfloat16; `grouped` reads the weights as a server
holds them, packed. Goals: `grouped` at least 1.0 times the fastest of transformers' experts at 1
and 16 tokens and 1.2 times at 256; 32 callers of 4 tokens at least 3 times the throughput of
merging switched off; one caller loses less than 5 % to the batcher.

Run: python -m tests.bench.cpu [--rounds 9] [--seconds 6]
"""

from __future__ import annotations

import argparse
import os
import statistics
import threading
import time
from collections.abc import Callable
from functools import partial

import torch
from tests.service.engine.parts import CPU, resident, running
from torch import Tensor
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from expertd.backends.base import Backend, Batch
from expertd.backends.build import build
from expertd.backends.grouped.weights import packed
from expertd.core import (
    Activation,
    ActivationKind,
    LayerSpec,
    QuantScheme,
    RoutingMethod,
    RoutingSpec,
)
from expertd.engine.engine import Engine
from expertd.engine.resident import Resident
from expertd_wire.messages import ForwardCall
from expertd_wire.tensors import WireTensor

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 2048, 768, 128, 8
GOALS = {1: 1.0, 16: 1.0, 256: 1.2}
PEERS = ("eager", "batched_mm", "grouped_mm")
CALLERS, CALL_TOKENS = 32, 4
LANE = "bench"

Run = Callable[[], object]


def spec() -> LayerSpec:
    return LayerSpec(
        HIDDEN,
        INTERMEDIATE,
        EXPERTS,
        expert_begin=0,
        expert_end=EXPERTS,
        activation=Activation(ActivationKind.SWIGLU),
        quant=QuantScheme.BF16,
        routing=RoutingSpec(RoutingMethod.RENORMALIZE, "softmax", TOP_K),
    )


def peers(layer: Resident) -> dict[str, Qwen3MoeExperts]:
    """transformers' experts with copies of this layer's weights: [gate; up], ours is [up; gate]."""
    assert layer.weights is not None
    down = torch.nn.Parameter(layer.weights.w2.clone(), requires_grad=False)
    up, gate = layer.weights.w13.chunk(2, dim=1)
    halves = torch.nn.Parameter(torch.cat((gate, up), dim=1), requires_grad=False)
    made = {}
    for name in PEERS:
        config = Qwen3MoeConfig(
            hidden_size=HIDDEN, moe_intermediate_size=INTERMEDIATE, num_experts=EXPERTS
        )
        config._experts_implementation = name
        with torch.device("meta"):
            experts = Qwen3MoeExperts(config)
        experts.gate_up_proj = halves
        experts.down_proj = down
        made[name] = experts
    return made


def as_served(layer: Resident) -> Backend:
    """Packs the layer's weights as a load does; the layer's grouped backend."""
    assert layer.weights is not None
    weights, layer.weights = layer.weights, None
    rows = {cell: backend.row for cell, backend in layer.backends.items()}
    layer.backends.clear()  # nobody may read the canonical weights while they are packed
    layer.weights = packed(weights, layer.name)
    for cell, row in rows.items():
        layer.backends[cell] = build(row, layer.spec, layer.weights, None, CPU)
    return next(found for found in layer.backends.values() if found.row.backend == "grouped")


def draw(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, ids and weights of one call."""
    rows = torch.randn(tokens, HIDDEN).bfloat16()
    weights, ids = torch.randn(tokens, EXPERTS).softmax(dim=1).topk(TOP_K)
    return rows, ids, weights / weights.sum(dim=1, keepdim=True)


def seconds(run: Run) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def rounds_for(tokens: int, rounds: int) -> int:
    """More of the short ones."""
    return rounds * max(1, 16 // tokens)


def interleaved(runs: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """Each run's times, taken in turn after one turn to warm up."""
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(seconds(run))
    return times


def read_bandwidth() -> float:
    """GB/s of the best of some sums over memory far beyond any cache."""
    data = torch.ones(1 << 28, dtype=torch.float32)
    return data.nbytes / min(seconds(data.sum) for _ in range(5)) / 1e9


def compare_experts(backend: Backend, others: dict[str, Qwen3MoeExperts], rounds: int) -> None:
    print(f"read bandwidth {read_bandwidth():.1f} GB/s, {torch.get_num_threads()} thread(s)")
    print("tokens  implementation     ms (min - max)            GB/s  grouped is faster by")
    for tokens, goal in GOALS.items():
        rows, ids, weights = draw(tokens)
        batch = batch_of(rows, ids, weights)
        runs: dict[str, Run] = {"grouped": partial(backend.forward, batch)}
        for name, experts in others.items():
            if name != "batched_mm" or tokens <= 16:  # it copies the weights of every pair
                runs[name] = partial(experts, rows, ids, weights.bfloat16())
        _agree(runs, batch.out)
        times = interleaved(runs, rounds_for(tokens, rounds))
        nbytes = len(ids.unique()) * 3 * HIDDEN * INTERMEDIATE * 2
        _print_times(tokens, times, nbytes)
        fastest = min(statistics.median(found) for name, found in times.items() if name in others)
        ratio = fastest / statistics.median(times["grouped"])
        print(f"{tokens:6}  against the fastest peer: {ratio:.2f} (goal {goal})")


def _agree(runs: dict[str, Run], out: Tensor) -> None:
    """Speed counts only for the right answer."""
    runs["grouped"]()
    for name, run in runs.items():
        if name != "grouped":
            theirs = run()
            assert isinstance(theirs, Tensor)
            error = float((theirs.float() - out.float()).norm() / out.float().norm())
            assert error < 2e-2, f"{name} and grouped differ by {error}"


def _print_times(tokens: int, times: dict[str, list[float]], nbytes: int) -> None:
    ours = statistics.median(times["grouped"])
    for name, found in times.items():
        median = statistics.median(found)
        spread = f"({min(found) * 1e3:.2f} - {max(found) * 1e3:.2f})"
        rate = nbytes / median / 1e9
        shown = f"{median * 1e3:9.2f} {spread:20} {rate:8.1f}  {median / ours:.2f}"
        print(f"{tokens:6}  {name:14} {shown}")


def batch_of(rows: Tensor, ids: Tensor, weights: Tensor) -> Batch:
    return Batch(rows, torch.empty_like(rows), ids=ids.int(), weights=weights)


def call_of(rows: Tensor, ids: Tensor, weights: Tensor) -> ForwardCall:
    named = {"topk_ids": wire("int32", ids.int()), "topk_weights": wire("float32", weights)}
    return ForwardCall("m", 0, wire("bfloat16", rows), **named)


def wire(dtype: str, tensor: Tensor) -> WireTensor:
    data = tensor.contiguous().view(torch.uint8).numpy().data.cast("B")
    return WireTensor(dtype, tuple(tensor.shape), data)


def ask(engine: Engine, asked: ForwardCall) -> None:
    engine.submit(asked, LANE, None).future.result()


def throughput(engine: Engine, duration: float) -> float:
    """Tokens a second of 32 callers, each of which calls again as soon as it is answered."""
    counts = [0] * CALLERS
    end = time.perf_counter() + duration

    def caller(number: int) -> None:
        asked = call_of(*draw(CALL_TOKENS))
        while time.perf_counter() < end:
            ask(engine, asked)
            counts[number] += 1

    threads = [threading.Thread(target=caller, args=(number,)) for number in range(CALLERS)]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) * CALL_TOKENS / (time.perf_counter() - begin)


def compare_merging(layer: Resident, duration: float) -> None:
    found: dict[str, list[float]] = {"merged": [], "alone": []}
    limits = {"merged": 8192, "alone": CALL_TOKENS}
    for name in 3 * tuple(limits):
        with running(layer, max_batch_tokens=limits[name]) as engine:
            found[name].append(throughput(engine, duration))
    for name, rates in found.items():
        print(f"{CALLERS} callers of {CALL_TOKENS} tokens, {name}: {_spread(rates)} tokens/s")
    ratio = statistics.median(found["merged"]) / statistics.median(found["alone"])
    print(f"merging gains {ratio:.2f} (goal 3)")


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.0f} ({min(values):.0f} - {max(values):.0f})"


def compare_one_caller(backend: Backend, layer: Resident, rounds: int) -> None:
    """The same calls through the engine and straight into the backend."""
    for tokens in GOALS:
        drawn = draw(tokens)
        with running(layer) as engine:
            runs: dict[str, Run] = {
                "engine": partial(ask, engine, call_of(*drawn)),
                "backend": partial(backend.forward, batch_of(*drawn)),
            }
            times = interleaved(runs, rounds_for(tokens, rounds))
        medians = {name: statistics.median(found) * 1e3 for name, found in times.items()}
        loss = (medians["engine"] / medians["backend"] - 1) * 100
        shown = f"engine {medians['engine']:.2f} ms, backend alone {medians['backend']:.2f} ms"
        print(f"{tokens:6}  one caller: {shown}: {loss:+.1f} % (goal < 5 %)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=6)
    args = parser.parse_args()
    torch.set_num_threads(max(1, (os.cpu_count() or 2) - 1))
    layer = resident(spec(), torch.Generator().manual_seed(0))
    others = peers(layer)
    backend = as_served(layer)
    with torch.inference_mode():
        compare_experts(backend, others, args.rounds)
    compare_one_caller(backend, layer, args.rounds)
    compare_merging(layer, args.seconds)


if __name__ == "__main__":
    main()
