"""Ranges of remote objects through blocks on a local disk: a byte is fetched once, whoever needs it first.

A block is a file of BLOCK_BYTES and the xxh3-64 of its contents, so that what a crash or a full disk left is not taken
for data; it is written aside and renamed, so that processes of a node share a folder without talking to each other.
Neighbouring blocks come in one GET of up to GET_BYTES. What is read ahead waits on the disk: memory holds a block per
connection, whatever the distance.
"""

import contextlib
import os
import queue
import shutil
import tempfile
import threading
import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from data_pipeline.errors import DataError
from data_pipeline.remote import CONNECTIONS, RemoteStorage, Version, process_lock

BLOCK_BYTES = 1 << 18
GET_BYTES = 1 << 23
FOLDER = "TESSERA_CACHE"  # environment variable: a folder on a local disk that outlives the process

_SUM_BYTES = 8
_KEPT = 0.9  # of the limit, after room was made
_AHEAD_AT_ONCE = 512  # samples

Range = tuple[str, int, int]
"""Object, first byte, end."""


class Run(NamedTuple):
    """Neighbouring blocks of one object, [first, stop)."""

    name: str
    first: int
    stop: int


class BlockCache:
    """Reads ranges of `storage` through blocks in a folder, TESSERA_CACHE or a temporary one of this process.

    limit: bytes it may hold, by default half of what the disk has free; the oldest blocks go first.
    """

    def __init__(self, storage: RemoteStorage, folder: str | Path | None = None, limit: int | None = None) -> None:
        self._storage = storage
        self._objects: dict[str, tuple[int, str]] = {}
        named = folder or os.environ.get(FOLDER)
        self.folder = Path(named or tempfile.mkdtemp(prefix="tessera-cache-"))
        if not named:
            weakref.finalize(self, _remove, self.folder, os.getpid())
        with _disk(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self.limit = limit or (shutil.disk_usage(self.folder).free + _held(self.folder)) // 2
        self._mine: _Process | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mine": None}

    def add(self, name: str, size: int, digest: str) -> None:
        """Make an object known. digest: of its contents, by which its blocks are named."""
        self._objects[name] = size, digest

    def get_ranges(self, ranges: Sequence[Range]) -> list[bytes]:
        """The bytes of each range. Raises DataError where an object is missing or has another size."""
        process = self._process()
        for future in process.request(self, ranges):
            future.result()
        return [self._read(process, *wanted) for wanted in ranges]

    def prefetch(self, ranges: Callable[[], Sequence[Range]]) -> None:
        """Fetch what is missing of these ranges in the background, in their order; they are asked for there too."""
        self._process().ahead.put(ranges)

    def drop(self, wanted: Range) -> None:
        """Forget the blocks of a range, whose contents were not right."""
        name, start, stop = wanted
        for number in _blocks(start, stop):
            self._path(name, number).unlink(missing_ok=True)

    def fetch(self, run: Run, process: "_Process") -> None:
        """One GET, cut into blocks as it comes."""
        size, _ = self._objects[run.name]
        start, stop = run.first * BLOCK_BYTES, min(run.stop * BLOCK_BYTES, size)
        buffer, number = bytearray(), run.first
        for piece in self._storage.stream(run.name, start, stop, process.seen):
            self._check(run.name, process.seen[run.name])
            buffer += piece
            while len(buffer) >= BLOCK_BYTES:
                self._store(process, run.name, number, bytes(buffer[:BLOCK_BYTES]))
                del buffer[:BLOCK_BYTES]
                number += 1
        if buffer:
            self._store(process, run.name, number, bytes(buffer))

    def missing(self, ranges: Iterable[Range]) -> Iterator[tuple[str, int]]:
        """Object and number of each block that is not in the folder, once each, in the order of need."""
        wanted = {(name, number): None for name, start, stop in ranges for number in _blocks(start, stop)}
        return (block for block in wanted if not self.holds(block))

    def holds(self, block: tuple[str, int]) -> bool:
        """Is this block of an object in the folder?"""
        return self._path(*block).exists()

    def _check(self, name: str, version: Version) -> None:
        size, _ = self._objects[name]
        if version.size not in (size, -1):
            raise DataError(
                f"{self._storage.path(name)}: {version.size} bytes, the manifest says {size}; the file was cut off or "
                "replaced, run `tessera data verify` and fetch it again"
            )

    def _read(self, process: "_Process", name: str, start: int, stop: int) -> bytes:
        parts = []
        for number in _blocks(start, stop):
            first = number * BLOCK_BYTES
            data = self._load(name, number)
            if data is None:  # damaged, or gone again: the folder is small
                end = min(first + BLOCK_BYTES, self._objects[name][0])
                data = b"".join(self._storage.stream(name, first, end, process.seen))
            parts.append(data[max(start - first, 0) : stop - first])
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _load(self, name: str, number: int) -> bytes | None:
        """A block, None where it is missing or not what was written."""
        try:
            data = self._path(name, number).read_bytes()
        except FileNotFoundError:
            return None
        body, end = data[:-_SUM_BYTES], data[-_SUM_BYTES:]
        if xxhash.xxh3_64_digest(body) == end:
            return body
        self._path(name, number).unlink(missing_ok=True)
        return None

    def _store(self, process: "_Process", name: str, number: int, data: bytes) -> None:
        path = self._path(name, number)
        aside = path.with_name(f".{uuid.uuid4().hex}")
        with _disk(self.folder):
            path.parent.mkdir(exist_ok=True)
            aside.write_bytes(data + xxhash.xxh3_64_digest(data))
            aside.rename(path)
        process.grow(self, len(data))

    def _path(self, name: str, number: int) -> Path:
        digest = self._objects[name][1]
        return self.folder / digest[:2] / f"{digest[:32]}-{number}"

    def _process(self) -> "_Process":
        """Threads and locks of this process: they survive neither a fork nor a spawn."""
        with process_lock():
            if self._mine is None or self._mine.pid != os.getpid():
                self._mine = _Process(self)
            return self._mine


class _Process:
    """What a process has of its own: connections, what is on its way, how much it has written."""

    def __init__(self, cache: BlockCache) -> None:
        self.pid = os.getpid()
        self.seen: dict[str, Version] = {}
        self.ahead: queue.SimpleQueue[Callable[[], Sequence[Range]]] = queue.SimpleQueue()
        self._pool = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="get")
        self._lock = threading.Lock()
        self._flying: dict[tuple[str, int], Future[None]] = {}
        self._held = _held(cache.folder)
        self._making_room = threading.Lock()
        threading.Thread(target=_read_ahead, args=(weakref.ref(cache), self), daemon=True, name="read-ahead").start()

    def request(self, cache: BlockCache, ranges: Sequence[Range]) -> list[Future[None]]:
        """Start a GET for what is missing and not on its way -> what to wait for."""
        blocks = list(cache.missing(ranges))
        with self._lock:
            futures = {self._flying[block] for block in blocks if block in self._flying}
            for run in _runs([block for block in blocks if block not in self._flying and not cache.holds(block)]):
                future = self._pool.submit(self._fetch, cache, run)
                self._flying.update(((run.name, number), future) for number in range(run.first, run.stop))
                futures.add(future)
        return list(futures)

    def grow(self, cache: BlockCache, count: int) -> None:
        """`count` more bytes are held; above the limit the oldest blocks of the folder go."""
        self._held += count
        if self._held <= cache.limit or not self._making_room.acquire(blocking=False):
            return
        try:
            self._held = _make_room(cache.folder, int(_KEPT * cache.limit))
        finally:
            self._making_room.release()

    def _fetch(self, cache: BlockCache, run: Run) -> None:
        try:
            cache.fetch(run, self)
        finally:
            with self._lock:
                for number in range(run.first, run.stop):
                    self._flying.pop((run.name, number), None)


