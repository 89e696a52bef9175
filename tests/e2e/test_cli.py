"""The other commands: call, health, print-config."""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tests.e2e.servers import EXPERTD, Server, environment, expertd

from expertd.cli import main


@pytest.mark.parametrize("routing", ["logits", "topk"])
def test_call_prints_the_reply_as_json(home: Path, server: Server, routing: str) -> None:
    flags = ("--model", "demo", "--layer", "1", "--tokens", "5", "--routing", routing, "--json")
    flags += ("--request-id", "mine", "--backend", "auto")
    ended = expertd(home, "call", server.grpc, *flags)
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout)
    assert told["output"] == {"dtype": "bfloat16", "shape": [5, 256]}
    assert (told["backend"], told["mode"], told["entry"]) == ("grouped", "routed", "grouped")
    assert min(told["queued_ns"], told["staged_ns"], told["computed_ns"]) > 0
    assert told["norm"] > 0 and told["request_id"] == "mine"


def test_call_prints_a_table_for_people(home: Path, server: Server) -> None:
    flags = ("--model", "echo", "--layer", "0", "--backend", "identity")
    ended = expertd(home, "call", server.grpc, *flags)
    assert ended.returncode == 0, ended.stderr
    assert "identity" in ended.stdout and "norm" in ended.stdout and " ms" in ended.stdout


def test_call_tells_the_servers_reasons(home: Path, server: Server) -> None:
    flags = ("--model", "demo", "--layer", "0", "--backend", "identity")
    ended = expertd(home, "call", server.grpc, *flags)
    assert ended.returncode == 3 and ended.stdout == ""
    assert "computes no experts" in ended.stderr and "Traceback" not in ended.stderr
    texts = [line.partition(": ")[2] for line in ended.stderr.splitlines()]
    assert len(texts) == len(set(texts)), "each reason once"
    ended = expertd(home, "call", server.grpc, "--model", "dmeo", "--layer", "0")
    assert ended.returncode == 1 and "'dmeo' is not served" in ended.stderr


def test_the_timeout_of_a_call_is_that_of_its_first_question_too(home: Path) -> None:
    """Of an address that takes connections and says nothing."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        target = f"127.0.0.1:{silent.getsockname()[1]}"
        flags = ("--model", "demo", "--layer", "0", "--timeout", "0.2")
        ended = expertd(home, "call", target, *flags)
    assert ended.returncode == 1 and ended.stdout == ""
    assert "Deadline Exceeded" in ended.stderr  # without one, gRPC gives up after 20 s


def test_health_is_0_or_1(home: Path, server: Server) -> None:
    assert expertd(home, "health", server.grpc).returncode == 0
    ended = expertd(home, "health", "127.0.0.1:1")
    assert ended.returncode == 1 and "Traceback" not in ended.stderr


@pytest.mark.parametrize("command", [("capabilities", "--json"), ("capabilities",)])
def test_a_reader_who_has_gone_ends_a_command_in_silence(
    home: Path, command: tuple[str, ...]
) -> None:
    """As of `expertd … | head -1`, however little there is to write."""
    reads, writes = os.pipe()
    os.close(reads)
    ended = subprocess.run(
        [*EXPERTD, *command],
        env=environment(home),
        stdout=writes,
        stderr=subprocess.PIPE,
        timeout=60,
    )
    os.close(writes)
    assert (ended.returncode, ended.stderr) == (1, b"")


def test_print_config_tells_each_value_and_its_origin(home: Path) -> None:
    config = home / "settings.toml"
    config.write_text('http_port = 7000\ngrpc_port = 7001\nidentity = ["e=8"]\n')
    flags = ("--config", str(config), "--http-port", "9000", "--print-config")
    variables = environment(home) | {"EXPERTD_HTTP_PORT": "8500", "EXPERTD_GRPC_PORT": "8501"}
    ended = subprocess.run(
        [*EXPERTD, "serve", *flags], env=variables, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    told = {line.split(" = ")[0]: line for line in lines}
    assert told["http_port"] == "http_port = 9000  # flag --http-port"
    assert told["grpc_port"] == "grpc_port = 8501  # variable EXPERTD_GRPC_PORT"
    assert told["identity"].endswith(f"# identity in {config}")
    assert told["host"] == 'host = "127.0.0.1"  # default'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("no_such = 1", "unknown settings .'no_such'.; accepted: "),
        ("http_port = [", "settings.toml"),
        ("http_port = 99999", "0 to 65535 is accepted"),
    ],
)
def test_a_bad_config_exits_2(home: Path, text: str, words: str) -> None:
    config = home / "settings.toml"
    config.write_text(text)
    ended = expertd(home, "serve", "--config", str(config), "--print-config")
    assert ended.returncode == 2 and re.search(words, ended.stderr)


def test_a_variable_that_is_no_setting_is_told(home: Path) -> None:
    """But not what Kubernetes sets beside a service that is called expertd."""
    kubernetes = {"EXPERTD_PORT": "tcp://10.0.0.1:8001", "EXPERTD_SERVICE_HOST": "10.0.0.1"}
    variables = environment(home) | kubernetes | {"EXPERTD_HTP_PORT": "8500"}
    ended = subprocess.run(
        [*EXPERTD, "serve"], env=variables, capture_output=True, text=True, timeout=60
    )
    assert "EXPERTD_HTP_PORT names no setting" in ended.stderr and ended.returncode == 2
    assert ended.stderr.count("names no setting") == 1


FULL_DISK = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
from expertd.cli import main
sys.exit(main())
"""


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe"])
def test_a_full_disk_is_told_in_one_line_and_nothing_is_left(home: Path, family: str) -> None:
    out = home / "models" / "tiny"
    command = [sys.executable, "-c", FULL_DISK, "demo-model", "--out", str(out)]
    ended = subprocess.run(
        [*command, "--family", family, "--quant", "bf16"],
        env=environment(home),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 1 and "File too large" in ended.stderr
    assert "Traceback" not in ended.stderr and list(out.parent.iterdir()) == []


def test_sizes_for_which_there_is_no_memory_are_told_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(args: argparse.Namespace) -> int:
        raise MemoryError("Unable to allocate 32.0 GiB")

    monkeypatch.setattr("expertd.cli.health.run", run)
    assert main(["health", "127.0.0.1:1"]) == 1
    assert capsys.readouterr().err == "expertd: not enough memory: Unable to allocate 32.0 GiB\n"


def test_unknown_commands_and_no_command_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    for args in ([], ["srve"], ["call"]):
        with pytest.raises(SystemExit) as ended:
            main(args)
        assert ended.value.code == 2 and "usage: expertd" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert not ended.value.code and capsys.readouterr().out.startswith("expertd ")
