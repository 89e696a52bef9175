"""What CUDA graphs gain: one call of small batches, launched and replayed, on a card.

python -m tests.bench.graphs prints microseconds from the call of forward() until its result is on
the card, as a lone call waits for it: the median of 200, plans and both ways in turn.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from statistics import median

import torch
from tests.bench.kernels.weights import random_weights
from tests.strategies import layer_spec

from expertd.backends.base import Backend, Batch
from expertd.backends.build import build
from expertd.capability.device import detect
from expertd.capability.match import layer_refusals
from expertd.capability.rows import flashinfer_cutlass, triton
from expertd.core import LayerSpec, QuantScheme
from expertd.core.buckets import token_buckets
from expertd.core.routing import RoutingMethod, RoutingSpec
from expertd.engine.graphs import LARGEST, graphs_for
from expertd.proof.batches import random_batch
from expertd.proof.run import relative_error

DEVICE = torch.device("cuda:0")
ROUNDS = 200
BUCKETS = token_buckets(LARGEST)
ROUTING = RoutingSpec(RoutingMethod.RENORMALIZE_NAIVE, "softmax", 8)
SHAPES = {
    "qwen3-30b": (QuantScheme.BF16, 128, 2048, 768),
    "minimax-m2": (QuantScheme.FP8_BLOCK128, 256, 3072, 1536),
    "gpt-oss-120b": (QuantScheme.MXFP4, 128, 2880, 2880),
}


def spec_of(quant: QuantScheme, experts: int, hidden: int, intermediate: int) -> LayerSpec:
    sizes = {"hidden": hidden, "intermediate": intermediate}
    return layer_spec(
        quant=quant, num_experts=experts, expert_end=experts, routing=ROUTING, **sizes
    )


def plans(spec: LayerSpec, buckets: tuple[int, ...] = BUCKETS) -> Iterator[Backend]:
    weights = random_weights(spec, DEVICE)
    for row in (*flashinfer_cutlass.ROWS, *triton.ROWS):
        if spec.quant in row.quants and not layer_refusals(row, spec, detect("cuda:0")):
            yield build(row, spec, weights, None, DEVICE, buckets)


def microseconds(backend: Backend, batch: Batch) -> float:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    backend.forward(batch)
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) * 1e6


def compare(name: str, backend: Backend) -> None:
    """Prints a line for each size."""
    replay = backend.replay
    for tokens in (1, 5, 16, 64):
        batch = random_batch(backend.spec, tokens, DEVICE)
        assert replay is None or replay(batch), "the graph takes this batch"
        times: dict[bool, list[float]] = {True: [], False: []}
        outputs = {}
        for turn in range(2 * ROUNDS):
            graph = bool(turn % 2)
            backend.replay = replay if graph else None
            times[graph].append(microseconds(backend, batch))
            outputs[graph] = batch.out.clone()
        eager, graphed = median(times[False]), median(times[True])
        error = relative_error(outputs[True], outputs[False])
        plan = f"{backend.row.backend} {backend.row.activation_quant}"
        print(
            f"{name:14} {plan:32} {tokens:4} tokens  eager {eager:7.1f}  graph {graphed:7.1f}  "
            f"gain {eager / graphed:4.2f}  difference {error:.1e}"
        )


def main() -> None:
    print(torch.cuda.get_device_name(DEVICE), torch.__version__)
    with torch.inference_mode():
        for name, shape in SHAPES.items():
            for backend in plans(spec_of(*shape)):
                graphs = graphs_for(DEVICE, BUCKETS, enabled=True)
                begin = time.perf_counter()
                graphs.attach([backend])
                took = time.perf_counter() - begin
                print(f"{name}: captured {backend.replay is not None} in {took * 1e3:.0f} ms")
                compare(name, backend)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
