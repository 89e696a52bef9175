"""What the backends on FlashInfer share: presence before anything, a tuned warm-up."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence

from expertd.backends.base import Backend
from expertd.backends.flashinfer import tuning
from expertd.backends.flashinfer.library import library, simulated
from expertd_wire.errors import Refusal

CARD_ONLY = "it runs on an NVIDIA card only: start with --device cuda:0"

WRITABLE = "it writes below its home as it is imported: FLASHINFER_WORKSPACE_BASE names another"


class FlashInferBackend(Backend):
    """A layer on one of FlashInfer's entries."""

    @abstractmethod
    def _missing(self) -> Iterator[str]:
        """What has to be on this machine before the first call and is not, with what to do."""

    def _check(self) -> tuple[Refusal, ...]:
        row = self.row
        return tuple(
            Refusal(row.backend, row.mode, row.entry, "kernels_absent", text, "device")
            for text in self._absent()
        )

    def _absent(self) -> Iterator[str]:
        assert self.row.call is not None
        if simulated():
            if not hasattr(library(), self.row.call.function):
                yield f"the simulation has no {self.row.call.function}"
        elif self.device.type != "cuda":
            yield CARD_ONLY
        else:
            try:
                yield from self._missing()
            except (ImportError, OSError) as error:
                yield f"FlashInfer cannot be imported: {error}; {WRITABLE}"

    def _warm_up(self, tokens: Sequence[int]) -> None:
        sizes = sorted(set(tokens))
        with tuning.tuner(sizes, self.device) as tuned:
            if tuned:
                self._probe(sizes[-1])
        # Each size may have kernels of its own, compiled or loaded at its first call.
        for count in sizes:
            self._probe(count)

    def _probe(self, tokens: int) -> None:
        self._forward(tuning.probe(self.row, self.spec, tokens, self.device))
