"""expertd health: is a server ready? For containers and scripts."""

from __future__ import annotations

import argparse

from expertd.cli import arguments
from expertd_client import Client


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_target(parser)


def run(args: argparse.Namespace) -> int:
    with Client(args.target) as client:
        ready = client.health()
    print("ready" if ready else "not ready")
    return 0 if ready else 1
