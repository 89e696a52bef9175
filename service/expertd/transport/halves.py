"""A unary gRPC method in two halves, between which no thread has to wait."""

from __future__ import annotations

from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import grpc

from expertd.transport.interceptors import guarded

Ready = Callable[[Any, bool], None]
"""Takes what the second half is to be given, and whether that is quick enough to be done at once.

It is called once, by any thread; by one that holds a lock with False.
"""
Begin = Callable[[bytes, grpc.ServicerContext, Ready], None]
Finish = Callable[[Any, grpc.ServicerContext], bytes]


class Halves:
    """begin(message, context, ready) sees to it that ready() is called; finish() then answers.

    As a plain method it waits between the two, on the thread that calls it.
    """

    def __init__(self, begin: Begin, finish: Finish) -> None:
        self.begin = begin
        self.finish = guarded(finish)
        self._finish = finish
        self._whole = guarded(self._wait)

    def __call__(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        return self._whole(request, context)

    def _wait(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        answers: SimpleQueue[Any] = SimpleQueue()
        self.begin(request, context, lambda answer, _: answers.put(answer))
        del request  # what begin() has made of it is all that is needed
        return self._finish(answers.get(), context)
