"""Block cache on a local disk for ranges of remote objects: each byte is fetched once, by whichever process needs it.

A block is a file of BLOCK_BYTES and the xxh3-64 of its contents, so that remains of a crash or a full disk are not
taken for data: a process verifies a block that another wrote once, at its first read. Blocks are written aside and
renamed, so processes of a node share a folder without communicating. The process that fetches holds a lock for
GET_BYTES of the object, which the kernel releases when the process is killed. Neighbouring blocks are fetched by one
GET. Read-ahead goes to the disk: memory holds one block per connection, however far ahead.
"""

import contextlib
import errno
import fcntl
import os
import queue
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from io import FileIO
from pathlib import Path
from typing import Any

import xxhash

from data_pipeline.errors import DataError
from data_pipeline.remote import CONNECTIONS, PATIENCE_S, RemoteStorage, Version, process_lock

BLOCK_BYTES = 1 << 18
GET_BYTES = 1 << 23
FOLDER = "TESSERA_CACHE"  # environment variable: a folder on a local disk that outlives the process

_SUM_BYTES = 8
_KEPT = 0.9  # share of the limit that eviction leaves
_LOCK_PAUSE_S = 0.005
_MOST_SOUND = 1 << 18
_AHEAD_AT_ONCE = 512  # samples

ByteRange = tuple[str, int, int]
"""(object name, first byte, end)."""
Block = tuple[str, int]
"""(object name, number of the block in the object)."""


