"""From start to end: readiness, signals, drain, exit codes."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import struct
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from tests.e2e.local import FLAGS, Local
from tests.e2e.servers import MINUTE, PORTS, Server, expertd, in_process, serving
from tests.service.engine.parts import Gate
from tests.waiting import until

from expertd.cli import main
from expertd.cli.serve import announce
from expertd.engine.resident import LayerState
from expertd_client import AsyncClient, Client, ExpertPool, Unavailable


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_exits_0(home: Path, number: signal.Signals) -> None:
    with serving(home, "--identity", "echo=64") as server:
        with Client(server.grpc) as client:
            rows = np.ones((4096, 64), np.float32)
            answers: list[Any] = []
            call = threading.Thread(target=lambda: answers.append(client.forward("echo", 0, rows)))
            call.start()
            call.join(MINUTE)
            server.process.send_signal(number)
            assert server.process.wait(MINUTE) == 0, server.log.read_text()
            assert len(answers) == 1 and not client.health(timeout=1)
        assert server.process.stdout is not None
        assert server.process.stdout.read() == "", "stdout carries the one line only"
        assert "Traceback" not in server.log.read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells who waits")
def test_no_thread_but_grpcs_own_waits_for_its_sockets(home: Path) -> None:
    """As gRPC comes, each call wakes three of its event engine's threads besides."""
    rows, calls = np.ones((1, 64), np.float32), 200
    with serving(home, "--identity", "echo=64") as server, Client(server.grpc) as client:
        client.forward("echo", 0, rows)
        before = _waits_of_event_engine(server.process.pid)
        for _ in range(calls):
            client.forward("echo", 0, rows)
        assert _waits_of_event_engine(server.process.pid) - before < calls


