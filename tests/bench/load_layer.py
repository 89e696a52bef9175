"""How fast a layer comes from the page cache onto a device, and what bounds it.

python tests/bench/load_layer.py [--device cuda] [--experts 128] [--dir /tmp/bench-load]

One layer of DeepSeek-V3's shape in fp8 blocks, written once, read into the page cache, then timed
with every reader that is installed. The bound is the slower of reading the page cache into memory
with as many threads, and copying pinned memory to the device.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from expertd.weights import reader
from expertd.weights.checkpoint import Checkpoint
from expertd.weights.layers import layer_specs
from expertd.weights.load import load_layer
from expertd.weights.shards import opened, pread_into
from expertd.weights.writer import write_json, write_shards

HIDDEN, WIDTH, SHARDS = 7168, 2048, 4
CONFIG = {
    "model_type": "deepseek_v3",
    "hidden_size": HIDDEN,
    "moe_intermediate_size": WIDTH,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 1,
    "hidden_act": "silu",
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}


def write(out: Path, experts: int) -> None:
    prefix = "model.layers.0.mlp"
    shapes = {
        "gate_proj": (WIDTH, HIDDEN),
        "up_proj": (WIDTH, HIDDEN),
        "down_proj": (HIDDEN, WIDTH),
    }
    shards: list[dict[str, torch.Tensor]] = [{} for _ in range(SHARDS)]
    for e in range(experts):
        for name, (n, k) in shapes.items():
            bits = torch.randint(0, 120, (n, k), dtype=torch.uint8)
            held = shards[e * SHARDS // experts]
            held[f"{prefix}.experts.{e}.{name}.weight"] = bits.view(torch.float8_e4m3fn)
            held[f"{prefix}.experts.{e}.{name}.weight_scale_inv"] = torch.rand(n // 128, k // 128)
    shards[0][f"{prefix}.gate.e_score_correction_bias"] = torch.zeros(experts)
    out.mkdir(parents=True)
    write_json(out / "config.json", CONFIG | {"n_routed_experts": experts})
    write_shards(out, shards)


@contextmanager
def timed(name: str, gigabytes: float, results: dict[str, float], device: str) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    if device == "cuda":
        torch.cuda.synchronize()
    results[name] = round(gigabytes / (time.perf_counter() - begin), 2)
    print(f"{name:42} {results[name]:7.2f} GB/s", flush=True)


def page_cache(checkpoint: Checkpoint, threads: int) -> None:
    """Every byte of every file into reused buffers."""
    shards = {entry.file.name: entry.file for entry in checkpoint.tensors.values()}
    jobs = [(s, at) for s in shards.values() for at in range(0, s.size, reader.CHUNK_BYTES)]
    buffers: list[Any] = [
        torch.ones(reader.CHUNK_BYTES, dtype=torch.uint8).numpy() for _ in range(64)
    ]

    def read(job: tuple[int, Any]) -> None:
        number, (shard, at) = job
        size = min(reader.CHUNK_BYTES, shard.size - at)
        with opened(shard) as fd:
            pread_into(fd, shard, at, memoryview(buffers[number % 64])[:size])

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, enumerate(jobs)))


def slicing(checkpoint: Checkpoint, device: str) -> None:
    for path in sorted({entry.file.path for entry in checkpoint.tensors.values()}):
        with safe_open(path, "pt", device=device) as file:
            for name in checkpoint.tensors:
                if checkpoint.tensors[name].file.path == path:
                    file.get_tensor(name)


def fast(checkpoint: Checkpoint, device: str) -> None:
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup

    paths = sorted({str(entry.file.path) for entry in checkpoint.tensors.values()})
    loader = SafeTensorsFileLoader(SingleGroup(), torch.device(device, 0), nogds=True)
    loader.add_filenames({0: paths})
    files = loader.copy_files_to_device()
    for name in checkpoint.tensors:
        files.get_tensor(name)
    files.close()
    loader.close()


def runai(checkpoint: Checkpoint, device: str) -> None:
    from runai_model_streamer import SafetensorsStreamer

    paths = sorted({str(entry.file.path) for entry in checkpoint.tensors.values()})
    with SafetensorsStreamer() as streamer:
        streamer.stream_files(paths)
        for _, tensor in streamer.get_tensors():
            tensor.to(device)


OTHERS = {"safetensors slicing": slicing, "fastsafetensors": fast, "runai": runai}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--dir", type=Path, default=Path("/tmp/bench-load"))
    parser.add_argument("--out", type=Path, help="write the numbers there as JSON")
    return parser.parse_args()


def pinned_copies(count: int) -> None:
    pinned = torch.ones(1 << 30, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(pinned, device="cuda")
    for _ in range(count):
        target.copy_(pinned, non_blocking=True)


def main() -> None:
    args = arguments()
    shutil.rmtree(args.dir, ignore_errors=True)
    write(args.dir, args.experts)
    checkpoint = Checkpoint.open(args.dir)
    total = sum(entry.end - entry.begin for entry in checkpoint.tensors.values()) / 1e9
    spec = layer_specs(checkpoint)[0]
    results: dict[str, float] = {}

    def measure(name: str, run: Callable[[], object], gigabytes: float = total) -> None:
        for _ in range(3):
            with timed(name, gigabytes, results, args.device):
                run()

    print(f"{total:.1f} GB, {args.experts} experts, {args.device}")
    page_cache(checkpoint, 4)
    for threads in (1, 4, 8, 16):
        measure(f"page cache, {threads} threads", lambda n=threads: page_cache(checkpoint, n))
    if args.device == "cuda":
        measure("pinned copy", lambda: pinned_copies(32), 32 * (1 << 30) / 1e9)
    for readers in (4, 8, 12, 16):
        reader.READERS = readers
        measure(f"expertd, {readers} readers", lambda: load_layer(checkpoint, 0, spec, args.device))
    for name, run in OTHERS.items():
        try:
            measure(name, lambda run=run: run(checkpoint, args.device))
        except Exception as error:  # a reader that is not installed, or not for this device
            print(f"{name}: {type(error).__name__}: {error}")
    if args.out:
        args.out.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
