"""Types of arguments: the settings' own parsers, with what they say when they refuse."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeVar

from expertd.config import number

T = TypeVar("T")


def accepted(parse: Callable[[str], T]) -> Callable[[str], T]:
    """A parser whose ValueError argparse shows; else it would name our function instead."""

    def read(text: str) -> T:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r:.80} given; {error}") from None

    return read


def listed(parse: Callable[[str], T]) -> Callable[[str], tuple[T, ...]]:
    """A parser of several values with commas between them."""
    return accepted(lambda text: tuple(parse(part) for part in text.split(",")))


rows = accepted(number(0, 1 << 24))
layer = accepted(number(0, (1 << 31) - 1))
seed = accepted(number(0, (1 << 32) - 1))
seconds = accepted(number(0.001, 1e6, float))
