"""What tune and verify load of a checkpoint: the first layer of each shape, one after the other."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from expertd.backends.build import torch_device
from expertd.capability.device import DeviceInfo
from expertd.cli.arguments import accepted
from expertd.config import cache_directory, number, parse_range, parse_ranges
from expertd.core import LayerSpec
from expertd.core.buckets import token_buckets
from expertd.engine.graphs import graphs_for
from expertd.engine.loader import Loader, ModelSource
from expertd.engine.resident import LayerState, Resident, Residents, Trust
from expertd.engine.timing_store import TimingStore
from expertd.engine.tuner import Tuner, Tuning
from expertd.errors import FailedPrecondition, InvalidArgument, NotFound
from expertd.proof.prover import Prover
from expertd.proof.store import ProofStore
from expertd.weights.layers import ranges


def add_arguments(parser: argparse.ArgumentParser, required: bool) -> None:
    """The checkpoint, and how a server would serve it."""
    parser.add_argument("--model", type=Path, required=required, metavar="PATH")
    parser.add_argument("--layers", type=accepted(parse_ranges), metavar="3-10,12")
    parser.add_argument("--experts", type=accepted(parse_range), metavar="0-63")
    rows, threads = accepted(number(1, 1 << 24)), accepted(number(0, 1024))
    parser.add_argument("--max-batch-tokens", type=rows, default=8192, metavar="ROWS")
    parser.add_argument("--threads", type=threads, default=0, help="CPU threads, 0: cores - 1")


def first_layers(
    args: argparse.Namespace, device: DeviceInfo, tuning: Tuning, trust: Trust
) -> Iterator[tuple[Resident, str]]:
    """A loaded layer of each shape, and the numbers of the layers that are like it.

    Each is unloaded before the next. Raises FailedPrecondition for one that does not load.
    """
    torch.set_num_threads(args.threads or max(1, (os.cpu_count() or 2) - 1))
    loader = _loader(device, tuning, trust)
    experts = None if args.experts is None else (args.experts[0], args.experts[1] + 1)
    numbers = args.layers and frozenset(n for a, b in args.layers for n in range(a, b + 1))
    source = ModelSource(args.model.name, args.model, numbers, experts)
    alike: dict[LayerSpec, list[Resident]] = {}
    for resident in _announced(loader, source):
        alike.setdefault(resident.spec, []).append(resident)
    for residents in alike.values():
        first = residents[0]
        loader.load(source, [first])
        if first.state is LayerState.FAILED:
            raise FailedPrecondition(f"layer {first.name}: {first.detail}")
        yield first, ranges([resident.layer for resident in residents])
        loader.unload([first])


def buckets_of(args: argparse.Namespace) -> tuple[int, ...]:
    """The sizes of batches that a server with these flags may form."""
    return token_buckets(args.max_batch_tokens)


def _announced(loader: Loader, source: ModelSource) -> list[Resident]:
    try:
        return loader.announce(source)
    except NotFound as missing:
        raise InvalidArgument(f"--layers: {missing}") from None


def _loader(device: DeviceInfo, tuning: Tuning, trust: Trust) -> Loader:
    home, target = cache_directory(), torch_device(device)
    tuner = Tuner(TimingStore(home, device), target, tuning)
    graphs = graphs_for(target, tuning.buckets, enabled=True)
    prover = Prover(ProofStore(home, device), device)
    return Loader(Residents(), device, target, prover, tuner, graphs, trust)
