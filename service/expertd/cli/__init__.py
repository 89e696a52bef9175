"""The command line: each command is a module with add_arguments(parser) and run(args) -> int.

Exit codes: 0 ok, 1 failed or different, 2 usage or bad config, 3 no plan, 70 sticky CUDA error.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

from expertd import __version__
from expertd.errors import ExpertdError, InvalidArgument


class Command(NamedTuple):
    """A command, the module that runs it, and what it is for; imported only when it is called."""

    name: str
    module: str
    help: str


COMMANDS: tuple[Command, ...] = (
    Command("serve", "expertd.cli.serve", "serve experts over gRPC and HTTP"),
    Command("call", "expertd.cli.call", "send one call to a server and show what came back"),
    Command("bench", "expertd.cli.bench", "load a server: rates, percentiles, where time goes"),
    Command("health", "expertd.cli.health", "exit 0 if a server is ready, else 1"),
    Command(
        "explain", "expertd.cli.explain", "which kernels can run a layer, and why others cannot"
    ),
    Command("capabilities", "expertd.cli.capabilities", "every kernel cell with its state"),
    Command("verify", "expertd.cli.verify", "prove every kernel cell that this machine can run"),
    Command("prebuild", "expertd.cli.prebuild", "build and fetch ahead what FlashInfer needs"),
    Command("tune", "expertd.cli.tune", "measure the plans of a checkpoint's layers anew"),
    Command("inspect", "expertd.cli.inspect", "what a checkpoint is, weighs, and where it fits"),
    Command("counts", "expertd.cli.counts", "how many rows each expert of a server was given"),
    Command("plan", "expertd.cli.plan", "ranges of experts for replicas, from measured load"),
    Command("quantize", "expertd.cli.quantize", "quantise the experts of a plain checkpoint"),
    Command("demo-model", "expertd.cli.demo_model", "write a small made-up checkpoint"),
)

NO_PLAN = 3
"""How a command ends that found nothing which can run what it was asked about."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; our errors become a line on stderr and an exit code."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = _parser(argv).parse_args(argv)
        code = int(args.run(args))
        sys.stdout.flush()  # what cannot be written is found out here, not when Python ends
        return code
    except InvalidArgument as error:
        print(f"expertd: {error}", file=sys.stderr)
        return 2
    except ExpertdError as error:
        print(f"expertd: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # whoever read our output has read enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ModuleNotFoundError as error:
        if not error.name or error.name.startswith("expertd"):
            raise
        print(f"expertd: {_wanting(argv[0], error.name)}", file=sys.stderr)
        return 1
    except OSError as error:  # a full disk, a file that may not be read: not a fault of ours
        print(f"expertd: {error}", file=sys.stderr)
        return 1
    except MemoryError as error:  # sizes that were asked for, such as --tokens of a call
        print(f"expertd: not enough memory: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _wanting(command: str, module: str) -> str:
    return (
        f"{command} needs the module {module}, which is not installed; a base install only reads "
        "data and asks servers, the rest comes with: pip install 'expertd[server]'"
    )


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="expertd", description="The routed experts of MoE models."
    )
    parser.add_argument("--version", action="version", version=f"expertd {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        sub = commands.add_parser(command.name, help=command.help, description=command.help)
        if argv and argv[0] == command.name:
            module = importlib.import_module(command.module)
            module.add_arguments(sub)
            sub.set_defaults(run=module.run)
    return parser
