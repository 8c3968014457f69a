"""Row layout of a planned source: any worker can read any range of rows without reading the rows before it.

It holds the byte offset of every STRIDE-th row (about a megabyte for 10^8 rows), or the rows' names in one Arrow array,
which Ray shares with the workers of a node without a copy.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from data_pipeline.schema import Drop, Link, Pair

STRIDE = 1024

Row = Pair | Link | Drop


@dataclass(frozen=True)
class Part:
    """One input file.

    digest: of its contents, or of metadata that describes them. offsets: int64, byte offsets of rows 0, STRIDE,
    2 * STRIDE, ... (tars: TAR_STRIDE); empty for formats that locate rows in another way. bytes: number of bytes under
    the digest, 0 if it is over metadata. numbers: int64, text files only: line number at each of `offsets`.
    """

    path: str
    rows: int
    digest: str
    offsets: np.ndarray
    bytes: int = 0
    numbers: np.ndarray = field(default_factory=lambda: np.array([], np.int64))


@dataclass(frozen=True)
class Placement:
    """The files of a source, in order. lines: one string per row if rows are stored here instead of in the files."""

    parts: tuple[Part, ...]
    lines: pa.Array | None = None

    @cached_property
    def ends(self) -> np.ndarray:
        """Cumulative number of rows up to and including each file: int64 [parts]."""
        return np.cumsum([part.rows for part in self.parts], dtype=np.int64)

    @property
    def rows(self) -> int:
        """Number of rows."""
        return int(self.ends[-1]) if self.parts else 0

    @property
    def digest(self) -> str:
        """Identity of the planned contents: sha256 over the files' digests and row counts, without paths."""
        text = "\n".join(f"{part.rows} {part.digest}" for part in self.parts)
        return hashlib.sha256(text.encode()).hexdigest()

    def ranges(self, start: int, stop: int) -> Iterator[tuple[Part, int, int]]:
        """Split rows [start, stop) by file: (file, first row, last row + 1), with row numbers within the file."""
        first = int(np.searchsorted(self.ends, start, side="right"))
        for number in range(first, len(self.parts)):
            begin = int(self.ends[number]) - self.parts[number].rows
            if begin >= stop:
                return
            yield self.parts[number], max(start - begin, 0), min(stop - begin, self.parts[number].rows)

    def texts(self, start: int, stop: int) -> list[Any]:
        """Return `lines` [start, stop)."""
        assert self.lines is not None
        return list(self.lines.slice(start, stop - start).to_pylist())


def lines_layout(path: str, lines: list[str]) -> Placement:
    """Return a layout that stores the rows itself, as `lines`."""
    array = pa.array(lines, pa.large_string())
    digest = hashlib.sha256("\n".join(lines).encode("utf-8", "surrogatepass")).hexdigest()
    return Placement((Part(path, len(lines), digest, np.array([], np.int64)),), array)


def joined(layouts: list[Placement]) -> Placement:
    """Concatenate layouts that store their rows themselves."""
    parts = tuple(part for layout in layouts for part in layout.parts)
    return Placement(parts, pa.concat_arrays([layout.lines for layout in layouts]))
