"""How many bytes of callers' messages this process holds; both carriers share one account."""

from __future__ import annotations

import threading

from expertd.errors import Overloaded, TooLarge


class Ingress:
    """Bytes taken before a message is kept and given back when it is answered; for any thread.

    Also those of large answers, until they are read.
    """

    def __init__(self, max_message_bytes: int, max_bytes: int) -> None:
        self.max_message_bytes = max_message_bytes
        self.max_bytes = max_bytes
        self.taken = 0
        self._lock = threading.Lock()

    def take(self, size: int) -> None:
        """Raises Overloaded when all messages together would be too many bytes."""
        with self._lock:
            if self.taken + size > self.max_bytes:
                raise Overloaded(
                    f"messages of {self.taken} bytes are being read or answered (--ingress-bytes "
                    f"{self.max_bytes}); retry later or elsewhere"
                )
            self.taken += size

    def give(self, size: int) -> None:
        with self._lock:
            self.taken -= size

    def check(self, size: int) -> None:
        """Raises TooLarge for a message beyond the limit."""
        if size > self.max_message_bytes:
            raise self._too_large(str(size))

    def announced(self, text: str) -> int:
        """The length that a caller says it will send; raises TooLarge."""
        if not text[:20].isdecimal() or int(text[:20]) > self.max_message_bytes:
            raise self._too_large(text)
        return int(text)

    def _too_large(self, text: str) -> TooLarge:
        most = self.max_message_bytes
        return TooLarge(f"{text[:20]} bytes given, at most {most} accepted (--max-message-bytes)")
