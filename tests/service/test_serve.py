"""What `expertd serve` sees to in its own process once its layers are ready."""

from __future__ import annotations

import subprocess
import sys

import pytest

SERVED = """
import gc
from types import SimpleNamespace
import expertd.app
from expertd.app import Addresses
from expertd.cli import main

class App:
    device = SimpleNamespace(kind="cpu")
    engine = SimpleNamespace(device_lost=False, healthy=True)

    def __init__(self, settings, stop):
        self.ended = stop

    def start(self):
        return Addresses("127.0.0.1:1", "127.0.0.1:2")

    def wait_ready(self):
        assert gc.get_freeze_count() == 0, "layers are still made"
        self.ended.set()
        return True

    def stop(self):
        return True

expertd.app.App = App
assert main(["serve", "--identity", "echo=8", "--device", "cpu"]) == 0
print(gc.get_freeze_count())
"""


def test_garbage_collection_leaves_out_what_the_start_made() -> None:
    ended = subprocess.run([sys.executable, "-c", SERVED], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout.split()[-1]) > 100_000


COMPUTING = """
import threading
import torch
{served}
def compute():
    torch.set_num_threads(1)
    rows = torch.ones(64, 64)
    while True:
        rows @ rows

class Busy(App):
    def stop(self):
        threading.Thread(target=compute, name={name!r}, daemon=True).start()
        return {drained}

expertd.app.App = Busy
raise SystemExit(main(["serve", "--identity", "echo=8", "--device", "cpu"]))
"""


@pytest.mark.parametrize(("drained", "code"), [(True, 0), (False, 1)])
@pytest.mark.parametrize("name", ["loader", "executor"])
def test_a_stop_while_somebody_computes_is_no_crash(name: str, drained: bool, code: int) -> None:
    """Ended with -6: C++ aborts when Python ends a thread inside of it."""
    served = SERVED.partition("expertd.app.App = App")[0]
    program = COMPUTING.format(served=served, name=name, drained=drained)
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == code, ended.stderr
