"""Which layers and experts go onto which card; imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from expertd.core import LayerSpec
from expertd.weights.storage import layer_bytes


@dataclass(frozen=True, slots=True)
class Placement:
    """What one card holds; experts [begin, end) of each of its layers, or all when None."""

    layers: tuple[int, ...]
    experts: tuple[int, int] | None
    nbytes: int


def propose(specs: Mapping[int, LayerSpec], room: int, count: int) -> list[Placement] | None:
    """Whole layers on as few cards as they take, else equal shares of experts on every card.

    room is what a card has for experts. None when the cards cannot hold them either way.
    """
    return _by_layers(specs, room, count) or _by_experts(specs, room, count)


def _by_layers(specs: Mapping[int, LayerSpec], room: int, count: int) -> list[Placement] | None:
    """Neighbouring layers share a card: a row visits each card once."""
    cards: list[Placement] = []
    for number in sorted(specs):
        nbytes = layer_bytes(specs[number])
        if cards and cards[-1].nbytes + nbytes <= room:
            last = cards[-1]
            cards[-1] = Placement((*last.layers, number), None, last.nbytes + nbytes)
        else:
            cards.append(Placement((number,), None, nbytes))
    fits = len(cards) <= count and all(card.nbytes <= room for card in cards)
    return cards if fits else None


def _by_experts(specs: Mapping[int, LayerSpec], room: int, count: int) -> list[Placement] | None:
    """Every layer on every card, each with its share; needs layers with equally many experts."""
    sizes = {spec.num_experts for spec in specs.values()}
    if len(sizes) != 1 or min(sizes) < count:
        return None
    (experts,) = sizes
    bounds = [experts * card // count for card in range(count + 1)]
    cards = []
    for begin, end in zip(bounds, bounds[1:], strict=False):
        held = (replace(s, expert_begin=begin, expert_end=end) for s in specs.values())
        cards.append(Placement(tuple(sorted(specs)), (begin, end), sum(map(layer_bytes, held))))
    return cards if all(card.nbytes <= room for card in cards) else None
