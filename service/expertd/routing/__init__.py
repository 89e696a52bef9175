"""From a model's settings to a routing method by name, and every method's maths.

route, route_for and logits_ok live in reference.py, which needs torch, and load on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from expertd.routing.reference import logits_ok, route, route_for

__all__ = ["logits_ok", "route", "route_for"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from expertd.routing import reference

    return getattr(reference, name)
