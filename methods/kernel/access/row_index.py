"""An index of gathered rows as runs of consecutive rows, small and hashed once: vocabularies have 10^5 tokens."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from hashlib import blake2b


class RowIndex:
    """For each row of a value, the row of a part, or -1 for a row of zeros.

    Most vocabularies differ in a few tokens, so an index of 128,000 rows has a handful of runs. Equality and hash are
    those of a digest, which is computed once: an index is compared for every node, chunk and step that uses it.

    Args:
        rows: the rows of the part.

    Raises:
        ValueError: a row is less than -1.
    """

    __slots__ = ("_digest", "_length", "_sources", "_starts", "highest")

    def __init__(self, rows: Iterable[int]) -> None:
        self._starts, self._sources = array("q"), array("q")
        self.highest = -1
        number = -1
        expected: int | None = None  # the row that continues the run
        for number, row in enumerate(rows):
            if row < -1:
                raise ValueError(f"row {number} of an index is {row}: a row of the part, or -1 for zeros")
            if row != expected:
                self._starts.append(number)
                self._sources.append(row)
            expected = row + 1 if row >= 0 else -1
            self.highest = max(self.highest, row)
        self._length = number + 1
        runs = self._starts.tobytes() + self._sources.tobytes() + self._length.to_bytes(8, "little")
        self._digest = blake2b(runs, digest_size=16).digest()

    def runs(self, begin: int = 0, end: int | None = None) -> Iterator[tuple[int, int, int]]:
        """Yield the runs in the rows [begin, end) of the value, each as its first row, the part's row and its length.

        The part's row is -1 for a run of zeros.
        """
        end = self._length if end is None else end
        number = bisect_right(self._starts, begin) - 1
        while begin < end:
            start, source = self._starts[number], self._sources[number]
            following = self._starts[number + 1] if number + 1 < len(self._starts) else self._length
            length = min(following, end) - begin
            yield begin, -1 if source < 0 else source + begin - start, length
            begin, number = begin + length, number + 1

    @property
    def digest(self) -> str:
        """A digest of the rows, in hexadecimal."""
        return self._digest.hex()

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        for _, source, length in self.runs():
            yield from (-1,) * length if source < 0 else range(source, source + length)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RowIndex) and self._digest == other._digest

    def __hash__(self) -> int:
        return hash(self._digest)

    def __repr__(self) -> str:
        """One line with the number of rows and runs."""
        return f"<RowIndex: {self._length:,} rows in {len(self._starts):,} runs>"