class BlockCache:
    """Reads ranges of `storage` through blocks in a folder, TESSERA_CACHE or a temporary one of this process.

    limit: bytes it may hold, by default half of the free disk space; the oldest blocks are evicted first.
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
        """Register an object. digest: of its contents; names its blocks."""
        self._objects[name] = size, digest

    def get_ranges(self, ranges: Sequence[ByteRange]) -> list[bytes]:
        """Return the bytes of each range. Raises DataError when an object is missing or has another size."""
        process = self._process()
        for _ in range(2):  # the first may wait for a read-ahead that left its blocks to another process
            for future in process.request(self, ranges):
                future.result()
        return [self._read(process, *wanted) for wanted in ranges]

    def prefetch(self, ranges: Callable[[], Sequence[ByteRange]]) -> None:
        """Fetch the missing parts of these ranges, in order, in the background, where `ranges` is called too."""
        self._process().ahead.put(ranges)

    def opening(self) -> threading.Lock:
        """Return the lock of the thread of this process that reads indices."""
        return self._process().opening

    def drop(self, wanted: ByteRange) -> None:
        """Remove the blocks of a range whose contents were wrong."""
        name, start, stop = wanted
        for number in _blocks(start, stop):
            self._process().distrust((name, number))
            _unlink(self._path((name, number)))

    def fetch(self, process: "_Process", blocks: Sequence[Block], patient: bool) -> None:
        """Fetch those of these blocks, all in one part of an object, that are still missing; one GET per run of blocks.

        Where another process fetches from that part: wait for it if `patient`, else leave the blocks to it.
        """
        with self._claim(blocks[0], patient) as claimed:
            missing = sorted(block for block in blocks if claimed and not self.holds(block))
            while missing:
                run = [block for place, block in enumerate(missing) if block[1] == missing[0][1] + place]
                self._fetch_run(process, *run[0], len(run))
                missing = missing[len(run) :]

    def _fetch_run(self, process: "_Process", name: str, first: int, count: int) -> None:
        """Fetch neighbouring blocks by one GET, and store each as it arrives."""
        size, _ = self._objects[name]
        start, stop = first * BLOCK_BYTES, min((first + count) * BLOCK_BYTES, size)
        rest, number = b"", first
        for piece in self._storage.stream(name, start, stop, process.seen):
            self._check(name, process.seen[name])
            rest = rest + piece if rest else piece  # a piece is a block unless the connection broke
            while len(rest) >= BLOCK_BYTES:
                self._store(process, (name, number), rest[:BLOCK_BYTES])
                rest, number = rest[BLOCK_BYTES:], number + 1
        if rest:
            self._store(process, (name, number), rest)

    def missing(self, process: "_Process", ranges: Iterable[ByteRange]) -> Iterator[Block]:
        """Yield each block of the ranges that is not in the folder, once, in their order."""
        wanted = {(name, number): None for name, start, stop in ranges for number in _blocks(start, stop)}
        return (block for block in wanted if not (process.trusts(block) or self.holds(block)))

    def holds(self, block: Block) -> bool:
        """Return whether this block is in the folder."""
        return os.path.exists(self._path(block))

    @contextlib.contextmanager
    def _claim(self, block: Block, patient: bool) -> Iterator[bool]:
        """Lock the part that contains the block -> whether to fetch: the lock is ours, or its holder is too slow."""
        with _disk(self.folder):
            lock = _create(f"{self._path(_part(block))}.lock")
        with lock:
            deadline = time.monotonic() + (PATIENCE_S if patient else 0)
            while not (ours := _try_lock(lock)) and time.monotonic() < deadline:
                time.sleep(_LOCK_PAUSE_S)
            try:
                yield ours or patient
            finally:
                if ours:
                    fcntl.flock(lock, fcntl.LOCK_UN)  # closing alone would leave it with a process forked meanwhile

    def _check(self, name: str, version: Version) -> None:
        size, _ = self._objects[name]
        if version.size not in (size, -1):
            raise DataError(
                f"{self._storage.path(name)}: {version.size} bytes, the manifest has {size}; the file was truncated or "
                "replaced, run `tessera data verify` and download it again"
            )

    def _read(self, process: "_Process", name: str, start: int, stop: int) -> bytes:
        parts = []
        for number in _blocks(start, stop):
            first = number * BLOCK_BYTES
            end = min(first + BLOCK_BYTES, self._objects[name][0])
            wanted = max(start, first) - first, min(stop, end) - first
            part = self._load(process, (name, number), wanted)
            if part is None:  # damaged, or evicted already: the folder is small
                process.distrust((name, number))
                whole = b"".join(self._storage.stream(name, first, end, process.seen))
                part = whole[wanted[0] : wanted[1]]
            parts.append(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _load(self, process: "_Process", block: Block, wanted: tuple[int, int]) -> bytes | None:
        """Return bytes [start, stop) of a block; None when it is missing or damaged."""
        path, (start, stop) = self._path(block), wanted
        try:
            file = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            if process.trusts(block):
                data = os.pread(file, stop - start, start)
                return data if len(data) == stop - start else None
            whole = os.pread(file, BLOCK_BYTES + _SUM_BYTES, 0)
        finally:
            os.close(file)
        if xxhash.xxh3_64_digest(memoryview(whole)[:-_SUM_BYTES]) == whole[-_SUM_BYTES:]:
            process.trust(block)
            return whole[start:stop]
        _unlink(path)
        return None

    def _store(self, process: "_Process", block: Block, data: bytes) -> None:
        path = self._path(block)
        aside = f"{path}.{os.getpid()}-{threading.get_ident()}"
        with _disk(self.folder):
            with _create(aside) as file:
                if file.write(data) != len(data) or file.write(xxhash.xxh3_64_digest(data)) != _SUM_BYTES:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.rename(aside, path)
        process.trust(block)
        process.grow(self, len(data))

    def _path(self, block: Block) -> str:
        name, number = block
        digest = self._objects[name][1]
        return f"{self.folder}/{digest[:2]}/{digest[:32]}-{number}"

    def _process(self) -> "_Process":
        """Return the threads and locks of this process, which survive neither a fork nor a spawn."""
        with process_lock():
            if self._mine is None or self._mine.pid != os.getpid():
                self._mine = _Process(self)
            return self._mine


class _Process:
    """State of one process: connections, blocks in flight, bytes held."""

    def __init__(self, cache: BlockCache) -> None:
        self.pid = os.getpid()
        self.seen: dict[str, Version] = {}
        self._sound: set[Block] = set()
        self.ahead: queue.SimpleQueue[Callable[[], Sequence[ByteRange]]] = queue.SimpleQueue()
        self._pool = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="get")
        self.opening = threading.Lock()
        self._lock = threading.Lock()
        self._flying: dict[Block, Future[None]] = {}
        self._held = _held(cache.folder)
        self._making_room = threading.Lock()
        threading.Thread(target=_read_ahead, args=(weakref.ref(cache), self), daemon=True, name="read-ahead").start()

    def request(self, cache: BlockCache, ranges: Sequence[ByteRange], patient: bool = True) -> list[Future[None]]:
        """Start to fetch the blocks that are missing and not in flight -> the futures to wait for."""
        blocks = list(cache.missing(self, ranges))
        parts: dict[Block, list[Block]] = {}
        with self._lock:
            futures = {self._flying[block] for block in blocks if block in self._flying}
            for block in blocks:
                if block not in self._flying:
                    parts.setdefault(_part(block), []).append(block)
            for part in parts.values():
                future = self._pool.submit(self._fetch, cache, part, patient)
                self._flying.update((block, future) for block in part)
                futures.add(future)
        return list(futures)

    def trusts(self, block: Block) -> bool:
        """Return whether this process wrote or verified the block, which may have been evicted since."""
        return block in self._sound

    def trust(self, block: Block) -> None:
        """Mark a block as verified; at _MOST_SOUND marks all are dropped, and blocks are verified again."""
        if len(self._sound) >= _MOST_SOUND:
            self._sound = set()
        self._sound.add(block)

    def distrust(self, block: Block) -> None:
        """Remove the mark of a block that is gone or damaged."""
        self._sound.discard(block)

    def grow(self, cache: BlockCache, count: int) -> None:
        """Count `count` more bytes held; above the limit, evict the oldest blocks of the folder."""
        self._held += count
        if self._held <= cache.limit or not self._making_room.acquire(blocking=False):
            return
        try:
            self._held = _make_room(cache.folder, int(_KEPT * cache.limit))
        finally:
            self._making_room.release()

    def _fetch(self, cache: BlockCache, blocks: list[Block], patient: bool) -> None:
        try:
            cache.fetch(self, blocks, patient)
        finally:
            with self._lock:
                for block in blocks:
                    del self._flying[block]


def _read_ahead(cache_of: "weakref.ref[BlockCache]", process: _Process) -> None:
    """Fetch requested read-ahead a portion at a time, so that a block needed now gets a connection soon."""
    while cache_of() is not None:
        try:
            ranges = process.ahead.get(timeout=1.0)()
            for first in range(0, len(ranges), _AHEAD_AT_ONCE):
                for patient in (False, True):  # first the parts that no other process fetches
                    cache = cache_of()
                    if cache is None:
                        return
                    wait(process.request(cache, ranges[first : first + _AHEAD_AT_ONCE], patient))
                    del cache
        except queue.Empty:
            continue
        except DataError:  # raised again where these bytes are needed
            continue
        except RuntimeError:  # the interpreter is shutting down
            return


def _part(block: Block) -> Block:
    """Return the first block of the part (GET_BYTES) that contains a block."""
    name, number = block
    return name, number - number % (GET_BYTES // BLOCK_BYTES)


def _blocks(start: int, stop: int) -> range:
    """Return the numbers of the blocks that hold bytes [start, stop)."""
    return range(start // BLOCK_BYTES, -(-stop // BLOCK_BYTES))


def _files(folder: Path) -> list[tuple[float, int, Path]]:
    """Return (modification time, bytes, path) of every block in the folder."""
    found = []
    for path in folder.glob("*/*"):
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            found.append((status.st_mtime, status.st_size, path))
    return found


def _held(folder: Path) -> int:
    return sum(size for _, size, _ in _files(folder))


def _make_room(folder: Path, target: int) -> int:
    """Remove the oldest blocks until at most `target` bytes are held -> the bytes still held."""
    files = sorted(_files(folder))
    held = sum(size for _, size, _ in files)
    for _, size, path in files:
        if held <= target:
            break
        path.unlink(missing_ok=True)
        held -= size
    return held


def _try_lock(file: FileIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _create(path: str) -> FileIO:
    try:
        return open(path, "wb", buffering=0)
    except FileNotFoundError:
        with contextlib.suppress(FileExistsError):
            os.mkdir(os.path.dirname(path))
        return open(path, "wb", buffering=0)


def _unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _remove(folder: Path, pid: int) -> None:
    if os.getpid() == pid:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _disk(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{folder}: cannot be written ({error.strerror}); set {FOLDER} to a folder on a local disk with free space"
        ) from None
