"""The fused experts in Triton's interpreter, and what can be told of their parts without a card."""

from __future__ import annotations

import pytest
import torch
from tests.service.triton.expert_checks import *  # noqa: F403
from tests.service.triton.expert_checks import batch_of, error, layer, row_of
from tests.strategies import generator, random_topk, random_weights

from expertd.backends.triton.align import Blocks, align, most_blocks, scratch_ints
from expertd.backends.triton.backend import Triton
from expertd.backends.triton.tiles import Cut, Tile, Work, measured, table
from expertd.backends.triton.weights import FORMATS
from expertd.capability.rows.triton import ROWS
from expertd.core import QuantScheme


@pytest.mark.parametrize(("experts", "first", "held"), [(9, 0, 9), (9, 3, 4), (64, 1, 1)])
@pytest.mark.parametrize(
    ("tokens", "top_k", "size"),
    [(1, 3, 16), (50, 8, 16), (130, 9, 64), (400, 9, 32), (4000, 9, 64)],
)
def test_pairs_are_sorted_into_blocks(
    experts: int, first: int, held: int, tokens: int, top_k: int, size: int, seed: int
) -> None:
    ids, _ = random_topk(tokens, experts, top_k, generator(seed))
    ids[::3, 0] = -1
    heights = (size, 32)
    ints = sum(scratch_ints(ids.numel(), held, heights))
    scratch = torch.full((ints,), -7, dtype=torch.int32)
    for blocks, height in zip(align(ids, first, held, heights, scratch), heights, strict=True):
        check_blocks(blocks, ids.flatten(), held, height)


def check_blocks(blocks: Blocks, flat: torch.Tensor, held: int, height: int) -> None:
    """Every held pair is in one block of its expert, and no other pair is in any."""
    seen: list[int] = []
    for block in range(blocks.most):
        expert = int(blocks.expert[block])
        if expert < 0:
            continue
        begin = int(blocks.start[block])
        mine = blocks.order[begin : min(begin + height, int(blocks.ends[expert + 1]))].long()
        assert len(mine) and bool((flat[mine] == expert + blocks.first).all())
        seen += mine.tolist()
    kept = ((flat >= blocks.first) & (flat < blocks.first + held)).nonzero().flatten().tolist()
    assert sorted(seen) == kept


@pytest.mark.parametrize("pairs", [1, 7, 100])
@pytest.mark.parametrize("held", [1, 5, 300])
def test_no_split_needs_more_blocks(pairs: int, held: int) -> None:
    """All of one expert, one each, and everything between."""
    for busy in range(1, min(pairs, held) + 1):
        lone = pairs - busy + 1
        assert -(-lone // 16) + busy - 1 <= most_blocks(pairs, held, 16)


CUTS = [
    Cut(True, False, Tile(32, 64, 64, together=2), Tile(32, 32, 32, together=3)),
    Cut(True, False, Tile(16, 64, 64, swapped=True), Tile(16, 128, 128, swapped=True)),
    Cut(False, True, Tile(16, 32, 128), Tile(16, 64, 64)),
    Cut(True, True, Tile(64, 64, 64, swapped=True), Tile(64, 64, 32)),
    Cut(True, False, Tile(64, 64, 64, mapped=True, short=16), Tile(64, 64, 64, mapped=True)),
    Cut(True, False, Tile(32, 64, 64, mapped=True), Tile(64, 64, 64, mapped=True, short=16)),
]


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("quant", [QuantScheme.BF16, QuantScheme.MXFP4, QuantScheme.MXFP8])
def test_every_cut_gives_the_same(
    cut: Cut, quant: QuantScheme, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Triton, "_cut", lambda self, tokens, top_k: cut)
    spec = layer(quant)
    weights = random_weights(spec, generator(seed))
    assert error(row_of(quant, "bf16"), spec, weights, batch_of(spec, 30, 4, seed)) <= 1


def test_every_scheme_of_the_rows_has_a_format() -> None:
    assert {quant for row in ROWS for quant in row.quants} == set(FORMATS)


def test_the_table_is_for_cards_that_were_measured() -> None:
    here = Work("", "bf16", "bf16", True, 2048, 768, 128)
    assert measured(here, 8) is None
    for one in table():
        assert measured(one.work, one.pairs) == one.cut


@pytest.mark.parametrize(("tokens", "sorted_"), [(1, False), (8, True), (16, True)])
def test_one_tokens_tiles_are_no_guide_to_a_few(tokens: int, sorted_: bool) -> None:
    """Of another layer than those measured: 128 pairs of 128 experts are one an expert, too."""
    cut = measured(Work("sm90", "bf16", "bf16", True, 4096, 1536, 128), tokens * 8)
    assert cut is not None and cut.sorted is sorted_
