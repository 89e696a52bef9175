"""What `expertd serve` sees to in its own process once its layers are ready."""

from __future__ import annotations

import subprocess
import sys

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
