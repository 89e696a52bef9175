"""A server's anonymous memory while it loads: the layer, 512 MiB and one expert at most."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.servers import EXPERTD, MINUTE, PORTS, environment
from tests.service.weights.files import INT4_PARTS, NVFP4_PARTS, PLAIN_PARTS, large
from tests.service.weights.stored import compressed, modelopt

from expertd.weights.checkpoint import Checkpoint
from expertd.weights.layers import layer_specs
from expertd.weights.storage import layer_bytes

ALLOWED = 512 << 20
INT4 = compressed(num_bits=4, type="int", strategy="group", group_size=32)
FORMS: dict[str, tuple[int, Any, dict[str, Any]]] = {
    "bf16": (96, PLAIN_PARTS, {}),
    "nvfp4": (320, NVFP4_PARTS, {"quantization_config": modelopt("NVFP4")}),
    "int4": (320, INT4_PARTS, {"quantization_config": INT4}),
}
"""Experts, parts and config: 800 MB, more than what is allowed beside it."""


def anonymous_bytes(process: subprocess.Popen[str]) -> int:
    """RssAnon and Shmem of a process."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    kept = [line for line in lines if line.startswith(("RssAnon", "RssShmem"))]
    return sum(int(line.split()[1]) << 10 for line in kept)


def peak_until_ready(process: subprocess.Popen[str], log: Path) -> int:
    """The most that it had, looked at every few milliseconds until stdout says that it is ready."""
    peak, end = 0, time.monotonic() + 2 * MINUTE
    while not log.read_text().endswith("}\n"):
        assert process.poll() is None and time.monotonic() < end
        peak = max(peak, anonymous_bytes(process))
        time.sleep(0.002)
    return max(peak, anonymous_bytes(process))


def measured(home: Path, log: Path, *flags: str) -> int:
    command = [*EXPERTD, "serve", *PORTS, "--announce", "json", *flags]
    with (
        log.open("w") as out,
        subprocess.Popen(
            command, env=environment(home), stdout=out, stderr=subprocess.DEVNULL, text=True
        ) as process,
    ):
        try:
            return peak_until_ready(process, log)
        finally:
            process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_a_load_takes_little_beside_the_layer(form: str, home: Path, tmp_path: Path) -> None:
    experts, parts, declared = FORMS[form]
    path = large(tmp_path / "m", experts, parts, **declared)
    held = layer_bytes(layer_specs(Checkpoint.open(path))[0])
    empty = measured(home, tmp_path / "empty", "--identity", "echo=64")
    peak = measured(home, tmp_path / "full", "--model", f"m={path}")
    extra = peak - empty - held
    print(f"empty {empty >> 20} MiB, held {held >> 20}, peak {peak >> 20}, extra {extra >> 20}")
    assert held > ALLOWED and peak > held, "otherwise nothing is seen"
    assert extra <= ALLOWED + held // experts
