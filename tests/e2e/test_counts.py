"""expertd counts: a running server's rows by expert, in a file that expertd plan reads."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import numpy as np
from tests.e2e.servers import Server, expertd

from expertd_client import Client


def read(home: Path, server: Server) -> dict[str, list[int]]:
    done = expertd(home, "counts", server.grpc, "--model", "demo", "--out", str(home / "counts"))
    assert done.returncode == 0, done.stderr
    found = json.loads((home / "counts").read_text())
    assert found["model"] == "demo"
    return dict(found["layers"])


def test_what_was_asked_of_each_expert_is_written_and_planned(
    home: Path, server: Server, client: Client
) -> None:
    before = read(home, server)
    assert set(before) == {"0", "1"} and {len(rows) for rows in before.values()} == {32}
    rows = np.ones((3, 256), np.float32)
    ids = np.array([[5, 7], [5, -1], [31, 5]], np.int32)
    client.forward("demo", 1, rows, topk_ids=ids, topk_weights=np.ones((3, 2), np.float32))
    after = read(home, server)
    grown = np.array(after["1"]) - np.array(before["1"])
    assert {int(n): int(grown[n]) for n in grown.nonzero()[0]} == {5: 3, 7: 1, 31: 1}
    assert after["0"] == before["0"]
    told = httpx.get(f"{server.url}/v1/layers/demo/1", trust_env=False).json()
    assert told["expert_rows"] == after["1"] == list(client.layer("demo", 1).expert_rows)
    planned = expertd(home, "plan", "--counts", str(home / "counts"), "--replicas", "2", "--json")
    assert planned.returncode == 0, planned.stderr


def test_which_model_must_be_said_when_there_are_several(home: Path, server: Server) -> None:
    unsaid = expertd(home, "counts", server.grpc)
    assert unsaid.returncode == 2 and "deep, demo" in unsaid.stderr
    echo = expertd(home, "counts", server.grpc, "--model", "echo")
    assert echo.returncode == 2 and "no layer with experts of echo" in echo.stderr
    unknown = expertd(home, "counts", server.grpc, "--model", "x")
    assert unknown.returncode == 1 and "'x' is not served" in unknown.stderr
