"""The seam: a carrier takes the bytes of a request and answers with those of a reply."""

from __future__ import annotations

from abc import ABC, abstractmethod


class Transport(ABC):
    """A carrier for Client; every method raises ExpertdError and nothing else of its own."""

    @abstractmethod
    def forward(self, request: bytes, timeout: float | None) -> bytes:
        """The bytes of the ForwardReply to a ForwardRequest, within timeout seconds."""

    @abstractmethod
    def query(self, path: str, request: bytes, timeout: float | None) -> bytes:
        """The answer to a unary method that carries no tensors."""

    @abstractmethod
    def close(self) -> None:
        """Give back what the carrier holds; calls under way end with an error."""


class AsyncTransport(ABC):
    """A carrier for AsyncClient, with the same three methods."""

    @abstractmethod
    async def forward(self, request: bytes, timeout: float | None) -> bytes:
        """The bytes of the ForwardReply to a ForwardRequest, within timeout seconds."""

    @abstractmethod
    async def query(self, path: str, request: bytes, timeout: float | None) -> bytes:
        """The answer to a unary method that carries no tensors."""

    @abstractmethod
    async def close(self) -> None:
        """Give back what the carrier holds; calls under way end with an error."""
