"""In place of the prebuild's process: says what FAKE_WORKER names, and what it was given."""

from __future__ import annotations

import json
import os
import sys

COMMAND = "[2/3] nvcc " + "-I/a/long/way " * 80
FAILURE = ["FAILED: two.o\n", COMMAND + "\n", "two.cu:7: error: no such thing\n"]


def event(kind: str, name: str, **more: object) -> str:
    return json.dumps({"event": kind, "name": name, **more}) + "\n"


def given() -> str:
    names = ("FLASHINFER_CUDA_ARCH_LIST", "MAX_JOBS", "FLASHINFER_CUBINS_REPOSITORY")
    return " ".join(os.environ.get(name, "-") for name in names) + f" {sys.argv[1:]}\n"


SAYINGS = {
    "builds": (0, [event("building", "one"), "[1/3] nvcc\n", event("built", "one")]),
    "fails": (1, [event("building", "two"), "[1/3] nvcc\n", "earlier\n", *FAILURE]),
    "nothing": (2, [event("failed", "", why="no card here")]),
    "lacks": (1, [event("there", "one"), event("missing", "two", why="two is not built here")]),
    "dies": (-9, ["a last word\n"]),
}

if __name__ == "__main__":
    code, lines = SAYINGS[os.environ["FAKE_WORKER"]]
    sys.stdout.write(given())
    sys.stdout.write("".join(lines))
    if os.environ["FAKE_WORKER"] == "fails":
        sys.stdout.write(event("failed", "", why="RuntimeError: Ninja build failed."))
    sys.stdout.flush()
    if code < 0:
        os.kill(os.getpid(), -code)
    sys.exit(code)
