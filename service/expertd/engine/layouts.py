"""Copies of weights in layouts of their own, which backends hold beside the canonical ones.

Copies that a budget has no room for after a load are let go, and calls do without them unless they
name their backend or have no other plan. For such a call the copy is made again, and the least
recently used ones go.
That is done by the thread that runs calls, so that no copy goes under a running one.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from weakref import WeakSet

import torch

from expertd.backends.base import Backend, native_bytes
from expertd.capability.checks.fault import Fault
from expertd.capability.match import refusal
from expertd.engine.resident import LayerState, Resident, Residents
from expertd.errors import NoUsablePlan
from expertd.weights.storage import layer_bytes

log = logging.getLogger(__name__)

RESERVE = 0.1
"""The part of a device that is left to activations, staging and graphs."""

FLAG = "--layout-cache-bytes"


class Copy:
    """One layer's copy: the backends that share it and when a call last used it."""

    def __init__(self, resident: Resident, backends: Iterable[Backend]) -> None:
        self.name = resident.name
        self.backends = WeakSet(backends)
        self.used = 0
        self.nbytes = native_bytes(self.backends)

    @property
    def held(self) -> bool:
        return any(backend.warm for backend in self.backends)

    def release(self) -> None:
        for backend in self.backends:
            if backend.warm:
                backend.release()


class Layouts:
    """All copies of a process, within budget() bytes."""

    def __init__(self, budget: Callable[[], int], device: torch.device) -> None:
        self._budget = budget
        self._device = device
        self._copies: list[Copy] = []
        self._ticks = itertools.count(1)
        self._lock = threading.Lock()

    def settle(self, resident: Resident) -> str:
        """After a load: keeps each copy that there is room for; tells which it let go, and why."""
        with self._lock:
            told = [self._settle(copy) for copy in copies_of(resident)]
        resident.choices = {}
        return "; ".join(filter(None, told))

    def _settle(self, copy: Copy) -> str:
        budget = self._budget()
        fits = sum(other.nbytes for other in self._held()) + copy.nbytes <= budget
        for backend in copy.backends:
            backend.on_use = partial(self._use, copy)
            backend.spilled = not fits
        self._copies.append(copy)
        if fits:
            return ""
        copy.release()
        names = ", ".join(sorted({backend.row.backend for backend in copy.backends}))
        told = (
            f"{names} holds no weights: {copy.nbytes} bytes in its layout are more than is left of "
            f"{FLAG} {budget}; calls that name it, or have no other plan, wait until they are made"
        )
        log.warning("layer %s: %s", copy.name, told)
        return told

    def _held(self) -> list[Copy]:
        """The copies in memory; those of forgotten layers are forgotten here too."""
        self._copies = [copy for copy in self._copies if copy.backends]
        return [copy for copy in self._copies if copy.held]

    def _use(self, copy: Copy, backend: Backend) -> None:
        """Makes a backend's copy the latest used one, and makes it if it is not there."""
        copy.used = next(self._ticks)
        if backend.warm:
            return
        with self._lock:
            if not copy.held:
                self._make_room(backend, copy)
            backend.restore()

    def _make_room(self, backend: Backend, copy: Copy) -> None:
        """Lets the least recently used copies go until this one fits; raises NoUsablePlan."""
        budget = self._budget()
        if copy.nbytes > budget:
            raise _too_large(backend, copy, budget)
        held = sorted(self._held(), key=lambda other: other.used)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        while held and sum(other.nbytes for other in held) + copy.nbytes > budget:
            held.pop(0).release()


def copies_of(resident: Resident) -> Iterator[Copy]:
    """The layouts that a layer's backends hold for themselves."""
    own = [backend for backend in resident.backends.values() if backend.layout]
    for layout in sorted({backend.layout for backend in own}):
        yield Copy(resident, (backend for backend in own if backend.layout == layout))


def spare_bytes(device: torch.device, residents: Residents) -> int:
    """What a device has beyond the canonical weights of all layers and a reserve."""
    wanted = sum(
        layer_bytes(resident.spec)
        for resident in residents.all()
        if resident.spec.num_experts
        and resident.state not in (LayerState.FAILED, LayerState.UNLOADED)
    )
    return max(0, int(_memory(device) * (1 - RESERVE)) - wanted)


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _too_large(backend: Backend, copy: Copy, budget: int) -> NoUsablePlan:
    why = f"layer {copy.name} has no room for weights in this backend's layout"
    fault = Fault("layout_cache", FLAG, str(budget), f"{copy.nbytes} or more", why)
    return NoUsablePlan(f"{why}; raise {FLAG}", (refusal(backend.row, fault),))
