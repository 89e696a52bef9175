"""Copies of weights in layouts of their own, which backends hold beside the canonical ones.

A copy that a budget has no room for after a load replaces the canonical weights, if all of the
commonest calls run on it: the layer then has one copy, and no backend that reads the canonical
order. Other such copies are let go, and calls do without them unless they name their backend or
have no other plan. For such a call the copy is made again, and the least recently used ones go.
That is done by the thread that runs calls, so that no copy goes under a running one.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Set
from functools import partial
from weakref import WeakSet

import torch

from expertd.backends.base import Backend, native_bytes
from expertd.capability.checks.fault import Fault
from expertd.capability.match import refusal
from expertd.engine.capture import capturing
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
    def names(self) -> str:
        """Its backends, for a person."""
        return ", ".join(sorted({backend.row.backend for backend in self.backends}))

    def serves(self, likely: Set[Backend]) -> bool:
        """Whether all of what runs the commonest calls computes from it."""
        return bool(likely) and likely <= set(self.backends)

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

    def settle(self, resident: Resident, likely: Set[Backend] = frozenset()) -> str:
        """After a load: keeps each copy that there is room for; tells what it did otherwise.

        likely: what runs the commonest calls.
        """
        with self._lock:
            copies = sorted(copies_of(resident), key=lambda copy: not copy.serves(likely))
            if copies and copies[0].serves(likely) and not self._fits(copies[0]):
                told = self._replace(resident, copies[0])
            else:
                told = "; ".join(filter(None, map(self._settle, copies)))
        resident.choices = {}
        return told

    def _replace(self, resident: Resident, copy: Copy) -> str:
        """Puts a copy in the canonical weights' place, for good: nothing could make it again."""
        needed = self._needed(copy)
        told = (
            f"this layer's weights are held in {copy.names}'s layout only, one copy; "
            f"raise {FLAG} to {needed} to keep both"
        )
        fault = Fault("layout_cache", FLAG, str(self._budget()), f"{needed} or more", told)
        self._finish_kernels()
        resident.keep_only(copy.backends, lambda row: refusal(row, fault))
        log.info("layer %s: %s", copy.name, told)
        return told

    def _settle(self, copy: Copy) -> str:
        budget, fits = self._budget(), self._fits(copy)
        for backend in copy.backends:
            backend.on_use = partial(self._use, copy)
            backend.spilled = not fits
        self._copies.append(copy)
        if fits:
            return ""
        copy.release()
        told = (
            f"{copy.names} holds no weights: {copy.nbytes} bytes in its layout are more than is "
            f"left of {FLAG} {budget}; calls that name it, or have no other plan, wait until they "
            "are made"
        )
        log.warning("layer %s: %s", copy.name, told)
        return told

    def _fits(self, copy: Copy) -> bool:
        return self._needed(copy) <= self._budget()

    def _needed(self, copy: Copy) -> int:
        """The budget that would keep a copy beside all that are held."""
        return sum(other.nbytes for other in self._held()) + copy.nbytes

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
        self._finish_kernels()
        while held and sum(other.nbytes for other in held) + copy.nbytes > budget:
            held.pop(0).release()

    def _finish_kernels(self) -> None:
        """Waits for all that may still read what is freed next."""
        if self._device.type == "cuda":
            with capturing:
                torch.cuda.synchronize(self._device)


def copies_of(resident: Resident) -> Iterator[Copy]:
    """The layouts that a layer's backends hold for themselves."""
    own = [backend for backend in resident.backends.values() if backend.layout]
    for layout in sorted({backend.layout for backend in own}):
        yield Copy(resident, (backend for backend in own if backend.layout == layout))


def spare_bytes(device: torch.device, residents: Residents) -> int:
    """What a device has beyond one copy of all layers' weights and a reserve."""
    wanted = sum(
        max(layer_bytes(resident.spec), resident.nbytes if resident.weights is None else 0)
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
