"""Arguments of several commands, read by the settings' own parsers; they say why they refuse."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from expertd.bench.target import Target
from expertd.cli import NO_PLAN
from expertd.config import number
from expertd.errors import InvalidArgument
from expertd_client import ExpertdError

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


def _contents(name: str) -> bytes:
    try:
        return Path(name).read_bytes()
    except OSError as error:
        raise ValueError(f"it cannot be read: {error.strerror}") from None


contents = accepted(_contents)


def add_target(parser: argparse.ArgumentParser) -> None:
    """TARGET: which server a command asks, and how it is let in."""
    told = "the server's gRPC address, HOST:PORT"
    parser.add_argument("target", metavar="TARGET", type=address, help=told)
    files = {
        "--token-file": "the bearer token, alone in a file",
        "--tls-ca": "speak TLS, and trust these authorities (PEM)",
        "--tls-cert": "with --tls-ca and --tls-key: our certificate, for mutual TLS",
        "--tls-key": "and its key",
    }
    for flag, what in files.items():
        parser.add_argument(flag, type=contents, metavar="FILE", help=what)


def asks(run: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """A command that asks a server: what the client raises becomes a line and exit code 1, or 3
    where nothing there can run what was asked."""

    def told(args: argparse.Namespace) -> int:
        try:
            return run(args)
        except ExpertdError as error:
            print(f"expertd: {error}", file=sys.stderr)
            return NO_PLAN if error.reason == "NO_USABLE_PLAN" else 1

    return told


def target(args: argparse.Namespace) -> Target:
    """What add_target's arguments say; raises InvalidArgument where they do not belong together."""
    if bool(args.tls_cert) != bool(args.tls_key) or (args.tls_cert and not args.tls_ca):
        raise InvalidArgument("--tls-cert and --tls-key belong together, and to --tls-ca")
    token = None if args.token_file is None else args.token_file.decode("utf-8", "replace").strip()
    return Target(args.target, token, args.tls_ca, args.tls_cert, args.tls_key)


def backend(text: str) -> str | None:
    """A backend to pin; auto is none, as for serve and explain."""
    return None if text == "auto" else text


rows = accepted(number(0, 1 << 24))
layer = accepted(number(0, (1 << 31) - 1))
seed = accepted(number(0, (1 << 32) - 1))
seconds = accepted(number(0.001, 1e6, float))
