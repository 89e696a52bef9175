"""expertd prebuild: build and fetch ahead what FlashInfer would need at the first call.

One process for each architecture does it (backends/flashinfer/prebuild.py); this one shows how far
it is and keeps what the compilers said.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import Progress

from expertd.config import cache_directory
from expertd.errors import ExpertdError, InvalidArgument

WORKER = "expertd.backends.flashinfer.prebuild"
ARCHS = ("89", "90", "100", "103", "107", "120", "121")
GIB = 1 << 30
JOB_BYTES = 8 * GIB
"""What nvcc takes for one of the larger files."""

STEP = re.compile(r"\[(\d+)/(\d+)\]")
"""How ninja counts, at the start of a line."""

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
TAIL_LINES = 30
COMMAND_LENGTH = 600
"""No compiler says a line this long; the commands that ninja repeats are longer."""

WORDS = {"there": "is there", "building": "is being made", "built": "is ready"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--arch", metavar="90a,100a", help="for these architectures (default: the cards here)"
    )
    parser.add_argument(
        "--kernels", type=Path, metavar="DIR", help="take published kernels from a local copy"
    )
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="compilers at a time (default: cores, 8 GB for each)"
    )
    parser.add_argument(
        "--check", action="store_true", help="build nothing; exit 1 if something is missing"
    )


def run(args: argparse.Namespace) -> int:
    """0 if all is there in the end, 1 if not; raises InvalidArgument and ExpertdError."""
    archs: list[str | None] = list(architectures(args.arch)) if args.arch else [None]
    shared = environment(args.kernels, args.jobs)
    if not args.check:
        check_tools(shared)
    return max(_prebuild(arch, args.check, shared) for arch in archs)


def architectures(text: str) -> Iterator[str]:
    """FlashInfer's spelling of "90a,100a"; it adds the letter that this CUDA has for the card."""
    for name in text.split(","):
        number = name.strip().removeprefix("sm").rstrip("af")
        if number not in ARCHS:
            raise InvalidArgument(
                f"--arch {name!r:.40}: accepted are {', '.join(ARCHS)}, with or without a letter"
            )
        yield f"{number[:-1]}.{number[-1]}"


def environment(kernels: Path | None, jobs: int | None) -> dict[str, str]:
    """What the processes run in; raises InvalidArgument for what cannot work."""
    found = dict(os.environ)
    if jobs is not None and jobs < 1:
        raise InvalidArgument(f"--jobs {jobs}: accepted are numbers >= 1")
    found["MAX_JOBS"] = str(jobs or found.get("MAX_JOBS") or default_jobs())
    if kernels is not None:
        if not kernels.is_dir():
            raise InvalidArgument(f"--kernels {kernels}: it is not a directory")
        found["FLASHINFER_CUBINS_REPOSITORY"] = str(kernels.resolve())
    return found


def default_jobs() -> int:
    """As many as there are cores, and memory for."""
    cores = len(os.sched_getaffinity(0))
    return max(1, min(cores, memory_bytes() // JOB_BYTES))


def memory_bytes() -> int:
    """This machine's memory, or this container's share of it."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = CGROUP_LIMIT.read_text().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdecimal() else total


def check_tools(environment: Mapping[str, str]) -> None:
    """Raises for what a build cannot go without."""
    if environment.get("FLASHINFER_DISABLE_JIT"):
        raise InvalidArgument(
            "FLASHINFER_DISABLE_JIT is set, and FlashInfer then builds nothing, whatever its "
            "value: unset it"
        )
    if shutil.which("ninja", path=environment.get("PATH")) is None:
        raise ExpertdError("ninja is not on the PATH: pip install ninja")
    nvcc = nvcc_of(environment)
    if shutil.which(nvcc, path=environment.get("PATH")) is None:
        raise ExpertdError(f"{nvcc} is not there: install the CUDA toolkit, or set CUDA_HOME to it")


def nvcc_of(environment: Mapping[str, str]) -> str:
    """The compiler that FlashInfer calls."""
    if own := environment.get("FLASHINFER_NVCC"):
        return own
    home = environment.get("CUDA_HOME") or environment.get("CUDA_PATH")
    if home is None and shutil.which("nvcc", path=environment.get("PATH")):
        return "nvcc"
    return f"{home or '/usr/local/cuda'}/bin/nvcc"


def _prebuild(arch: str | None, check: bool, shared: Mapping[str, str]) -> int:
    own = {} if arch is None else {"FLASHINFER_CUDA_ARCH_LIST": arch}
    kind = "check" if check else "prebuild"
    log = cache_directory() / f"{kind}-{arch or 'here'}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", WORKER, *(["--check"] if check else [])]
    title = f"sm{arch.replace('.', '')}" if arch else "this machine"
    with (
        subprocess.Popen(
            command,
            env={**shared, **own},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process,
        log.open("w") as kept,
    ):
        assert process.stdout is not None
        lines = Lines(process.stdout, kept)
        told = show(title, lines)
    if process.returncode and not (told and check):
        print(f"expertd: {title}: {lines.why()}\nexpertd: all of it is in {log}", file=sys.stderr)
    return 2 if process.returncode == 2 else min(abs(process.returncode), 1)


class Lines:
    """What a process says, kept in a file; its last words explain a failure."""

    def __init__(self, source: IO[str], kept: IO[str]) -> None:
        self._source, self._kept = source, kept
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._reason = ""

    def __iter__(self) -> Iterator[dict[str, Any] | str]:
        """Events as objects, everything else as it is."""
        for line in self._source:
            self._kept.write(line)
            if not line.startswith('{"event": '):
                self._remember(line)
                yield line
                continue
            event: dict[str, Any] = json.loads(line)
            if event["event"] == "failed":
                self._reason = event["why"]
            yield event

    def why(self) -> str:
        """The reason that was given, after what the compiler said last."""
        return "".join(self._tail) + (self._reason or "it ended without a word")

    def _remember(self, line: str) -> None:
        if line.startswith("FAILED:"):
            self._tail.clear()
        if len(line) < COMMAND_LENGTH:
            self._tail.append(line)


def show(title: str, lines: Lines) -> bool:
    """Prints a line for each module and a bar below; whether anything was said of one."""
    told = False
    bar = Console(stderr=True)
    with Progress(console=bar, disable=not bar.is_terminal, transient=True) as progress:
        task = progress.add_task(title, total=None)
        for line in lines:
            if isinstance(line, str):
                if step := STEP.match(line):
                    progress.update(task, completed=int(step[1]), total=int(step[2]))
            elif line["event"] == "fetched":
                progress.update(task, completed=line["done"], total=line["of"])
            elif line["name"]:
                told = True
                progress.update(task, description=f"{title} {line['name']}", completed=0)
                said = line.get("why") or f"{line['name']} {WORDS[line['event']]}"
                print(f"{title}: {said}", flush=True)
    return told