def _waits_of_event_engine(pid: int) -> int:
    """How often its threads have given up the processor because they had nothing to do."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    engines = [t for t in threads if (t / "comm").read_text().startswith("event_engine")]
    told = [re.search(r"^voluntary_ctxt_switches:\s(\d+)", _status(t), re.M) for t in engines]
    return sum(int(found[1]) for found in told if found)


def _status(thread: Path) -> str:
    return (thread / "status").read_text()


def test_draining_answers_what_was_accepted(local: Local) -> None:
    local.script(gate := Gate())
    answers: list[Any] = []
    calls = [
        threading.Thread(target=lambda p=protocol: answers.append(local.ask(p)))
        for protocol in ("grpc", "http")
    ]
    for call in calls:
        call.start()
    until(lambda: gate.entered.is_set() and local.echo.queued_tokens == 2)
    drained: list[bool] = []
    stop = threading.Thread(target=lambda: drained.append(local.app.stop()))
    stop.start()
    until(lambda: local.app.engine.draining)
    with httpx.Client(base_url=f"http://{local.addresses.http}", trust_env=False) as web:
        ready = web.get("/readyz")
        assert ready.status_code == 503 and ready.json()["missing"] == ["draining"]
        assert web.get("/healthz").status_code == 200
    with Client(local.addresses.grpc) as client:
        assert not client.health()
    gate.opened.set()
    for thread in (*calls, stop):
        thread.join(MINUTE)
    assert [answer.code for answer in answers] == ["OK", "OK"] and drained == [True]


def test_a_drain_that_takes_too_long_is_told() -> None:
    with in_process(*FLAGS, "--drain-seconds", "0.2", stop_after=False) as (app, addresses):
        assert app.wait_ready()
        local = Local(app, addresses)
        local.script(gate := Gate())
        (call,) = local.in_background(1)
        assert gate.entered.wait(10)
        assert not app.stop()
        gate.opened.set()
        call.join(MINUTE)


async def test_a_stop_waits_for_nobody_who_has_no_call_under_way() -> None:
    """Every pool watches health all the time; a stream stays open between its calls."""
    rows = np.ones((2, 8), np.float32)
    with in_process(*FLAGS, "--drain-seconds", str(10 * MINUTE), stop_after=False) as (app, at):
        assert app.wait_ready()
        with ExpertPool([at.grpc]) as one, ExpertPool([at.grpc]) as another:
            assert one.layers() and another.layers()
            async with AsyncClient(at.grpc) as client, client.stream() as stream:
                assert (await stream.forward("echo", 0, rows)).shape == rows.shape
                stop = threading.Thread(target=app.stop, daemon=True)
                stop.start()
                await asyncio.to_thread(stop.join, MINUTE)
                assert not stop.is_alive()
                with pytest.raises(Unavailable, match="stream"):
                    await stream.forward("echo", 0, rows)


@pytest.mark.parametrize("experts", [(), ("--experts", "4-11")], ids=["all", "a range"])
def test_what_a_server_prints_to_be_pasted_works(
    deep: Path, experts: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with in_process("--model", f"deep={deep}", "--tune", "off", *experts) as (app, addresses):
        assert app.wait_ready()
        announce(app.settings, addresses)
        program = capsys.readouterr().out.partition("Try it:")[2]
        exec(program, {})
        assert capsys.readouterr().out.startswith("[[")


def test_a_drain_of_nothing_is_complete_in_no_time() -> None:
    with in_process("--identity", "echo=8", "--drain-seconds", "0", stop_after=False) as (app, _):
        assert app.wait_ready()
        assert app.stop()


def test_an_ipv6_address_is_told_as_clients_take_it() -> None:
    with in_process("--identity", "echo=8", "--host", "::1") as (app, addresses):
        assert app.wait_ready()
        with Client(addresses.grpc) as client:
            assert client.forward("echo", 0, np.ones((2, 8), np.float32)).shape == (2, 8)
        url = f"http://{addresses.http}/v1/layers"
        assert httpx.get(url, trust_env=False).status_code == 200


def test_readiness_before_and_after(local: Local) -> None:
    url = f"http://{local.addresses.http}"
    local.echo.state = LayerState.LOADING
    with Client(local.addresses.grpc) as client:
        until(lambda: not client.health())
        ready = httpx.get(f"{url}/readyz", trust_env=False)
        assert ready.status_code == 503
        assert ready.json() == {"ready": False, "missing": ["layer echo/0 is loading"]}
        assert httpx.get(f"{url}/healthz", trust_env=False).status_code == 200
        local.echo.state = LayerState.READY
        until(lambda: client.health())
    assert httpx.get(f"{url}/readyz", trust_env=False).json() == {"ready": True, "missing": []}


@pytest.fixture
def broken(tmp_path: Path, deep: Path) -> Path:
    """A checkpoint whose layer 0 cannot be served."""
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in deep.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    spoil(broken, b"model.layers.0.mlp.gate.e_score_correction_bias")
    return broken


def test_a_server_tells_of_a_layer_that_cannot_be_loaded(home: Path, broken: Path) -> None:
    with (
        pytest.raises(AssertionError, match="layer deep/0 failed: .*e_score_correction_bias"),
        serving(home, "--model", f"deep={broken}"),
    ):
        pass


def test_a_layer_that_cannot_be_loaded_leaves_the_others(broken: Path) -> None:
    with in_process("--model", f"deep={broken}") as (app, addresses):
        assert not app.wait_ready()
        local = Local(app, addresses)
        until(lambda: app.residents.get("deep", 1).state is LayerState.READY)
        fields: dict[str, Any] = {
            "model": "deep",
            "hidden_states": torch.ones(2, 256),
            "router_logits": torch.zeros(2, 32),
        }
        answer = local.ask("grpc", **fields)
        assert answer.reason == "LAYER_FAILED"
        assert re.search("e_score_correction_bias.*finite", answer.message)
        assert local.ask("grpc", **fields | {"layer": 1}).code == "OK"
        (missing,) = app.engine.missing()
        assert missing == "layer deep/0 is failed"


def spoil(path: Path, name: bytes) -> None:
    """Makes the tensor of this name NaN."""
    for file in path.glob("*.safetensors"):
        data = bytearray(file.read_bytes())
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        if entry := header.get(name.decode()):
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            data[begin:end] = b"\xff" * (end - begin)
            file.write_bytes(data)
            return
    raise AssertionError(name)


FLAGS_AMISS: dict[str, tuple[list[str], str]] = {
    "unknown flag": (["--identity", "e=8", "--no-such-flag"], "unrecognized arguments"),
    "nothing": ([], "nothing to serve"),
    "host": (["--identity", "e=8", "--host", "0.0.0.0"], "--host 0.0.0.0: .*127.0.0.1"),
    "backend": (["--identity", "e=8", "--backend", "cutlas"], "cutlas: accepted: auto, .*grouped"),
    "names": (["--identity", "e=8", "--identity", "e=9"], "given twice: e"),
    "port": (["--identity", "e=8", "--http-port", "70000"], "0 to 65535 is accepted"),
    "no port": (["--identity", "e=8", "--http-port", "http"], "'http' given; 0 to 65535 is acc"),
    "identity": (["--identity", "e=none"], "NAME=HIDDEN is accepted"),
    "ports": (["--demo", "--http-port", "7", "--grpc-port", "7"], "7: each needs a port of its"),
    "range": (["--demo", "--layers", "5-3"], "inclusive range such as 3-10"),
    "long range": (["--demo", "--layers", "0-99999999999"], "up to 65535"),
    "longer number": (["--demo", "--experts", "9" * 5000], "up to 65535"),
    "config": (["--config", "/no/such/file.toml", "--demo"], "/no/such/file.toml: No such file"),
}


@pytest.mark.parametrize("case", FLAGS_AMISS)
def test_flags_that_cannot_be_exit_2_and_say_why(
    case: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("EXPERTD_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr("expertd.cli.serve.set_up", lambda log: None)
    flags, words = FLAGS_AMISS[case]
    try:
        code = main(["serve", *PORTS, *flags])
    except SystemExit as ended:  # argparse's own way
        code = int(ended.code or 0)
    told = capsys.readouterr()
    assert code == 2 and told.out == "" and re.search(words, told.err)


MODELS_AMISS: dict[str, tuple[list[str], str]] = {
    "device": (["--identity", "e=8", "--device", "cuda:99"], "cuda:99.*does not exist"),
    "backend": (
        ["--demo", "--backend", "triton", "--device", "cpu"],
        "triton has no kernels for cpu",
    ),
    "path": (["--model", "x=/no/such/checkpoint"], "/no/such/checkpoint"),
    "experts": (["--demo", "--experts", "30-40"], "experts 30-40 .*0-31"),
}


@pytest.mark.parametrize("case", MODELS_AMISS)
def test_what_cannot_be_served_exits_2_and_says_why(home: Path, server: Server, case: str) -> None:
    flags, words = MODELS_AMISS[case]
    ended = expertd(home, "serve", *PORTS, *flags)
    assert ended.returncode == 2, ended.stderr
    assert re.search(words, ended.stderr) and "Traceback" not in ended.stderr
    assert ended.stdout == ""


@pytest.mark.parametrize(("flag", "listens"), [("--http-port", False), ("--grpc-port", True)])
def test_a_taken_port_exits_2(home: Path, flag: str, listens: bool) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        if listens:
            taken.listen()
        port = str(taken.getsockname()[1])
        ended = expertd(home, "serve", "--identity", "e=8", *PORTS, flag, port)
    assert ended.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}" in ended.stderr and flag in ended.stderr
    assert "Traceback" not in ended.stderr
