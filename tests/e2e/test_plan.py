"""expertd plan as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.e2e.servers import expertd, serving
from tests.processes import assert_runs

from expertd.cli import main
from expertd_client import Client

SKEWED = {"model": "m", "layers": {"3": [90, 1, 1, 1, 1, 1, 1, 4], "10": [10] * 8}}


@pytest.fixture
def counts(tmp_path: Path) -> Path:
    path = tmp_path / "counts.json"
    path.write_text(json.dumps(SKEWED))
    return path


def planned(capsys: pytest.CaptureFixture[str], counts: Path, *flags: str) -> dict[str, Any]:
    assert main(["plan", "--counts", str(counts), *flags, "--json"]) == 0
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    return answer


def test_the_hot_expert_gets_a_replica(counts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = planned(capsys, counts, "--replicas", "2")
    assert [r["experts"] for r in answer["replicas"]] == ["0-0", "1-7"]
    assert [r["rows"] for r in answer["replicas"]] == [100, 80]
    assert answer["max_over_mean"] == pytest.approx(100 / 90)
    assert answer["even_max_over_mean"] == pytest.approx(133 / 90)
    assert answer["layers"] == {"3": pytest.approx(1.8), "10": pytest.approx(70 / 40)}
    assert answer["redundant"] == {}


def test_a_redundant_expert_evens_it_out(counts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = planned(capsys, counts, "--replicas", "2", "--redundant", "1")
    assert [r["experts"] for r in answer["replicas"]] == ["0-0", "0-7"]
    assert answer["redundant"] == {"0": 1} and answer["max_over_mean"] == 1.0
    assert main(["plan", "--counts", str(counts), "--replicas", "2", "--redundant", "1"]) == 0
    shown = capsys.readouterr().out
    assert "--experts 0-7" in shown and "max/mean 1.000" in shown and "0 (+1)" in shown


def test_the_counts_of_several_replicas_are_added_up(
    counts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = counts.with_name("more.json")
    more.write_text(json.dumps({"layers": {"10": [0] * 7 + [40]}}))
    alone = planned(capsys, counts, "--replicas", "2")
    both = planned(capsys, counts, str(more), "--replicas", "2")
    assert sum(r["rows"] for r in both["replicas"]) == 180 + 40
    assert [r["rows"] for r in both["replicas"]] == [111, 109] != alone["replicas"]
    more.write_text(json.dumps({"layers": {"10": [1]}}))
    assert main(["plan", "--counts", str(counts), str(more), "--replicas", "2"]) == 2
    assert "layers with [1, 8] experts" in capsys.readouterr().err


AMISS = {
    "absent": None,
    "no JSON": "{",
    "no layers": "[]",
    "deep": "[" * 100_000,
    "text": '{"layers": {"0": ["1"]}}',
    "negative": '{"layers": {"0": [-1]}}',
    "fraction": '{"layers": {"0": [1.5]}}',
    "infinite": '{"layers": {"0": [Infinity]}}',
    "layer": '{"layers": {"first": [1]}}',
    "unequal": '{"layers": {"0": [1], "1": [1, 2]}}',
    "none": '{"layers": {}}',
    "empty": '{"layers": {"0": []}}',
}


@pytest.mark.parametrize("case", AMISS)
def test_counts_that_cannot_be_read(
    tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "counts.json"
    if (text := AMISS[case]) is not None:
        path.write_text(text)
    assert main(["plan", "--counts", str(path), "--replicas", "1"]) == 2
    assert "Traceback" not in (told := capsys.readouterr().err) and len(told) < 500


def test_more_replicas_than_experts(counts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--counts", str(counts), "--replicas", "9"]) == 2
    assert "0 redundant experts given; 1 to 64 are accepted" in capsys.readouterr().err


def test_it_reads_what_counts_writes(home: Path, counts: Path) -> None:
    with serving(home, "--demo") as server:
        with Client(server.grpc) as client:
            rows, ids = np.ones((5, 256), np.float32), np.tile([3, 9], (5, 1))
            for _ in range(2):
                client.forward("demo", 1, rows, topk_ids=ids, topk_weights=np.ones((5, 2), "f4"))
        assert expertd(home, "counts", server.grpc, "--out", str(counts)).returncode == 0
    made = expertd(home, "plan", "--counts", str(counts), "--replicas", "2", "--json")
    answer = json.loads(made.stdout)
    assert [r["rows"] for r in answer["replicas"]] == [10, 10] and set(answer["layers"]) == {
        "0",
        "1",
    }


def test_it_needs_no_torch(counts: Path) -> None:
    code = "import sys; sys.modules['torch'] = None; from expertd.cli import main; sys.exit(main())"
    shown = assert_runs(code, "plan", "--counts", str(counts), "--replicas", "3")
    assert "--experts 0-0" in shown and "predicted max/mean" in shown
