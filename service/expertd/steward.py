"""Loads and unloads at run time, one job at a time, for the admin methods and for the start."""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections.abc import Callable

from expertd.engine.loader import Loader, ModelSource
from expertd.engine.resident import LayerState, Resident, Residents
from expertd.errors import FailedPrecondition, InvalidArgument, NotFound

Job = tuple[ModelSource, list[Resident]]


class Steward:
    """Keeps the configured models; a thread of its own loads what it is told to."""

    def __init__(
        self,
        loader: Loader,
        residents: Residents,
        check: Callable[[ModelSource], None],
        begin_drain: Callable[[], None],
    ) -> None:
        self._loader = loader
        self._residents = residents
        self._check = check
        self._begin_drain = begin_drain
        self._sources: dict[str, ModelSource] = {}
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()

    def start(self, sources: list[ModelSource]) -> None:
        """Announces every model, then loads them in the background; raises what is wrong."""
        self._sources = {source.name: source for source in sources}
        for source in sources:
            self._jobs.put((source, self._announce(source)))
        threading.Thread(target=self._work, name="loader", daemon=True).start()

    def stop(self) -> None:
        """Ends the thread once it has loaded what it was told to."""
        self._jobs.put(None)

    def _announce(self, source: ModelSource) -> list[Resident]:
        """A layer that is not there was named by the operator's own flag."""
        try:
            return self._loader.announce(source)
        except NotFound as missing:
            raise InvalidArgument(f"--layers of model {source.name}: {missing}") from None

    def load(self, model: str, layers: list[int]) -> list[Resident]:
        """Begins to load layers of a configured model, all of its layers when none are named."""
        source = self._source(model)
        wanted = frozenset(layers) if layers else source.layers
        self._refuse_outside(source, wanted)
        self._check(source)
        found = self._loader.announce(dataclasses.replace(source, layers=wanted))
        self._jobs.put((source, found))
        return found

    def unload(self, model: str, layers: list[int]) -> list[Resident]:
        """Forgets the weights of layers; raises FailedPrecondition for one that is loading."""
        self._source(model)
        held = self._residents.of(model)
        found = [self._residents.get(model, layer) for layer in layers or held]
        if busy := [r.name for r in found if r.state in (LayerState.LOADING, LayerState.PROVING)]:
            raise FailedPrecondition(f"layers {', '.join(busy)} are loading; wait until they are")
        self._loader.unload(found)
        return found

    def drain(self) -> list[Resident]:
        """Begins to drain the process."""
        self._begin_drain()
        return self._residents.all()

    def _source(self, model: str) -> ModelSource:
        source = self._sources.get(model)
        if source is None:
            known = ", ".join(self._sources) or "none"
            raise NotFound(f"model {model[:80]!r} is not configured here; configured: {known}")
        return source

    def _refuse_outside(self, source: ModelSource, wanted: frozenset[int] | None) -> None:
        """The operator's --layers bounds what may be loaded later."""
        if source.layers is not None and wanted is not None and not wanted <= source.layers:
            extra = ", ".join(str(layer) for layer in sorted(wanted - source.layers)[:10])
            raise FailedPrecondition(f"layers {extra} of {source.name} are outside --layers")

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._loader.load(*job)
