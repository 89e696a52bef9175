"""Several things at once on a pool's event loop, and which errors are worth another try."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, TypeVar

from expertd_client.errors import (
    ExpertdError,
    ExpertsNotHeld,
    ExpertsUnavailable,
    InvalidArgument,
    LayerFailed,
    NoUsablePlan,
    PermissionDenied,
    Unauthenticated,
)

T = TypeVar("T")

_LARGE_BYTES = 1 << 20
_STALE_VIEW = (ExpertsNotHeld, LayerFailed)
_FINAL = (InvalidArgument, NoUsablePlan, Unauthenticated, PermissionDenied, ExpertsUnavailable)


def final(error: BaseException) -> bool:
    """Whether any other replica would say the same. Calls have no effects, so others may be asked.

    A replica without the experts or the layer has changed since it was asked what it holds.
    """
    if isinstance(error, _STALE_VIEW):
        return False
    return isinstance(error, _FINAL) or not isinstance(error, ExpertdError)


async def off(nbytes: int, step: Callable[[], T]) -> T:
    """step(), in a thread if it has much to move: the loop serves other calls meanwhile."""
    return await asyncio.to_thread(step) if nbytes > _LARGE_BYTES else step()


async def together(steps: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All of them at once; the first that fails ends the others."""
    if len(steps) == 1:
        return [await steps[0]]
    tasks = [asyncio.ensure_future(step) for step in steps]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await cancel(tasks)


async def first_good(running: Iterable[asyncio.Task[T]]) -> T:
    """The first answer; else the last error, or the first that is final."""
    pending = set(running)
    while True:
        done = {task for task in pending if task.done()}
        if not done:
            done, _ = await asyncio.wait(pending, return_when="FIRST_COMPLETED")
        pending -= done
        errors = []
        for task in done:
            error = task.exception()
            if error is None:
                return task.result()
            errors.append(error)
        if hopeless := [error for error in errors if final(error) or not pending]:
            raise hopeless[0]


async def cancel(tasks: Iterable[asyncio.Future[Any]]) -> None:
    """Ends what still runs, and forgets what came of it."""
    running = [task for task in tasks if not _ended(task)]
    for task in running:
        task.cancel()
    if running:
        await asyncio.gather(*running, return_exceptions=True)


def _ended(task: asyncio.Future[Any]) -> bool:
    """Whether it has; its error counts as seen, or asyncio would report it."""
    if task.done() and not task.cancelled():
        task.exception()
    return task.done()
