"""An event loop in a thread of its own, which callers of any kind hand their work to."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from expertd_client.errors import Unavailable

T = TypeVar("T")


class LoopThread:
    """Runs coroutines for threads, and for other event loops, until close()."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._gate = threading.RLock()  # a signal's handler may close what it interrupts
        self.open = True
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """What work returns, for the thread that waits here; if that gives up, so does work.

        Raises Unavailable if nothing is done here any more.
        """
        future = self._handed_over(work)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    async def arun(self, work: Coroutine[Any, Any, T]) -> T:
        """The same for a caller on another event loop; being cancelled cancels work."""
        return await asyncio.wrap_future(self._handed_over(work))

    def close(self, last: Coroutine[Any, Any, None]) -> None:
        """Does this last, ends what still runs, then the thread; a second time nothing."""
        try:
            # What was handed over before has begun by the time that this ends it.
            ending = self._handed_over(_end(last), for_the_last_time=True)
        except Unavailable:
            last.close()
            return
        ending.result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _handed_over(
        self, work: Coroutine[Any, Any, T], *, for_the_last_time: bool = False
    ) -> Future[T]:
        # A fork leaves threads behind: in its child nobody would ever answer, or open the gate.
        if self._thread.is_alive():
            with self._gate:
                if self.open:
                    self.open = not for_the_last_time
                    return asyncio.run_coroutine_threadsafe(work, self._loop)
        work.close()
        forked = self.open and not self._thread.is_alive()
        why = "was made before this process was forked; make one here" if forked else "was closed"
        raise Unavailable(f"the pool {why}")


async def _end(last: Coroutine[Any, Any, None]) -> None:
    await last
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await asyncio.get_running_loop().shutdown_default_executor()
