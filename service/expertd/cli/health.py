"""expertd health: is a server ready? For containers and scripts."""

from __future__ import annotations

import argparse
import sys

from expertd.cli import arguments
from expertd_client import ExpertdError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_target(parser)


def run(args: argparse.Namespace) -> int:
    try:
        with arguments.target(args).client() as client:
            ready = client.health()
    except ExpertdError as error:
        print(f"expertd: {error}", file=sys.stderr)
        return 1
    print("ready" if ready else "not ready")
    return 0 if ready else 1
