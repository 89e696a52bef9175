"""What one cell of a bench asks of a server: which call, how many callers, for how long."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from expertd.bench.carriers import CARRIERS, Carrier
from expertd.bench.target import Target
from expertd_client import Overloaded
from expertd_client.calls import CallOptions


@dataclass(frozen=True, slots=True)
class Cell:
    """Calls of so many rows by so many callers; with a rate, so many calls a second arrive."""

    tokens: int
    concurrency: int
    rate: float = 0.0


@dataclass(frozen=True, slots=True)
class Layer:
    """The layer that is called, and the sizes that a call of it needs."""

    target: Target
    model: str
    number: int
    hidden: int
    num_experts: int
    top_k: int
    expert_begin: int
    expert_end: int
    backend: str | None = None
    carrier: str = "grpc"

    @property
    def partial(self) -> bool:
        """Whether its server holds a range of its experts: their sums are all there is."""
        return self.expert_end - self.expert_begin < self.num_experts

    def open(self) -> Carrier:
        """Connections to its server."""
        return CARRIERS[self.carrier](self.target)


def find_layer(
    target: Target,
    model: str,
    number: int,
    backend: str | None = None,
    timeout: float = 30.0,
    carrier: str = "grpc",
) -> Layer:
    """Asks the server for the layer's sizes; raises the client's errors."""
    with CARRIERS[carrier](target) as opened:
        sizes = opened.sizes(model, number, timeout)
    return Layer(target, model, number, *sizes, backend, carrier)


@dataclass(frozen=True, slots=True)
class Call:
    """Random rows with random routing: one caller's call, sent again and again."""

    rows: NDArray[Any]
    options: CallOptions

    @property
    def nbytes(self) -> int:
        """The bytes of its tensors, there and back."""
        routing = [value for value in self.options.values() if isinstance(value, np.ndarray)]
        return int(2 * self.rows.nbytes + sum(tensor.nbytes for tensor in routing))


def make_call(layer: Layer, tokens: int, seed: int, routing: str = "topk") -> Call:
    """A call whose routing is "logits" or "topk"; a layer without experts gets none."""
    random = np.random.default_rng(seed)
    rows = random.standard_normal((tokens, layer.hidden)).astype(ml_dtypes.bfloat16)
    options: CallOptions = {"backend": layer.backend, "partial": layer.partial}
    return Call(rows, {**_routing(random, tokens, layer, routing), **options})


def _routing(random: np.random.Generator, tokens: int, layer: Layer, routing: str) -> CallOptions:
    """Random routing tensors; none for a layer without experts."""
    if not layer.num_experts:
        return {}
    logits = random.standard_normal((tokens, layer.num_experts)).astype(np.float32)
    if routing == "logits":
        return {"router_logits": logits}
    ids = np.argsort(-logits, axis=1)[:, : layer.top_k or 1].astype(np.int32)
    weights = np.full(ids.shape, 1.0 / ids.shape[1], dtype=np.float32)
    return {"topk_ids": ids, "topk_weights": weights}


def try_call(layer: Layer, routing: str) -> None:
    """Raises what the server has against the layer's smallest call, unless it is merely busy."""
    call = make_call(layer, 1, 0, routing)
    with layer.open() as carrier, suppress(Overloaded):
        carrier.ask(layer.model, layer.number, call.rows, call.options)