def _read_ahead(cache_of: "weakref.ref[BlockCache]", process: _Process) -> None:
    """Fetch what is asked for ahead, in portions: who needs a block now finds a connection soon."""
    while cache_of() is not None:
        try:
            ranges = process.ahead.get(timeout=1.0)()
            for first in range(0, len(ranges), _AHEAD_AT_ONCE):
                cache = cache_of()
                if cache is None:
                    return
                wait(process.request(cache, ranges[first : first + _AHEAD_AT_ONCE]))
                del cache
        except queue.Empty:
            continue
        except DataError:  # who needs these bytes meets the fault there
            continue
        except RuntimeError:  # the interpreter ends and takes no more work
            return


def _runs(blocks: list[tuple[str, int]]) -> list[Run]:
    """Neighbouring blocks together, in the order in which the first of each is needed."""
    place = {block: number for number, block in enumerate(blocks)}
    runs: list[tuple[int, Run]] = []
    for name, number in sorted(blocks):
        needed = place[name, number]
        if runs:
            earliest, last = runs[-1]
            near = last.name == name and number == last.stop
            if near and (number + 1 - last.first) * BLOCK_BYTES <= GET_BYTES:
                runs[-1] = min(earliest, needed), Run(name, last.first, number + 1)
                continue
        runs.append((needed, Run(name, number, number + 1)))
    return [run for _, run in sorted(runs)]


def _blocks(start: int, stop: int) -> range:
    """Numbers of the blocks that hold bytes [start, stop)."""
    return range(start // BLOCK_BYTES, -(-stop // BLOCK_BYTES))


def _files(folder: Path) -> list[tuple[float, int, Path]]:
    """(modified, bytes, path) of every block in the folder."""
    found = []
    for path in folder.glob("*/*"):
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            found.append((status.st_mtime, status.st_size, path))
    return found


def _held(folder: Path) -> int:
    return sum(size for _, size, _ in _files(folder))


def _make_room(folder: Path, target: int) -> int:
    """Remove the oldest blocks until at most `target` bytes are held -> the bytes held then."""
    files = sorted(_files(folder))
    held = sum(size for _, size, _ in files)
    for _, size, path in files:
        if held <= target:
            break
        path.unlink(missing_ok=True)
        held -= size
    return held


def _remove(folder: Path, pid: int) -> None:
    if os.getpid() == pid:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _disk(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{folder}: cannot be written ({error.strerror}); give {FOLDER} a folder on a local disk with room"
        ) from None
