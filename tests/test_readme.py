"""The README says nothing that does not work: its snippets run, its names exist."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.e2e.servers import Server, serving
from tests.imports import ROOT

from expertd.cli import COMMANDS
from expertd.config import SETTINGS

README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def rows(heading: str) -> Iterator[list[str]]:
    """The cells of the table under a heading."""
    section = README.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    assert lines
    return ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    told = ("--demo", "--device", "cpu", "--expert-rows")
    with serving(tmp_path_factory.mktemp("home"), *told) as ready:
        yield ready


@pytest.mark.parametrize("snippet", SNIPPETS, ids=["gRPC", "HTTP"])
def test_the_snippets_answer(snippet: str, server: Server) -> None:
    for given, real in (("127.0.0.1:8001", server.grpc), ("127.0.0.1:8000", server.http)):
        snippet = snippet.replace(given, real)
    command = [sys.executable, "-c", snippet]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=60, check=True)
    assert done.stdout.startswith("(16, 256) float32")


def test_the_metrics_exist(server: Server) -> None:
    with urlopen(f"{server.url}/metrics") as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    named = {name for cells in rows("Metrics") for name in re.findall("expertd_\\w+", cells[0])}
    assert {name.removesuffix("_total") for name in named} == {family.name for family in families}


def test_the_settings_exist_with_these_defaults() -> None:
    real = {setting.flag: setting.default for setting in SETTINGS}
    for flags, default, _ in rows("Settings"):
        told = re.findall(r"`(.+?)`", default)
        for number, flag in enumerate(re.findall(r"`(--[\w-]+)", flags)):
            empty = real[flag] in (None, False, ()) and not told
            assert empty or type(real[flag])(told[number]) == real[flag], flag


def test_the_commands_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    assert set(re.findall(r"\bmake (serve|test[a-z-]*)", README)) <= targets
    shell = re.findall(r"(?:`|bin/)expertd ([a-z-]+)", README)
    assert shell and set(shell) <= {command.name for command in COMMANDS}


def test_the_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert links and [link for link in links if not Path(ROOT, link).exists()] == []
