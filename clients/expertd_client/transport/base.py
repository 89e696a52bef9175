"""The seam: a carrier takes the bytes of a request and answers with those of a reply."""

from __future__ import annotations

from abc import ABC, abstractmethod

WHOLE = 1 << 62
"""No message is as large."""


class Transport(ABC):
    """A carrier for Client; every method raises ExpertdError and nothing else of its own.

    message_bytes: rows of more bytes than these travel faster as several messages.
    """

    message_bytes = WHOLE

    @abstractmethod
    def forward(self, request: bytes, timeout: float | None) -> bytes:
        """The bytes of the ForwardReply to a ForwardRequest, within timeout seconds."""

    @abstractmethod
    def query(self, path: str, request: bytes, timeout: float | None) -> bytes:
        """The answer to a unary method that carries no tensors."""

    @abstractmethod
    def close(self) -> None:
        """Give back what the carrier holds; calls under way end with an error."""


class ByteStream(ABC):
    """Requests out and replies back, in no fixed order; raises ExpertdError when it breaks."""

    @abstractmethod
    async def send(self, request: bytes) -> None:
        """Hands one ForwardRequest to the carrier."""

    @abstractmethod
    async def receive(self) -> bytes | None:
        """The next ForwardReply; None when the server has ended the stream."""

    @abstractmethod
    async def close(self) -> None:
        """Breaks the stream off."""


class AsyncTransport(ABC):
    """A carrier for AsyncClient, with the same three methods and streams."""

    message_bytes = WHOLE

    @abstractmethod
    def stream(self) -> ByteStream:
        """A new stream of calls."""

    @abstractmethod
    async def forward(self, request: bytes, timeout: float | None) -> bytes:
        """The bytes of the ForwardReply to a ForwardRequest, within timeout seconds."""

    @abstractmethod
    async def query(self, path: str, request: bytes, timeout: float | None) -> bytes:
        """The answer to a unary method that carries no tensors."""

    @abstractmethod
    async def close(self) -> None:
        """Give back what the carrier holds; calls under way end with an error."""
