"""Which part of a dimension a tensor-parallel rank holds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shard:
    """The rank-th of `size` equal shares; where they cannot be equal, the last ones have less."""

    rank: int = 0
    size: int = 1

    def length(self, whole: int) -> int:
        """Of a full share."""
        return -(-whole // self.size)

    def bounds(self, whole: int) -> tuple[int, int]:
        """Where it begins and ends: at most `length` apart."""
        length = self.length(whole)
        start = min(self.rank * length, whole)
        return start, min(start + length, whole)


WHOLE = Shard()
