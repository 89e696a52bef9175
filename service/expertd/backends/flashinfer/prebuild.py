"""Makes what FlashInfer would otherwise build or download at the first call, for one kind of card.

It runs as a process of its own, python -m expertd.backends.flashinfer.prebuild [--check]:
FlashInfer reads FLASHINFER_CUDA_ARCH_LIST when it is imported and keeps each list's modules in a
directory of its own. Events go to stdout, a JSON object a line; between them is what ninja says.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import Any

from expertd.backends.flashinfer import kernels, modules

DOWNLOADS = 8
"""Files fetched at a time."""

KERNELS = "kernels"
"""What the published kernels are called beside the modules."""

NOTHING = (
    "no card here that FlashInfer's fused MoE runs on: name the architectures to build for, "
    "as in expertd prebuild --arch 90a,100a"
)


def wanted(archs: Sequence[str]) -> tuple[str, ...]:
    """The modules that both backends load on these cards, each once, the smallest first."""
    known = [arch for arch in archs if arch in modules.CUTLASS]
    launchers = [modules.TRTLLM[arch] for arch in known if arch in modules.TRTLLM]
    tuner = [modules.TUNER] if known else []
    return tuple(dict.fromkeys([*tuner, *launchers, *map(modules.cutlass, known)]))


def launches_kernels(names: Sequence[str]) -> bool:
    """Whether one of these modules is built from published headers, for published kernels."""
    return not set(modules.TRTLLM.values()).isdisjoint(names)


def targets() -> list[str]:
    """The architectures that FlashInfer compiles for here, without letters: "90"."""
    context = import_module("flashinfer.jit.core").current_compilation_context
    pairs = sorted(context.TARGET_CUDA_ARCHS)
    return [f"{major}{''.join(filter(str.isdigit, minor))}" for major, minor in pairs]


def check(names: Sequence[str]) -> bool:
    """Says of everything whether it is there; whether all is."""
    absent = "; ".join(kernels.missing()) if launches_kernels(names) else ""
    found = {name: _lack(name, absent) for name in names}
    if launches_kernels(names):
        found[KERNELS] = absent
    for name, why in found.items():
        say("missing" if why else "there", name, why=why)
    return not any(found.values())


def _lack(name: str, kernels_absent: str) -> str:
    """Looking closely at a launcher would fetch its headers, so that waits for the kernels."""
    known = name not in modules.TRTLLM.values() or not kernels_absent
    return modules.missing(name) if known else modules.unbuilt(name)


def make(names: Sequence[str]) -> None:
    """Downloads and builds what is not there; raises what FlashInfer raises."""
    if launches_kernels(names):
        fetch()
    for name in names:
        if modules.missing(name):
            build(name)
        else:
            say("there", name)


def build(name: str) -> None:
    """Builds one module, its compilers' words going to stdout."""
    say("building", name)
    spec = modules.spec_of(name)
    assert spec.name == name, "presence looks for this name"
    spec.build(verbose=True, need_lock=True)
    say("built", name)


def fetch() -> None:
    """Downloads the published kernels that are not there; raises OSError naming what failed."""
    if not _fetched(kernels.listed()):
        raise _unreachable([kernels.listed()])
    absent = [kernel for kernel in kernels.every() if not kernels.intact(kernel)]
    if not absent:
        say("there", KERNELS)
        return
    say("building", KERNELS)
    failed = []
    with ThreadPoolExecutor(DOWNLOADS) as pool:
        for done, (kernel, came) in enumerate(zip(absent, pool.map(_fetched, absent), strict=True)):
            say("fetched", KERNELS, done=done + 1, of=len(absent))
            failed += [] if came else [kernel]
    if failed:
        raise _unreachable(failed)
    say("built", KERNELS)


def _fetched(kernel: kernels.Kernel) -> bool:
    """Whether FlashInfer has the file now, with the content that its list says."""
    loader = import_module("flashinfer.jit.cubin_loader")
    return bool(loader.get_artifact(kernel.path, kernel.sha256))


def _unreachable(failed: Sequence[kernels.Kernel]) -> OSError:
    source = import_module("flashinfer.jit.cubin_loader").FLASHINFER_CUBINS_REPOSITORY
    return OSError(
        f"{len(failed)} files, first {failed[0].path}, cannot be had from {source}, or their "
        "content there is another one"
    )


def say(event: str, name: str, **more: Any) -> None:
    print(json.dumps({"event": event, "name": name, **more}), flush=True)


def main(arguments: Sequence[str]) -> int:
    """0 if all is there in the end, 1 if not, 2 if there is nothing to do for these cards."""
    try:
        names = wanted(targets())
        if not names:
            say("failed", "", why=NOTHING)
            return 2
        if "--check" in arguments:
            return 0 if check(names) else 1
        make(names)
    except Exception as error:  # whatever FlashInfer raises is told, and ends this process
        say("failed", "", why=f"{type(error).__name__}: {error}"[:2000])
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
