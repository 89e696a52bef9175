"""The client of the previous tag against this server, and this client against that server.

Until there is a second tag, the last commit stands for the previous one, so that the check itself
is known to work.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from google.rpc import status_pb2
from tests.e2e import servers
from tests.e2e.servers import serving

ROOT = Path(__file__).parents[2]
PACKAGES = ("service", "clients", "proto")
CALLER = """
import sys
import numpy as np
import expertd_client
from expertd_client import Client, NotFound

assert expertd_client.__file__.startswith(sys.argv[2]), expertd_client.__file__
random = np.random.default_rng(3)
with Client(sys.argv[1]) as client:
    assert client.health()
    assert {layer.model for layer in client.layers()} == {"demo", "echo"}
    rows = random.standard_normal((3, 64)).astype(np.float32)
    assert np.array_equal(client.forward("echo", 0, rows), rows)
    layer = client.layer("demo", 1)
    rows = random.standard_normal((3, layer.hidden)).astype(np.float32)
    logits = random.standard_normal((3, layer.num_experts)).astype(np.float32)
    routed = client.forward("demo", 1, rows, router_logits=logits)
    ids = np.array([[0, 1], [2, -1], [5, 4]], np.int32)
    chosen = client.forward("demo", 1, rows, topk_ids=ids, topk_weights=np.ones((3, 2), "f4"))
    assert routed.shape == chosen.shape == rows.shape
    try:
        client.forward("nobody", 0, rows)
        raise SystemExit("nobody answered")
    except NotFound as error:
        assert error.reason == "NOT_FOUND"
    print(round(float(np.abs(routed).sum() + np.abs(chosen).sum()), 2))
"""


def git(*args: str) -> bytes:
    return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, check=True).stdout


def previous() -> str:
    """The newest tag before this commit's own; HEAD while there is none."""
    here = set(git("tag", "--points-at", "HEAD").decode().split())
    tags = git("tag", "--merged", "HEAD", "--sort=-creatordate").decode().split()
    return next((tag for tag in tags if tag not in here), "HEAD")


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages as they were."""
    if not (ROOT / ".git").exists():
        pytest.skip("a source distribution has no history to compare with")
    path = tmp_path_factory.mktemp("older")
    with tarfile.open(fileobj=io.BytesIO(git("archive", previous(), *PACKAGES))) as archive:
        archive.extractall(path, filter="data")
    return path


def paths(tree: Path) -> dict[str, str]:
    """An environment in which the packages are those of a tree."""
    return {"PYTHONPATH": os.pathsep.join(str(tree / name) for name in PACKAGES)}


def ask(address: str, tree: Path) -> str:
    """What the client of a tree makes of a server."""
    ended = subprocess.run(
        [sys.executable, "-c", CALLER, address, str(tree)],
        env=os.environ | paths(tree),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.slow
def test_clients_and_servers_of_two_versions_understand_each_other(
    home: Path, older: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--demo", "--identity", "echo=64")
    with serving(home, *flags) as server:
        here = ask(server.grpc, ROOT)
        assert ask(server.grpc, older) == here
    plain = servers.environment
    monkeypatch.setattr(servers, "environment", lambda home: plain(home) | paths(older))
    with serving(home, *flags) as server:
        command = Path(f"/proc/{server.process.pid}/environ").read_bytes()
        assert str(older).encode() in command
        assert ask(server.grpc, ROOT) == here


def buf() -> str:
    found = shutil.which(
        "buf", path=f"{ROOT / '.venv-proto' / 'bin'}{os.pathsep}{os.environ['PATH']}"
    )
    return found or pytest.skip("buf is not installed; tests/wire/test_surface.py checks the same")


def breaks(new: Path, old: Path) -> str:
    """What buf says of two trees of .proto files; nothing when clients of the old one live on."""
    status = Path(status_pb2.__file__).with_name("status.proto")
    for tree in (new, old):
        (tree / "google" / "rpc").mkdir(parents=True)
        shutil.copy(status, tree / "google" / "rpc")
    ended = subprocess.run(
        [buf(), "breaking", str(new), "--against", str(old)],
        capture_output=True,
        text=True,
        env=os.environ | {"XDG_CACHE_HOME": str(new.parent / "cache")},
    )
    assert ended.returncode in (0, 100), ended.stderr
    return ended.stdout + ended.stderr


@pytest.mark.parametrize(
    ("now", "then", "says"),
    [("", "", ""), ("string model = 1;", "int64 model = 1;", "changed type")],
)
def test_buf_finds_no_break_and_would(
    older: Path, tmp_path: Path, now: str, then: str, says: str
) -> None:
    new, old = tmp_path / "new", tmp_path / "old"
    for tree, source in ((new, ROOT), (old, older)):
        shutil.copytree(source / "proto", tree, ignore=shutil.ignore_patterns("*.py*"))
    if now:
        proto = new / "expertd_wire" / "v1" / "experts.proto"
        proto.write_text(proto.read_text().replace(now, then, 1))
    told = breaks(new, old)
    assert (says in told) if says else not told
