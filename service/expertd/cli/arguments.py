"""Arguments of several commands, read by the settings' own parsers; they say why they refuse."""

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


def _address(text: str) -> str:
    if not text or any(character.isspace() for character in text):
        raise ValueError("HOST:PORT is accepted, and what gRPC resolves, such as dns:///NAME:PORT")
    return text


address = accepted(_address)


def add_target(parser: argparse.ArgumentParser) -> None:
    """TARGET: which server a command asks."""
    told = "the server's gRPC address, HOST:PORT"
    parser.add_argument("target", metavar="TARGET", type=address, help=told)


rows = accepted(number(0, 1 << 24))
layer = accepted(number(0, (1 << 31) - 1))
seed = accepted(number(0, (1 << 32) - 1))
seconds = accepted(number(0.001, 1e6, float))
