"""No tile that does not fit a card's shared memory is ever chosen, told without any card."""

from __future__ import annotations

import os
import random
from dataclasses import replace

import pytest
import torch
from tests.compiled import (
    CARDS,
    CELLS,
    backend_of,
    compiling_for,
    laid_out,
    random_cut,
    sums_apart,
)

from expertd.backends.triton.backend import Triton
from expertd.backends.triton.shared import COLUMNS, Card, columns, fitted, need
from expertd.backends.triton.tiles import Cut, Tile, by_rule, table
from expertd.capability.row import Row
from expertd.core import QuantScheme

CPU = torch.device("cpu")
PAIRS = (1, 8, 64, 300, 4000, 100_000)
NAMES = [f"{quant}-{row.activation_quant}" for row, quant in CELLS]
cells = pytest.mark.parametrize(("row", "quant"), CELLS, ids=NAMES)


@pytest.fixture
def chance() -> random.Random:
    """EXPERTD_TEST_SEED repeats a run."""
    seed = os.environ.get("EXPERTD_TEST_SEED") or str(random.SystemRandom().randrange(1 << 32))
    print("EXPERTD_TEST_SEED =", seed)
    return random.Random(seed)


def needs(backend: Triton, cut: Cut, card: Card) -> list[int]:
    """What both GEMMs need by our own account."""
    halves = 2 if backend.spec.activation.gated else 1
    first, second = backend._native.first, backend._native.second
    return [
        need(cut.first, first, halves, card),
        need(cut.second, second, 1, card),
    ]


def sums(backend: Triton, cut: Cut) -> list[int]:
    """How many columns of tensor memory both GEMMs take, likewise."""
    halves = 2 if backend.spec.activation.gated else 1
    first, second = backend._native.first, backend._native.second
    return [columns(cut.first, first, halves), columns(cut.second, second, 1)]


@cells
@pytest.mark.parametrize("gated", [True, False])
def test_every_cut_fits_every_card(row: Row, quant: QuantScheme, gated: bool) -> None:
    """By rule, from the table (measured on other halves, or another card) and far too large."""
    backend = backend_of(row, quant, gated, CPU)
    first, second = backend._native.first, backend._native.second
    huge = Tile(128, 128, 128, warps=8, stages=9, swapped=True, mapped=True, short=64)
    cuts = [Cut(True, False, huge, huge), Cut(False, True, huge, huge)]
    cuts += [by_rule(pairs, 6, first, second, pairs) for pairs in PAIRS]
    cuts += [one.cut for one in table() if one.work.weights == quant]
    for card in CARDS.values():
        for cut in cuts:
            found = fitted(cut, first, second, gated, card)
            assert max(needs(backend, found, card)) <= card.shared, (card, cut)
            assert not card.sums_apart or max(sums(backend, found)) <= COLUMNS, cut
            assert found == fitted(found, first, second, gated, card)


@cells
def test_what_fits_stays_as_it_is(row: Row, quant: QuantScheme) -> None:
    """Tiles by rule on any card, and what was measured on the card and the halves it is for."""
    for gated in (True, False):
        backend = backend_of(row, quant, gated, CPU)
        first, second = backend._native.first, backend._native.second
        for card in CARDS.values():
            cuts = [by_rule(pairs, 6, first, second, pairs) for pairs in PAIRS]
            kind = (card.arch, quant, row.activation_quant, gated)
            cuts += [one.cut for one in table() if _kind(one.work) == kind]
            if card.sums_apart:
                cuts = [cut for cut in cuts if max(sums(backend, cut)) <= COLUMNS]
            assert [fitted(cut, first, second, gated, card) for cut in cuts] == cuts


def _kind(work: object) -> tuple[object, ...]:
    return tuple(getattr(work, name) for name in ("arch", "weights", "rows", "gated"))


@pytest.mark.parametrize("arch", ["sm80", "sm90", "sm120"])
def test_the_need_covers_what_triton_lays_out(arch: str, chance: random.Random) -> None:
    compare(arch, 1, chance)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("arch", CARDS)
def test_the_need_covers_what_triton_lays_out_at_length(arch: str, chance: random.Random) -> None:
    compare(arch, 8, chance)


def compare(arch: str, count: int, chance: random.Random) -> None:
    """Random cuts of random cells, compiled for a card that is not here."""
    card = CARDS[arch]
    with compiling_for(arch):
        for _ in range(count):
            row, quant = chance.choice([one for one in CELLS if runs(one[0], arch)])
            backend = backend_of(row, quant, chance.random() < 0.6, CPU)
            cut = random_cut(row, quant, arch, chance)
            found, expected = laid_out(backend, cut), needs(backend, cut, card)
            print(arch, quant, row.activation_quant, cut.first, cut.sorted, found, expected)
            assert all(f <= e for f, e in zip(found, expected, strict=True))
            if card.sums_apart:
                found, expected = sums_apart(backend, cut), sums(backend, cut)
                print(found, expected)
                assert all(f <= e for f, e in zip(found, expected, strict=True))


def runs(row: Row, arch: str) -> bool:
    """Cards before SM89 have no fp8 to multiply, nor can Triton round to it."""
    return arch not in ("sm80", "sm86") or row.activation_quant == "bf16"


@pytest.mark.parametrize("quant", [QuantScheme.MXFP4, QuantScheme.NVFP4, QuantScheme.MXINT4])
def test_what_was_too_large_for_tensor_memory(quant: QuantScheme) -> None:
    """Packed weights are multiplied as four matrices: 1024 columns were asked of 512."""
    row = next(row for row, found in CELLS if found == quant)
    backend = backend_of(row, quant, True, CPU)
    first, second = backend._native.first, backend._native.second
    rule = by_rule(100_000, 6, first, second, 50_000)
    cut = fitted(rule, first, second, True, CARDS["sm100"])
    assert cut == replace(rule, first=replace(rule.first, n=64))
    with compiling_for("sm100"):
        assert max(sums_apart(backend, rule)) > COLUMNS >= max(sums_apart(backend, cut))


def test_what_was_too_large_for_an_h200() -> None:
    """The tiles of a layer without a gate, for one with: 278528 bytes were asked of 232448."""
    row, quant = next(one for one in CELLS if one[0].activation_quant == "fp8_tensor")
    card = CARDS["sm90"]
    tile = Tile(16, 128, 256, stages=5)
    for gated in (True, False):
        backend = backend_of(row, quant, gated, CPU)
        native = backend._native
        cut = Cut(True, False, tile, tile)
        with compiling_for("sm90"):
            assert (laid_out(backend, cut)[0] > card.shared) == gated
            found = fitted(cut, native.first, native.second, gated, card)
            assert found.first == (replace(tile, stages=4) if gated else tile)
            assert max(laid_out(backend, found)) <= card.shared
