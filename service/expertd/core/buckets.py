"""The sizes of batches that everything is compiled, tuned and proven for: powers of two."""

from __future__ import annotations


def token_buckets(limit: int) -> tuple[int, ...]:
    """1, 2, 4, … up to the bucket that a batch of limit tokens falls into."""
    return tuple(1 << index for index in range(bucket_index(limit) + 1))


def bucket_index(tokens: int) -> int:
    """Which bucket holds a batch of so many tokens: the smallest that is not less."""
    return (tokens - 1).bit_length()
