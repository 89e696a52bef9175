"""Which replicas are to do some work now, and what becomes of a call while none can."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from expertd_client.errors import ExpertsUnavailable
from expertd_client.fleet.editions import Edition, Offer
from expertd_client.replicas import Fleet
from expertd_client.sharding import Split, Work, split_experts, split_tokens

Shard = Literal["auto", "tokens", "experts"]

_HOLD_SECONDS = 0.1
"""Pauses end without a word, so a held call looks again this often."""


@dataclass(frozen=True, slots=True)
class Policy:
    """A pool's settings that concern each call."""

    shard: Shard = "auto"
    wait_for_experts: bool = True
    hedge: bool = False

    def sums(self, edition: Edition) -> bool:
        """Whether a layer is split by experts, so that partial sums are added."""
        if not edition.layer.num_experts or self.shard == "tokens":
            return False
        return self.shard == "experts" or not any(offer.complete for offer in edition.offers)


class Changed(Exception):
    """Other weights, or another way to split, are now the ones to use: begin again."""


class Placement:
    """The weights that one call uses from its beginning to its end, and who has them now."""

    def __init__(
        self, fleet: Fleet, policy: Policy, layer: tuple[str, int], edition: Edition, allow: bool
    ) -> None:
        self._fleet = fleet
        self._policy = policy
        self._layer = layer
        self._allow = allow
        self.edition = edition
        self.sums = policy.sums(edition)
        self.waiting: set[str] = set()

    async def place(
        self, work: Work, excluded: frozenset[str], callers: int, *, some: bool = False
    ) -> Split:
        """Parts for those who can; waits while nobody can, unless work may be left out.

        some: waits only while nobody can do anything of it. Replicas in excluded, and those that
        are stalled, are asked only if there is no other. Raises ExpertsUnavailable, or Changed.
        """
        while True:
            stalled = {r.target for r in self._fleet.replicas.values() if r.stalled}
            for barred in (excluded | stalled, excluded, frozenset[str]()):
                split = self.split(work, barred, callers)
                if split.missing is None:
                    return split
            if some and split.parts:
                return split
            assert split.missing is not None
            nobody = self.split(work, frozenset(), callers, paused=True).missing
            text = self._text(nobody or split.missing)
            if nobody is not None and self._left_out(text):
                return split
            self.waiting.add(text)
            await self._fleet.changed(_HOLD_SECONDS)
            self.waiting.discard(text)

    def split(
        self, work: Work, barred: frozenset[str], callers: int, *, paused: bool = False
    ) -> Split:
        """By the holders of now; paused counts those too that are left alone for a while."""
        now = asyncio.get_running_loop().time()
        able = [
            offer
            for offer in self._offers()
            if offer.target not in barred
            and (self.sums or offer.complete)
            and (paused or self._fleet.replicas[offer.target].pause.over(now))
        ]
        holders = self._fleet.holders(able, now)
        return (split_experts if self.sums else split_tokens)(work, holders, callers)

    def _offers(self) -> Sequence[Offer]:
        found = self._fleet.editions(*self._layer)
        return next((e.offers for e in found if e.key == self.edition.key), ())

    def _left_out(self, text: str) -> bool:
        """Whether to go on without what nobody holds; raises if the call must not wait for it."""
        current = self._fleet.edition(*self._layer)
        if current is not None:
            now = (current.key, self._policy.sums(current))
            if now != (self.edition.key, self.sums):
                raise Changed
        if not self._fleet.all_contacted:
            return False
        if self._allow:
            return True
        if not self._policy.wait_for_experts:
            raise self.unavailable([text])
        return False

    def _text(self, missing: Work) -> str:
        """Which experts nobody has now, and why."""
        if missing.ids is None:
            text = "no replica that holds all experts can be asked"
        else:
            experts = np.unique(missing.ids[missing.ids >= 0])
            text = f"no replica can be asked for experts {_ranges(experts)}"
        reasons = [self.edition.mismatch] if self.edition.mismatch else []
        if others := self._others():
            reasons.append(f"of other weights or settings: {', '.join(others)}")
        return f"{text} ({'; '.join(reasons)})" if reasons else text

    def _others(self) -> list[str]:
        """Replicas of the same layer that cannot be mixed with those of this call."""
        found = self._fleet.editions(*self._layer)
        return sorted(o.target for e in found if e.key != self.edition.key for o in e.offers)

    def unavailable(self, texts: Sequence[str]) -> ExpertsUnavailable:
        """The error that names the layer and what it lacks."""
        model, layer = self._layer
        return ExpertsUnavailable(f"layer {model}/{layer}: {'; '.join(filter(None, texts))}")


async def agreed_edition(fleet: Fleet, layer: tuple[str, int], policy: Policy) -> Edition:
    """The weights that a new call is to use; waits while nobody has any.

    Raises NotFound, LayerFailed, or ExpertsUnavailable if the call must not wait.
    """
    while True:
        edition = fleet.edition(*layer)
        if edition is not None:
            return edition
        if fleet.all_contacted and not policy.wait_for_experts:
            raise none_ready(fleet, layer)
        await fleet.changed(_HOLD_SECONDS)


def none_ready(fleet: Fleet, layer: tuple[str, int]) -> ExpertsUnavailable:
    """The error of a layer of which nothing is to be had."""
    why = f" ({fleet.absent})" if fleet.absent else ""
    return ExpertsUnavailable(
        f"layer {layer[0]}/{layer[1]}: no replica is ready for any of its experts{why}"
    )


def _ranges(experts: NDArray[np.int64], most: int = 8) -> str:
    """0-3, 7, 9-12"""
    runs = np.split(experts, np.flatnonzero(np.diff(experts) != 1) + 1)
    texts = [f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs if len(run)]
    return ", ".join(texts[:most]) + (", …" if len(texts) > most else "")
