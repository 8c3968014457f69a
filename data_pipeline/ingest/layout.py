"""What planning a source leaves behind: enough for any worker to read any range of rows without reading what is before.

A layout of 10^8 rows is about a megabyte: every STRIDE-th row's place in its file, or the rows' names in one Arrow
array, which Ray hands to the workers of a node without a copy.
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
    """One input file. offsets: int64, where its rows 0, STRIDE, 2 * STRIDE ... begin, in bytes; empty where a row is
    found otherwise. digest: of its contents, or of what describes them; bytes: how many of them the digest is over,
    0 where it is over something else. numbers: int64, of text, the number of the line at each of `offsets`.
    """

    path: str
    rows: int
    digest: str
    offsets: np.ndarray
    bytes: int = 0
    numbers: np.ndarray = field(default_factory=lambda: np.array([], np.int64))


@dataclass(frozen=True)
class Placement:
    """The files of a source in order; lines: one text a row where rows are kept here instead of in the files."""

    parts: tuple[Part, ...]
    lines: pa.Array | None = None

    @cached_property
    def ends(self) -> np.ndarray:
        """int64 [parts]: number of rows up to and with each file."""
        return np.cumsum([part.rows for part in self.parts], dtype=np.int64)

    @property
    def rows(self) -> int:
        """Number of rows."""
        return int(self.ends[-1]) if self.parts else 0

    @property
    def digest(self) -> str:
        """Which contents were planned: sha256 over the files' digests and rows, their paths aside."""
        text = "\n".join(f"{part.rows} {part.digest}" for part in self.parts)
        return hashlib.sha256(text.encode()).hexdigest()

    def ranges(self, start: int, stop: int) -> Iterator[tuple[Part, int, int]]:
        """Rows [start, stop) as (file, first row, last row + 1), rows counted within the file."""
        first = int(np.searchsorted(self.ends, start, side="right"))
        for number in range(first, len(self.parts)):
            begin = int(self.ends[number]) - self.parts[number].rows
            if begin >= stop:
                return
            yield self.parts[number], max(start - begin, 0), min(stop - begin, self.parts[number].rows)

    def texts(self, start: int, stop: int) -> list[Any]:
        """`lines` [start, stop)."""
        assert self.lines is not None
        return list(self.lines.slice(start, stop - start).to_pylist())


def lines_layout(path: str, lines: list[str]) -> Placement:
    """A layout that keeps the rows itself."""
    array = pa.array(lines, pa.large_string())
    digest = hashlib.sha256("\n".join(lines).encode("utf-8", "surrogatepass")).hexdigest()
    return Placement((Part(path, len(lines), digest, np.array([], np.int64)),), array)


def joined(layouts: list[Placement]) -> Placement:
    """Layouts that keep their rows themselves, one after another."""
    parts = tuple(part for layout in layouts for part in layout.parts)
    return Placement(parts, pa.concat_arrays([layout.lines for layout in layouts]))
