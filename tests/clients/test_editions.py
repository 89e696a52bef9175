"""Which replicas may answer one call together, for any set of them."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from expertd_client.fleet.editions import Offer, choose, editions
from expertd_wire.v1 import experts_pb2 as pb

EXPERTS = 8
RANGES = [(0, 8), (0, 4), (4, 8), (2, 6)]


@st.composite
def fleets(draw: st.DrawFn) -> list[Offer]:
    """Replicas of two checkpoints at most, some of which do not say which."""
    offers = []
    for number in range(draw(st.integers(0, 7))):
        begin, end = draw(st.sampled_from(RANGES))
        info = pb.LayerInfo(
            num_experts=EXPERTS,
            hidden=draw(st.sampled_from([64, 64, 64, 128])),
            expert_begin=begin,
            expert_end=end,
            weights_digest=draw(st.sampled_from(["a", "a", "b"])),
            checkpoint_digest=draw(st.sampled_from(["", "", "one", "two"])),
            queued_tokens=draw(st.integers(0, 9)),
            generation=draw(st.integers(1, 3)),
        )
        offers.append(Offer(f"r{number}:1", info))
    return offers


@settings(max_examples=300, deadline=None)
@given(fleets())
def test_an_edition_is_of_one_kind(offers: list[Offer]) -> None:
    found = editions(offers)
    used = Counter(offer.target for edition in found for offer in edition.offers)
    assert set(used.values()) <= {1}, "a replica is in two editions"
    for edition in found:
        kinds = {(o.layer.hidden, o.layer.checkpoint_digest) for o in edition.offers}
        assert len(kinds) <= 1
        by_range: dict[tuple[int, int], set[str]] = {}
        for offer in edition.offers:
            by_range.setdefault(offer.range, set()).add(offer.layer.weights_digest)
        assert all(len(digests) == 1 for digests in by_range.values())
    left_out = {offer.target for offer in offers} - set(used)
    told = " ".join(edition.mismatch for edition in found)
    assert all(target in told for target in left_out), "left out without a word"
    assert len({edition.key for edition in found}) == len(found)


@settings(max_examples=200, deadline=None)
@given(fleets(), st.randoms())
def test_the_choice_does_not_depend_on_who_was_first(offers: list[Offer], order: object) -> None:
    chosen = choose(editions(offers), None)
    order.shuffle(offers)  # type: ignore[attr-defined]
    again = choose(editions(offers), None)
    assert (chosen is None) == (again is None) == (not offers)
    if chosen is not None and again is not None:
        assert chosen.key == again.key
        most = min(len(edition.absent()) for edition in editions(offers))
        assert len(chosen.absent()) == most


def test_the_edition_in_use_is_kept_while_it_is_complete() -> None:
    def offer(number: int, digest: str, end: int = EXPERTS) -> Offer:
        info = pb.LayerInfo(num_experts=EXPERTS, expert_end=end, weights_digest=digest)
        return Offer(f"r{number}:1", info)

    old, new = [offer(0, "old")], [offer(n, "new") for n in (1, 2)]
    current = choose(editions(old), None)
    assert current is not None
    kept = choose(editions(old + new), current.key)
    assert kept is not None and kept.key == current.key
    fresh = choose(editions(old + new), None)
    assert fresh is not None and fresh.key != current.key
    gone = choose(editions(new), current.key)
    assert gone is not None and gone.key == fresh.key
