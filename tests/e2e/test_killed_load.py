"""A process that is killed leaves nothing behind, and the next one starts as if it had not been."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from tests.e2e.servers import EXPERTD, MINUTE, PORTS, environment, expertd, serving
from tests.service.weights.files import large

from expertd.weights.checkpoint import Checkpoint
from expertd.weights.writer import DRAFT, draft, new_directory
from expertd_client import Client

SHM = Path("/dev/shm")


@contextmanager
def started(home: Path, *args: str) -> Iterator[subprocess.Popen[str]]:
    """A command with a folder for temporary files of its own, `home/tmp`."""
    (home / "tmp").mkdir(exist_ok=True)
    variables = environment(home) | {"TMPDIR": str(home / "tmp")}
    with subprocess.Popen(
        [*EXPERTD, *args], env=variables, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def tree(*roots: Path) -> set[Path]:
    return {path for root in roots for path in root.rglob("*")}


def until(done: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + MINUTE
    while not done():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.001)


def opens(process: subprocess.Popen[str], file: Path) -> bool:
    """Whether the process has the file open at this moment."""
    try:
        return any(os.readlink(fd) == str(file) for fd in Path(f"/proc/{process.pid}/fd").iterdir())
    except OSError:  # a descriptor that was closed meanwhile
        return False


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    assert process.wait(MINUTE) == -signal.SIGKILL


def anonymous_bytes(process: subprocess.Popen[str]) -> int:
    text = Path(f"/proc/{process.pid}/status").read_text()
    return sum(int(line.split()[1]) << 10 for line in text.splitlines() if "RssAnon" in line)


def killed_within_its_load(home: Path, model: Path) -> bool:
    """Kills a server when a tenth of the 600 MB is there; whether it had not all of them yet."""
    with started(home, "serve", *PORTS, "--model", f"m={model}") as process:
        until(lambda: opens(process, model / "model.safetensors"), process)
        empty = anonymous_bytes(process)
        until(lambda: anonymous_bytes(process) > empty + (64 << 20), process)
        kill(process)
        assert process.stderr is not None
        return '"bytes": 603979776' not in process.stderr.read()


@pytest.mark.slow
def test_a_server_killed_while_it_loads_leaves_nothing(tmp_path: Path) -> None:
    model = large(tmp_path / "m")
    for attempt in range(5):
        home = tmp_path / f"home {attempt}"
        (home / "tmp").mkdir(parents=True)
        shm, before = tree(SHM), tree(tmp_path)
        if killed_within_its_load(home, model):
            break  # on a busy machine it may be over before this process gets its turn
    else:
        raise AssertionError("killed too late, each time")
    assert tree(tmp_path) == before and tree(SHM) <= shm
    with serving(home, "--model", f"m={model}") as server, Client(server.grpc) as client:
        (info,) = client.layers("m")
        assert info.state == "ready"
        rows = np.ones((2, info.hidden), np.float32)
        out = client.forward("m", 0, rows, router_logits=np.zeros((2, 64), np.float32))
        assert np.array_equal(out, np.zeros_like(rows))


def drafts(parent: Path) -> list[Path]:
    return list(parent.glob(f".*{DRAFT}"))


COMMANDS = {
    "demo-model": ("demo-model", "--quant", "nvfp4"),
    "quantize": ("quantize", "--quant", "fp8_block128", "--model"),
}


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_the_next_run_of_a_killed_command_clears_its_drafts(command: str, tmp_path: Path) -> None:
    args = list(COMMANDS[command])
    (home := tmp_path / "home").mkdir()
    (out := tmp_path / "out").mkdir()
    if command == "quantize":
        args.append(str(large(tmp_path / "m")))
    with started(home, *args, "--out", str(out / "killed")) as process:
        until(lambda: bool(drafts(out)), process)
        kill(process)
    assert drafts(out) and not (out / "killed").exists() and not tree(home / "tmp")
    made = expertd(home, "demo-model", "--out", str(out / "next"), "--quant", "bf16")
    assert made.returncode == 0, made.stderr
    assert {path.name for path in out.iterdir()} == {"next"}
    assert Checkpoint.open(out / "next").tensors


def test_a_draft_that_is_being_written_stays(tmp_path: Path) -> None:
    other = tmp_path / f".something{DRAFT}.txt"
    other.write_text("of somebody else")
    with new_directory(tmp_path / "a") as first:
        (first / "half").write_text("done")
        with draft(tmp_path / "b") as second:
            assert sorted(drafts(tmp_path)) == sorted([first, second])
        assert drafts(tmp_path) == [first] and (first / "half").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"a", other.name}


def test_links_that_look_like_drafts_are_not_followed(tmp_path: Path) -> None:
    (kept := tmp_path / "kept").mkdir()
    (kept / "file").write_text("kept")
    (out := tmp_path / "out").mkdir()
    (out / f".x{DRAFT}").symlink_to(kept)
    with draft(out / "a"):
        pass
    assert (kept / "file").read_text() == "kept" and (out / f".x{DRAFT}").is_symlink()
