"""Commands given what cannot be: told at once, in our words, with the exit code of the page."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from tests.e2e.servers import Server, expertd

from expertd.cli import main
from expertd.core import QuantScheme
from expertd.weights.demo import write_demo


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_demo(tmp_path / "model", quant=QuantScheme.BF16)
    return str(tmp_path / "model")


def ended(*args: str) -> int:
    try:
        return main(args)
    except SystemExit as left:
        return int(left.code or 0)


CALL = ("call", "127.0.0.1:1", "--model", "m")
BENCH = ("bench", "127.0.0.1:1", "--model", "m", "--layer", "0")
USAGE = {
    (*CALL, "--layer", "x"): "'x' given; 0 to 2147483647 is accepted",
    (*CALL, "--layer", str(1 << 40)): "0 to 2147483647 is accepted",
    (*CALL, "--layer", "0", "--tokens", "-1"): "0 to 16777216 is accepted",
    (*CALL, "--layer", "0", "--seed", "-1"): "0 to 4294967295 is accepted",
    (*CALL, "--layer", "0", "--timeout", "nan"): "0.001 to 1000000.0 is accepted",
    (*BENCH, "--tokens", "1,,2"): "1 to 16777216 is accepted",
    (*BENCH, "--concurrency", "0"): "1 to 4096 is accepted",
    (*BENCH, "--rate", "inf"): "0.001 to 1000000.0 is accepted",
    (*BENCH, "--duration", "nan"): "0.001 to 1000000.0 is accepted",
    (*BENCH, "--processes", "0"): "1 to 32 is accepted",
    (*BENCH, "--plot", "/no/such/folder/out.svg"): "/no/such/folder is not a directory",
    ("health", ""): "'' given; HOST:PORT is accepted",
    ("counts", "a b"): "'a b' given; HOST:PORT is accepted",
    ("tune", "--model", "MODEL", "--threads", "-1"): "0 to 1024 is accepted",
    ("tune", "--model", "MODEL", "--max-batch-tokens", "0"): "1 to 16777216 is accepted",
    ("tune", "--model", "MODEL", "--experts", "5-2"): "inclusive range",
    ("verify", "--model", "MODEL", "--layers", "9", "--backend", "triton"): "layer 9 has no routed",
    ("verify", "--seed", "x"): "0 to 4294967295 is accepted",
    ("verify", "--device", "cuda:x"): "is not one of auto, cpu, cuda, cuda:N",
    ("inspect", "MODEL", "--gpu", "1e999"): "no size like 80GiB",
    ("explain", "--model", "MODEL", "--layer", "9"): "layer 9 has no routed experts",
    ("explain", "--model", "MODEL", "--device", "sm70"): "without a card: sm80",
    ("demo-model", "--out", "/nowhere", "--seed", "-1"): "0 to 4294967295 is accepted",
}


@pytest.mark.parametrize("args", USAGE, ids=" ".join)
def test_what_cannot_be_exits_2_and_says_what_is_accepted(
    args: tuple[str, ...], model: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert ended(*(model if arg == "MODEL" else arg for arg in args)) == 2
    told = capfd.readouterr()
    assert USAGE[args] in told.err and told.out == ""


def test_a_backend_that_cannot_run_here_is_not_proven_by_silence(
    model: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nothing failed, but a script that reads 0 would take it for a proof."""
    assert ended("verify", "--device", "cpu", "--backend", "triton", "--json") == 3
    told = capfd.readouterr()
    assert "no kernel of triton can run on cpu" in told.err
    assert json.loads(told.out)["cells"] == []


def test_a_table_in_a_file_names_every_entry_in_full(
    model: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert ended("explain", "--model", model, "--device", "sm100") == 0
    told = capfd.readouterr().out
    assert "trtllm_fp8_block_scale_routed_moe" in told and "…" not in told
    assert ended("capabilities", "--device", "sm100") == 0
    told = capfd.readouterr().out
    assert "trtllm_fp8_per_channel_scale_routed_moe" in told and "…" not in told


def test_a_bench_of_what_the_server_refuses_ends_at_once(home: Path, server: Server) -> None:
    """Long before its duration, that is: expertd() waits for a minute."""
    flags = ("--model", "demo", "--layer", "0", "--duration", "100", "--backend")
    refused = (("nothing", 1, "backend 'nothing'"), ("identity", 3, "computes no experts"))
    for backend, code, reason in refused:
        done = expertd(home, "bench", server.grpc, *flags, backend)
        assert done.returncode == code and done.stdout == "" and "Traceback" not in done.stderr
        assert reason in done.stderr


def test_tune_and_verify_print_one_json_object(
    model: str, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = ("--model", model, "--device", "cpu", "--max-batch-tokens", "2", "--json")
    assert ended("tune", *flags) == 0
    told = json.loads(capfd.readouterr().out)
    assert told.keys() == {"device", "shapes"}
    (shape,) = told["shapes"]
    assert shape["layers"] == "0-1" and shape.keys() >= {"plans", "router", "buckets"}
    assert all(math.isfinite(t) and t > 0 for times in shape["plans"].values() for t in times)
