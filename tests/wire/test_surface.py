"""The wire only grows: what clients in the field rely on never changes its meaning."""

from __future__ import annotations

from tests.wire.surface import RECORD, surface


def test_nothing_recorded_has_changed() -> None:
    gone = sorted(set(_recorded()) - set(surface()))
    assert not gone, f"the wire lost or changed {gone}; only additions are allowed"


def test_every_addition_is_recorded() -> None:
    new = sorted(set(surface()) - set(_recorded()))
    assert not new, f"record {new}: python tests/wire/surface.py > {RECORD.name}"


def _recorded() -> list[str]:
    return RECORD.read_text().splitlines()
