"""`expertd bench` against a real server."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.request import urlopen

import pytest
from tests.e2e.servers import Server, expertd, serving
from tests.waiting import until

from expertd.bench.load import Cell
from expertd.bench.summary import Summary, summarize
from expertd.bench.workers import Outcome, Sample
from expertd.cli import bench, main
from expertd_client import ExpertdError

DEMO = ("--model", "demo", "--layer", "0", "--duration", "0.3")


@pytest.mark.parametrize("carrier", ["grpc", "http"])
def test_a_closed_loop_as_json_and_as_a_picture(home: Path, server: Server, carrier: str) -> None:
    picture, target = home / "out.svg", {"grpc": server.grpc, "http": server.http}[carrier]
    flags = ("--tokens", "1,5", "--concurrency", "1,3", "--json", "--plot", str(picture))
    ended = expertd(home, "bench", target, *DEMO, "--carrier", carrier, *flags)
    assert ended.returncode == 0, ended.stderr
    cells = json.loads(ended.stdout)["cells"]
    assert [(c["tokens"], c["concurrency"]) for c in cells] == [(1, 1), (1, 3), (5, 1), (5, 3)]
    for cell in cells:
        latency, parts = cell["latency_ms"], cell["split_ms"]
        assert cell["calls"] >= cell["concurrency"] and cell["refused"] == {}
        assert 0 < latency["p50"] <= latency["p90"] <= latency["p99"] <= latency["max"]
        assert min(parts.values()) > 0
        assert 1 <= cell["mean_batch"] <= cell["concurrency"]
        assert cell["tokens_per_s"] == pytest.approx(cell["calls_per_s"] * cell["tokens"])
    assert len(ElementTree.parse(picture).getroot().findall("{*}circle")) == 8


def test_figures_outlive_a_picture_that_cannot_be_written(home: Path, server: Server) -> None:
    flags = ("--tokens", "1", "--concurrency", "1", "--json", "--plot", str(home))
    ended = expertd(home, "bench", server.grpc, *DEMO, *flags)
    assert ended.returncode == 1 and "Is a directory" in ended.stderr
    assert json.loads(ended.stdout)["cells"][0]["calls"] > 0


def test_an_open_loop_as_a_table(home: Path, server: Server) -> None:
    flags = ("--tokens", "2", "--concurrency", "4", "--rate", "40", "--routing", "logits")
    ended = expertd(home, "bench", server.grpc, *DEMO, *flags)
    assert ended.returncode == 0, ended.stderr
    assert "demo/0 over grpc" in ended.stdout and "40" in ended.stdout


def test_refusals_are_counted_beside_the_answers(home: Path) -> None:
    limits = ("--max-queued-tokens", "8", "--max-batch-tokens", "8")
    with serving(home, "--identity", "echo=7168", "--device", "cpu", *limits) as narrow:
        flags = ("--tokens", "8", "--concurrency", "12", "--duration", "1", "--json")
        ended = expertd(home, "bench", narrow.grpc, "--model", "echo", "--layer", "0", *flags)
        assert ended.returncode == 0, ended.stderr
    (cell,) = json.loads(ended.stdout)["cells"]
    assert cell["calls"] > 0 and cell["refused"].keys() == {"OVERLOADED"}
    assert cell["refused_p50_ms"] > 0


def test_a_server_that_dies_meanwhile_is_told_of(home: Path) -> None:
    """The figures of what it answered are printed all the same; no cell more is tried."""
    with serving(home, "--identity", "echo=64", "--device", "cpu") as doomed:
        end = Thread(target=kill_at_work, args=(doomed,))
        end.start()
        flags = ("--tokens", "1", "--concurrency", "1,2,3", "--duration", "4", "--json")
        ended = expertd(home, "bench", doomed.grpc, "--model", "echo", "--layer", "0", *flags)
        end.join()
    first, second = json.loads(ended.stdout)["cells"]
    assert first["calls"] > 0 and first["refused"].keys() == {"UNAVAILABLE"}
    assert not second["calls"] and second["refused"].keys() == {"UNAVAILABLE"}
    assert ended.returncode == 1 and ended.stderr.count("UNAVAILABLE") == 2


@pytest.mark.parametrize(("end", "code"), [(KeyboardInterrupt(), 130), (ExpertdError("x"), 1)])
def test_an_end_in_the_middle_keeps_the_figures(
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    end: BaseException,
    code: int,
) -> None:
    def measured(*_: Any) -> Iterator[Summary]:
        yield summarize(Cell(1, 1), 1, [Outcome(1.0, [Sample(1)])])
        raise end

    monkeypatch.setattr(bench, "_measure", measured)
    assert main(["bench", server.grpc, *DEMO, "--json"]) == code
    assert len(json.loads(capsys.readouterr().out)["cells"]) == 1


def kill_at_work(server: Server) -> None:
    """Ends the server once it has answered some hundred calls."""

    def answered() -> bool:
        with urlopen(f"http://{server.http}/metrics") as reply:
            found = re.search(r"(?m)^expertd_requests_total\{.* (\S+)$", reply.read().decode())
        return found is not None and float(found[1]) > 100

    until(answered)
    server.process.kill()


@pytest.mark.parametrize(
    ("flags", "code", "told"),
    [
        (("--layer", "77"), 1, "has no layer 77"),
        (("--layer", "0", "--tokens", "0"), 2, "1 to 16777216 is accepted"),
        (("--layer", "0", "--tokens", "many"), 2, "'many' given; 1 to"),
        (("--layer", "0", "--rate=-3"), 2, "0.001 to 1000000.0 is accepted"),
        (("--layer", "0", "--duration", "0"), 2, "0.001 to 1000000.0 is accepted"),
        (("--layer", "0", "--carrier", "pigeon"), 2, "invalid choice"),
    ],
)
def test_a_wrong_flag(
    home: Path, server: Server, flags: tuple[str, ...], code: int, told: str
) -> None:
    ended = expertd(home, "bench", server.grpc, "--model", "demo", *flags)
    assert ended.returncode == code and told in ended.stderr
    assert "Traceback" not in ended.stderr


def test_nobody_there(home: Path) -> None:
    ended = expertd(home, "bench", "127.0.0.1:1", "--model", "demo", "--layer", "0")
    assert ended.returncode == 1 and "Traceback" not in ended.stderr


def test_a_replica_that_holds_a_range_can_be_called_and_loaded(home: Path) -> None:
    flags = ("--tokens", "16", "--json")
    with serving(home, "--demo", "--experts", "4-15") as replica:
        for routing in ("logits", "topk"):
            ended = expertd(home, "call", replica.grpc, *DEMO[:4], *flags, "--routing", routing)
            assert ended.returncode == 0, ended.stderr
            told = json.loads(ended.stdout)
            assert told["output"]["dtype"] == "float32" and told["norm"] > 0
        for carrier, target in (("grpc", replica.grpc), ("http", replica.http)):
            short = (*flags, "--concurrency", "1", "--duration", "0.2", "--carrier", carrier)
            ended = expertd(home, "bench", target, *DEMO, *short)
            assert ended.returncode == 0, ended.stderr
            assert json.loads(ended.stdout)["cells"][0]["calls"] > 0
