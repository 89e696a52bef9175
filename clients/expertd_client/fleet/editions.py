"""Which replicas may answer one call together: those whose weights are of one checkpoint."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from expertd_wire.v1 import experts_pb2 as pb


@dataclass(frozen=True, slots=True)
class Offer:
    """What a replica says of a layer that it holds, or a range of it."""

    target: str
    layer: pb.LayerInfo

    @property
    def complete(self) -> bool:
        return self.range == (0, self.layer.num_experts)

    @property
    def range(self) -> tuple[int, int]:
        return self.layer.expert_begin, self.layer.expert_end


@dataclass(frozen=True, slots=True)
class Edition:
    """Offers that fit together; mismatch says which others do not fit, and why."""

    key: tuple[bytes, str]
    layer: pb.LayerInfo
    offers: tuple[Offer, ...]
    mismatch: str = ""

    def absent(self) -> NDArray[np.int64]:
        """The experts that no offer has."""
        held = np.zeros(self.layer.num_experts, np.bool_)
        for offer in self.offers:
            held[slice(*offer.range)] = True
        return np.flatnonzero(~held)


def editions(offers: Iterable[Offer]) -> list[Edition]:
    """Offers that may be mixed, by their settings and digests.

    checkpoint_digest is of the whole layer, whatever is held of it. weights_digest is of the
    experts in a range as they were loaded, so equal ranges must have equal ones; where partial
    ranges contradict each other, none of them can be told to be right, and none is used.
    """
    by_settings: dict[bytes, list[Offer]] = defaultdict(list)
    for offer in offers:
        by_settings[_settings(offer.layer)].append(offer)
    return [found for key, alike in by_settings.items() for found in _by_digest(key, alike)]


def choose(found: Sequence[Edition], current: tuple[bytes, str] | None) -> Edition | None:
    """The edition that holds most of the experts, then the current one, then the most replicas."""
    return max(
        found,
        key=lambda e: (-len(e.absent()), e.key == current, len(e.offers), e.key),
        default=None,
    )


def _settings(layer: pb.LayerInfo) -> bytes:
    """All that replicas of one layer must agree on, as bytes that compare."""
    told = pb.LayerInfo(
        hidden=layer.hidden,
        intermediate=layer.intermediate,
        num_experts=layer.num_experts,
        top_k=layer.top_k,
        routing=layer.routing if layer.HasField("routing") else None,
        activation=layer.activation if layer.HasField("activation") else None,
        quant=layer.quant,
        checkpoint_digest=layer.checkpoint_digest,
    )
    data: bytes = told.SerializeToString(deterministic=True)
    return data


def _by_digest(key: bytes, alike: Sequence[Offer]) -> list[Edition]:
    digests: dict[tuple[int, int], dict[str, list[Offer]]] = defaultdict(lambda: defaultdict(list))
    for offer in alike:
        digests[offer.range][offer.layer.weights_digest].append(offer)
    complete = {
        digest: offers
        for held, by_digest in digests.items()
        if held == (0, alike[0].layer.num_experts)
        for digest, offers in by_digest.items()
    }
    agreed, refused = _partial(digests, alike[0].layer.num_experts)
    if len(complete) < 2:
        complete = {"".join(complete): [offer for some in complete.values() for offer in some]}
        complete[next(iter(complete))] += agreed
    elif agreed or refused:
        complete[""] = agreed
    return [
        Edition((key, digest), (offers or list(alike))[0].layer, tuple(offers), refused)
        for digest, offers in complete.items()
    ]


def _partial(
    digests: dict[tuple[int, int], dict[str, list[Offer]]], experts: int
) -> tuple[list[Offer], str]:
    """Offers of ranges that have one digest, and what the others are."""
    agreed: list[Offer] = []
    refused = []
    for (begin, end), by_digest in sorted(digests.items()):
        if (begin, end) == (0, experts):
            continue
        if len(by_digest) == 1:
            agreed += next(iter(by_digest.values()))
            continue
        who = "; ".join(
            f"{digest[:12] or 'none'} at {', '.join(offer.target for offer in offers)}"
            for digest, offers in sorted(by_digest.items())
        )
        refused.append(f"experts {begin}-{end - 1} have different weights_digest: {who}")
    return agreed, "; ".join(refused)
