"""expertd health: is a server ready? For containers and scripts."""

from __future__ import annotations

import argparse

from expertd.cli import arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_target(parser)


@arguments.asks
def run(args: argparse.Namespace) -> int:
    with arguments.target(args).client() as client:
        ready = client.health()
    print("ready" if ready else "not ready")
    return 0 if ready else 1
