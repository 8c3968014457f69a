"""Content-addressed cache of fetched bytes: later builds read the same bytes even if a URL's content changes."""

import contextlib
import hashlib
import os
import uuid
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from data_pipeline import gate
from data_pipeline.errors import DataError
from data_pipeline.remote import CONNECTIONS
from data_pipeline.storage import open_storage


class RawCache:
    """Files named by their sha256, in a folder or under an s3:// prefix. Concurrent writers may put the same bytes."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._storage = open_storage(root) if root.startswith("s3://") else None

    def put(self, data: bytes) -> str:
        """Store the bytes and return their sha256, which is their name. Raises DataError if they cannot be written."""
        digest = hashlib.sha256(data).hexdigest()
        if self._storage is not None:
            self._storage.put_if_absent(digest, data)
            return digest
        path = self._path(digest)
        if not path.exists():
            temporary = path.with_name(f".{uuid.uuid4().hex}")
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary.write_bytes(data)
                os.replace(temporary, path)
            except OSError as error:
                with contextlib.suppress(OSError):
                    temporary.unlink(missing_ok=True)
                raise DataError(f"{self.root}: {error.strerror or error}; check the storage and run again") from None
        return digest

    def get(self, digest: str) -> bytes:
        """Return the bytes stored under `digest`.

        Raises DataError if `digest` is not a sha256, or if the bytes are missing or do not match it.
        """
        gate.check(gate.Sha256, digest, self.root, "build the dataset again")
        if self._storage is not None:
            data = self._storage.get(digest)
        else:
            try:
                data = self._path(digest).read_bytes()
            except OSError as error:
                raise DataError(
                    f"{self._path(digest)}: {error.strerror}; this fetched image is gone, restore it"
                ) from None
        if hashlib.sha256(data).hexdigest() != digest:
            raise DataError(f"{self.root}: {digest} does not match the digest in its name; restore it, or build again")
        return data

    def get_all(self, digests: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        """Yield (digest, bytes) in the order of `digests`. Raises as `get` does; S3 objects are read concurrently."""
        if self._storage is None:
            yield from ((digest, self.get(digest)) for digest in digests)
            return
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            asked: deque[tuple[str, Future[bytes]]] = deque()
            for digest in digests:
                asked.append((digest, pool.submit(self.get, digest)))
                if len(asked) == CONNECTIONS:
                    first, answer = asked.popleft()
                    yield first, answer.result()
            yield from ((digest, answer.result()) for digest, answer in asked)

    def _path(self, digest: str) -> Path:
        return Path(self.root) / digest[:2] / digest
