"""What the tuner measured, seen from outside: in a layer's description, on disk, by command."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import httpx
import numpy as np
import pytest
from tests.e2e.servers import in_process

from expertd.backends.base import Batch
from expertd.backends.grouped.backend import Grouped
from expertd.capability.plan import plan
from expertd.capability.rows import ROWS
from expertd.capability.rows.grouped import ROWS as GROUPED
from expertd.cli import main
from expertd.core import QuantScheme
from expertd.weights.demo import write_demo
from expertd_client import Client
from expertd_client.errors import NoUsablePlan


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache directory of this process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "expertd"


def test_a_layer_tells_its_plans_times(cache: Path) -> None:
    with in_process("--demo", "--max-batch-tokens", "64") as (app, addresses):
        assert app.wait_ready()
        with Client(addresses.grpc) as client:
            (info,) = client.layer("demo", 1).plans
        with httpx.Client(base_url=f"http://{addresses.http}", trust_env=False) as web:
            told = web.get("/v1/layers/demo/0").json()["plans"][0]
    times = dict(info.microseconds)
    assert 1 in times and set(times) <= {1, 2, 4, 8, 16, 32, 64}
    assert all(time > 0 for time in times.values())
    assert list(told["microseconds"]) == sorted(told["microseconds"], key=int)
    assert told["microseconds"] == {str(tokens): time for tokens, time in times.items()}
    assert len(list(cache.glob("timings-*.json"))) == 1, "one table for both layers of a shape"


def test_tuning_can_be_switched_off(cache: Path) -> None:
    with in_process("--demo", "--tune", "off") as (app, addresses):
        assert app.wait_ready()
        with Client(addresses.grpc) as client:
            (info,) = client.layer("demo", 1).plans
    assert not info.microseconds and not list(cache.glob("timings-*"))


def test_every_bucket_is_warm_before_the_first_call(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warmed: list[tuple[int, ...]] = []
    monkeypatch.setattr(Grouped, "_warm_up", lambda _, tokens: warmed.append(tuple(tokens)))
    with in_process("--demo", "--max-batch-tokens", "48") as (app, _):
        assert app.wait_ready()
    assert warmed == [(1, 2, 4, 8, 16, 32, 64)] * 2, "both layers"


def test_the_command_renews_the_table(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_demo(tmp_path / "model", quant=QuantScheme.BF16)
    given = ["tune", "--model", str(tmp_path / "model"), "--device", "cpu", "--max-batch-tokens"]
    assert main([*given, "8", "--json"]) == 0
    (shape,) = json.loads(capsys.readouterr().out)["shapes"]
    assert shape["layers"] == "0-1"
    assert [bucket["tokens"] for bucket in shape["buckets"]] == [1, 2, 4, 8]
    assert {bucket["loss"] for bucket in shape["buckets"]} == {1.0}
    (table,) = cache.glob("timings-*.json")
    before = json.loads(table.read_text())["shapes"]
    assert main([*given, "8"]) == 0
    assert "chosen / fastest" in capsys.readouterr().out
    after = json.loads(table.read_text())["shapes"]
    assert len(before) == len(after) == 1 and before != after, "the same shape, measured again"


def test_a_server_reads_what_the_command_measured(cache: Path, tmp_path: Path) -> None:
    write_demo(tmp_path / "model", quant=QuantScheme.BF16)
    path = str(tmp_path / "model")
    assert main(["tune", "--model", path, "--device", "cpu", "--max-batch-tokens", "4"]) == 0
    (table,) = cache.glob("timings-*.json")
    kept = table.read_bytes()
    with in_process("--model", f"m={path}", "--max-batch-tokens", "4") as (app, _):
        assert app.wait_ready()
        (times,) = app.residents.get("m", 0).timings.plans.values()
    assert table.read_bytes() == kept
    assert list(times) == json.loads(kept)["shapes"][0]["plans"][0]["microseconds"]


@pytest.mark.parametrize(
    ("extra", "words"), [(("--layers", "9"), "9"), (("--layers", "x"), "inclusive range")]
)
def test_bad_flags_are_usage_errors(
    cache: Path,
    tmp_path: Path,
    extra: tuple[str, ...],
    words: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    write_demo(tmp_path / "model", quant=QuantScheme.BF16)
    try:
        code = main(["tune", "--model", str(tmp_path / "model"), *extra])
    except SystemExit as ended:
        code = ended.code
    assert code == 2 and words in capfd.readouterr().err


class WrongInLargeBatches(Grouped):
    """Right on the small shape that cells are proven on, wrong where a larger tile begins."""

    def _forward(self, batch: Batch) -> None:
        super()._forward(batch)
        if len(batch.rows) > 100:
            batch.out[:, 0] += 10


@pytest.mark.slow
@pytest.mark.parametrize("kind", [WrongInLargeBatches, Grouped])
def test_a_plan_that_is_wrong_on_a_layers_shape_never_serves(
    cache: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Grouped]
) -> None:
    module = "expertd.backends.grouped.backend"
    monkeypatch.setattr(f"{module}.Suspect", kind, raising=False)
    monkeypatch.setattr("expertd.capability.checks.library._backend_exists", lambda load: True)
    suspect = {"backend": "suspect", "entry": "suspect", "load": f"{module}:Suspect"}
    row = replace(GROUPED[0], needs_proof=True, **suspect)
    rows = (row, *ROWS)
    monkeypatch.setattr("expertd.engine.loader.ROWS", rows)
    monkeypatch.setattr("expertd.engine.choice.plan", partial(plan, rows=rows))
    with in_process("--demo", "--layers", "0", "--max-batch-tokens", "128") as (app, addresses):
        assert app.wait_ready()
        tokens = np.ones((120, 256), np.float32), np.random.default_rng(0).normal(size=(120, 32))
        call = {"hidden_states": tokens[0], "router_logits": tokens[1].astype(np.float32)}
        with Client(addresses.grpc) as client:
            told = {info.backend: info for info in client.layer("demo", 0).plans}
            if kind is Grouped:
                assert told["suspect"].state == "proven" and told["suspect"].microseconds
                assert client.call("demo", 0, **call, backend="suspect").backend == "suspect"
                return
            assert list(told) == ["grouped"]
            assert client.call("demo", 0, **call).backend == "grouped"
            with pytest.raises(NoUsablePlan) as refused:
                client.call("demo", 0, **call, backend="suspect")
    assert "proof_failed" in {reason.code for reason in refused.value.reasons}
