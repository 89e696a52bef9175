"""What a proof holds for: another device, library, module or line of code is another claim."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from expertd.capability.device import DeviceInfo, detect
from expertd.proof import fingerprint as facts
from expertd.proof.fingerprint import fingerprint


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> DeviceInfo:
    monkeypatch.setenv("FLASHINFER_WORKSPACE_BASE", str(tmp_path))
    monkeypatch.setattr(facts, "DRIVER", tmp_path / "driver")
    return replace(detect("cpu"), flashinfer="1.2.3")


def test_it_is_the_same_until_something_changes(
    here: DeviceInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [fingerprint(here)]
    assert fingerprint(here) == found[0]

    (tmp_path / "driver").write_text("580.1")
    found.append(fingerprint(here))
    for change in ({"name": "x"}, {"arch": "sm90"}, {"simulated": True}, {"flashinfer": "1.2.4"}):
        found.append(fingerprint(replace(here, **change)))
    monkeypatch.setattr(facts, "_sources", lambda package: "another line")
    found.append(fingerprint(here))
    versions = dict.fromkeys(facts.PACKAGES, "1")
    monkeypatch.setattr(facts, "_version", versions.get)
    for package in facts.PACKAGES:
        versions[package] = "2"
        found.append(fingerprint(here))
    assert len(set(found)) == len(found)


def test_a_module_that_is_built_anew_is_another(here: DeviceInfo, tmp_path: Path) -> None:
    module = tmp_path / ".cache/flashinfer/1.2.3/90a/cached_ops/fused_moe_90/fused_moe_90.so"
    other = module.parents[1] / "sampling" / "sampling.so"
    other.parent.mkdir(parents=True)
    before = fingerprint(here)
    other.write_bytes(b"nothing of ours")
    assert fingerprint(here) == before

    module.parent.mkdir()
    module.write_bytes(b"one")
    built = fingerprint(here)
    module.write_bytes(b"two")
    os.utime(module, ns=(1, 1))
    assert len({before, built, fingerprint(here)}) == 3


@pytest.mark.parametrize("name", ["backends/own/loop.py", "backends/tiles.json", "proof/cases.py"])
def test_code_that_changes_without_a_new_version_is_another(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.parent.mkdir(parents=True)
    told = set()
    for text in ("a = 1", "a = 2"):
        file.write_text(text)
        facts._sources.cache_clear()
        told.add(facts._sources(tmp_path))
    assert len(told) == 2


def test_a_link_that_leads_nowhere_keeps_no_server_from_starting(tmp_path: Path) -> None:
    room = tmp_path / "backends"
    room.mkdir()
    facts._sources.cache_clear()
    before = facts._sources(tmp_path)
    (room / ".#open.py").symlink_to("someone@somewhere.1:2")
    facts._sources.cache_clear()
    assert facts._sources(tmp_path) == before


def test_without_flashinfer_its_modules_are_not_looked_for(
    here: DeviceInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("FLASHINFER_WORKSPACE_BASE")
    monkeypatch.setattr(facts.Path, "home", homeless)
    assert fingerprint(replace(here, flashinfer=None))
