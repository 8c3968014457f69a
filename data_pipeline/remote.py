"""Objects on S3 and http(s): a GET that is cut off, stalled or refused resumes at the byte where it stopped.

Every wait is bounded: a read may wait PATIENCE_S seconds for the network, plus one per SLOWEST bytes received.
botocore's plain client is used, not s3fs: it resumes nothing by itself, needs no event loop, finds credentials and
endpoints where the AWS command line does, and can be reopened in every process.
"""

import contextlib
import fcntl
import functools
import os
import random
import re
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from data_pipeline.addresses import is_public
from data_pipeline.errors import ConfigError, DataError

PATIENCE_S = 60.0
SLOWEST = 100_000
STALL_S = 10.0
CONNECT_S = 5.0
CONNECTIONS = 16  # concurrent, per process and server
PIECE = 1 << 18  # bytes that a read holds in memory, whatever the size of its range

_SCRATCH = "tessera-upload-"
_MAX_PUT = 5 * 1024**3
_MAX_PAUSE_S = 5.0
_PAGE = 1000
_RETRIED = frozenset((408, 409, 425, 429))
_TOTAL = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")

Result = TypeVar("Result")


class Version(NamedTuple):
    """Version of an object at the time of a GET: its full size, -1 if the server did not say, and its tag."""

    size: int
    etag: str


@dataclass
class Answer:
    """An open GET. `read(n)` returns up to n bytes, none at the end. Opening and reading raise Transient."""

    version: Version
    start: int
    read: Callable[[int], bytes]
    close: Callable[[], None]


class NotFound(DataError):
    """The object does not exist."""


class Forbidden(DataError):
    """The credentials may not read the object, or may not learn that it is missing."""


class Transient(Exception):
    """A temporary failure of the network or the server; `wait_s` is how long the server asks to wait."""

    wait_s = 0.0


class Patience:
    """Time budget for the network waits of one operation; ends it with a DataError that names object and range."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.spent_s = 0.0
        self.faults = 0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time spent in the block."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.spent_s += time.monotonic() - began

    def check(self, received: int, fault: object, asked_s: float = 0.0) -> None:
        """Raise DataError when the time is used up, or would be by the wait that the server asks for."""
        if self.spent_s + asked_s > PATIENCE_S + received / SLOWEST:
            raise DataError(
                f"{self.what}: given up after {self.spent_s:.0f} s and {self.faults} faults, got {received} bytes; "
                f"last fault: {fault}; check the server and the network, then run the same command again"
            )

    def pause(self, received: int, fault: Transient) -> None:
        """Wait before the next attempt: twice as long each time, up to 5 s, with jitter, or as the server asks."""
        self.faults += 1
        self.check(received, fault, fault.wait_s)
        pause = min(_MAX_PAUSE_S, 0.05 * 2 ** min(self.faults, 10)) * random.uniform(0.5, 1.0)
        pause = max(pause, fault.wait_s)
        self.spent_s += pause
        time.sleep(pause)

    def until_done(self, attempt: Callable[[], Result]) -> Result:
        """Return the result of `attempt`, calling it again after each Transient."""
        while True:
            try:
                with self.waiting():
                    return attempt()
            except Transient as fault:
                self.pause(0, fault)


_lock = threading.Lock()


def process_lock() -> threading.Lock:
    """Return the lock of this process for resources that are opened once per process."""
    return _lock


def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)  # it may have been held at the fork, by a thread that the child lacks


class RemoteStorage:
    """Reads, the same for every kind of server. A subclass implements how to open a GET."""

    def __init__(self, root: str) -> None:
        self.root = root.rstrip("/")
        self.requests = 0
        self.received = 0
        self._opened: tuple[int, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["root"])  # type: ignore[misc]

    @property
    def client(self) -> Any:
        """Client of this process; connections do not survive a fork."""
        if self._opened is None or self._opened[0] != os.getpid():
            with process_lock():
                if self._opened is None or self._opened[0] != os.getpid():
                    self._opened = os.getpid(), self._connect()
        return self._opened[1]

    def path(self, name: str) -> str:
        """Return the URL of an object."""
        return f"{self.root}/{name}" if name else self.root

    def stream(
        self, name: str, start: int = 0, stop: int | None = None, seen: dict[str, Version] | None = None
    ) -> Iterator[bytes]:
        """Yield bytes [start, stop), or to the end, in pieces.

        seen: versions by name; a GET that answers with another version than the first one is refused.
        Raises DataError naming object and range when the bytes are missing, or when the time is used up.
        """
        seen = {} if seen is None else seen
        at = start
        patience = Patience(f"{self.path(name)} bytes {start}..{'' if stop is None else stop}")
        while stop is None or at < stop:
            answer = None
            try:
                with patience.waiting():
                    answer = self._get(name, at, stop)
                    self.requests += 1
                size = self._same(name, answer, at, seen).size
                stop = self._end(name, start, stop, size)
                while stop is None or at < stop:
                    with patience.waiting():
                        piece = answer.read(PIECE if stop is None else min(PIECE, stop - at))
                    if not piece:
                        break
                    at += len(piece)
                    self.received += len(piece)
                    yield piece
                    patience.check(at - start, "the server is slow")
                if stop is None:
                    return
                if at < stop:
                    raise Transient(f"the response ended {stop - at} bytes early")
            except Transient as fault:
                patience.pause(at - start, fault)
            finally:
                if answer is not None:
                    answer.close()

    def get(self, name: str) -> bytes:
        """Return the whole object. Raises DataError when it is missing."""
        return b"".join(self.stream(name))

    def get_range(self, name: str, start: int, stop: int) -> bytes:
        """Return bytes [start, stop). Raises DataError when there are fewer."""
        return b"".join(self.stream(name, start, stop))

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """Yield a private folder on this machine, after removing those that killed processes left."""
        self.clean()
        folder, lock = _locked_folder()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)

    def clean(self) -> None:
        """Remove scratch folders on this machine whose process was killed; a killed upload leaves nothing else."""
        for folder in Path(tempfile.gettempdir()).glob(f"{_SCRATCH}*"):
            with contextlib.suppress(OSError):
                lock = os.open(folder, os.O_RDONLY)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # refused while its process lives
                    shutil.rmtree(folder)
                finally:
                    os.close(lock)

    def _same(self, name: str, answer: Answer, at: int, seen: dict[str, Version]) -> Version:
        version = seen.setdefault(name, answer.version)
        if answer.version != version:
            raise DataError(
                f"{self.path(name)}: replaced while read: size and ETag were {version.size} {version.etag!r}, "
                f"are {answer.version.size} {answer.version.etag!r}; keep datasets unchanged, or index them again"
            )
        if answer.start != at:
            raise DataError(
                f"{self.path(name)}: requested bytes from {at}, the server sends from {answer.start}: it lacks "
                "ranges; use a server that does, or read in sequence with stream.sequential"
            )
        return version

    def _end(self, name: str, start: int, stop: int | None, size: int) -> int | None:
        if stop is None:
            return None if size < 0 else size
        if 0 <= size < stop:
            raise DataError(f"{self.path(name)}: requested bytes {start}..{stop} of {size}; it was truncated")
        return stop

    def _connect(self) -> Any:
        raise NotImplementedError

    def _get(self, name: str, start: int, stop: int | None) -> Answer:
        """Request bytes [start, stop), or from `start` to the end. Raises Transient or DataError."""
        raise NotImplementedError

    def _refused(self, name: str, status: int, said: str) -> Exception:
        """Return the exception for an answer with this status."""
        where = self.path(name)
        if status >= 500 or status in _RETRIED:
            return Transient(f"status {status} {said}")
        if status in (404, 410):
            return NotFound(f"{where}: not found; check the path, or build the dataset first")
        if status in (401, 403):
            return Forbidden(f"{where}: permission denied ({said}); grant these credentials access")
        if status == 416:
            return DataError(f"{where}: shorter than the requested range; it was truncated or replaced")
        return DataError(f"{where}: the server answered {status} {said}")


def _locked_folder() -> tuple[Path, int]:
    """Create a temporary folder -> (folder, descriptor that holds its lock). Raises DataError when that fails."""
    while True:
        try:
            folder = Path(tempfile.mkdtemp(prefix=_SCRATCH))
        except OSError as error:
            where = tempfile.gettempdir()
            raise DataError(f"{where}: {error.strerror}; free space there, or set TMPDIR to another folder") from None
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(folder, os.O_RDONLY)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if folder.exists():
                return folder, lock
            os.close(lock)  # another process's `clean` removed it in between


# --------------------------------------------------------------------------------------------------- S3


class S3Storage(RemoteStorage):
    """An S3 prefix. Objects are created by one PUT with If-None-Match: *, so no reader sees a partial object."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self._bucket, _, self._prefix = self.root.removeprefix("s3://").partition("/")

    def exists(self, name: str) -> bool:
        """Return whether an object of this name exists."""
        return self._head(name) is not None

    def stat(self, name: str) -> tuple[int, str]:
        """Return (bytes, etag). Raises DataError when the object is missing."""
        version = self._head(name)
        if version is None:
            raise self._refused(name, 404, "")
        return version

    def folders(self) -> list[str]:
        """Return the names of the prefixes directly under the root that hold objects, sorted, without hidden ones."""
        found = [entry["Prefix"].rstrip("/").rpartition("/")[2] for entry in self._pages("CommonPrefixes", "/")]
        return sorted(name for name in found if not name.startswith("."))

    def names_below(self) -> list[str]:
        """Return the names of all objects under the root, at any depth, sorted."""
        return sorted(entry["Key"].removeprefix(self._key("")) for entry in self._pages("Contents", ""))

    def list(self) -> list[str]:
        """Return the names of the objects directly under the root, sorted."""
        return sorted(entry["Key"].rpartition("/")[2] for entry in self._pages("Contents", "/"))

    def remove(self, name: str) -> None:
        """Remove one object; do nothing when it is missing."""
        self._call(name, "delete_object", Key=self._key(name))

    def remove_all(self) -> None:
        """Remove the root with everything under it."""
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            for _ in pool.map(self.remove, self.names_below()):
                pass

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """Create the object atomically -> True; return False and change nothing when the name is taken."""
        return self._put(name, lambda: data)

    def put_file_if_absent(self, name: str, path: Path) -> bool:
        """Create the object from a file of at most 5 GiB, as `put_if_absent` does."""
        size = path.stat().st_size
        if size > _MAX_PUT:
            raise DataError(f"{self.path(name)}: {size} bytes; an S3 upload is at most {_MAX_PUT}, make smaller shards")
        with path.open("rb") as file:
            return self._put(name, lambda: file)

    def replace(self, name: str, data: bytes) -> None:
        """Create or overwrite the object, atomically."""
        self._call(name, "put_object", Key=self._key(name), Body=data)

    def _put(self, name: str, body: Callable[[], bytes | BinaryIO]) -> bool:
        """Create the object. An attempt whose answer was lost may have done so, hence an existing one is compared."""
        patience = Patience(self.path(name))

        def attempt() -> bool:
            contents = body()
            if not isinstance(contents, bytes):
                contents.seek(0)
            try:
                self._request(name, "put_object", Key=self._key(name), Body=contents, IfNoneMatch="*")
                return True
            except _Taken:
                return patience.faults > 0 and self._holds(name, body())

        return patience.until_done(attempt)

    def _holds(self, name: str, contents: bytes | BinaryIO) -> bool:
        if isinstance(contents, bytes):
            return self.get(name) == contents
        contents.seek(0)
        return all(contents.read(len(piece)) == piece for piece in self.stream(name)) and not contents.read(1)

    def _head(self, name: str) -> Version | None:
        try:
            answer = self._call(name, "head_object", Key=self._key(name))
        except NotFound:
            return None
        return Version(int(answer["ContentLength"]), answer["ETag"].strip('"'))

    def _pages(self, field: str, delimiter: str) -> Iterator[dict[str, Any]]:
        options: dict[str, Any] = {"Prefix": self._key(""), "MaxKeys": _PAGE}
        while True:
            try:
                page = self._call("", "list_objects_v2", Delimiter=delimiter, **options)
            except NotFound:
                return
            yield from page.get(field, ())
            if not page["IsTruncated"]:
                return
            options["ContinuationToken"] = page["NextContinuationToken"]

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}" if self._prefix else name

    def _call(self, name: str, method: str, **arguments: Any) -> dict[str, Any]:
        return Patience(self.path(name)).until_done(lambda: self._request(name, method, **arguments))

    def _request(self, name: str, method: str, **arguments: Any) -> dict[str, Any]:
        """Make one botocore call. Raises Transient, _Taken or a DataError such as NotFound."""
        from botocore import exceptions as botocore

        try:
            return dict(getattr(self.client, method)(Bucket=self._bucket, **arguments))
        except botocore.ClientError as error:
            status, said = error.response["ResponseMetadata"]["HTTPStatusCode"], error.response["Error"]
            if status == 412:
                raise _Taken from None
            raise self._refused(name, status, f"{said.get('Code')} {said.get('Message', '')}") from None
        except (botocore.HTTPClientError, botocore.IncompleteReadError) as error:
            raise Transient(str(error)) from None
        except botocore.BotoCoreError as error:
            raise DataError(f"{self.path(name)}: {error}; set AWS credentials, region and AWS_ENDPOINT_URL") from None

    def _refused(self, name: str, status: int, said: str) -> Exception:
        if "NoSuchBucket" in said:
            return DataError(f"{self.path(name)}: no such bucket; create it, or check the address")
        if "QuotaExceeded" in said:
            return DataError(
                f"{self.path(name)}: quota exceeded ({said.strip()}); raise the quota and run the same command again"
            )
        return super()._refused(name, status, said)

    def _get(self, name: str, start: int, stop: int | None) -> Answer:
        ranged = {} if start == 0 and stop is None else {"Range": _range(start, stop)}
        answer = self._request(name, "get_object", Key=self._key(name), **ranged)
        first, size = _content_range(answer.get("ContentRange"), answer["ContentLength"])
        body = answer["Body"]
        return Answer(Version(size, answer["ETag"].strip('"')), first, _reading(body.read), body.close)

    def _connect(self) -> Any:
        """Return the client for the present environment, one per process: creating one takes a tenth of a second."""
        said = tuple(sorted(pair for pair in os.environ.items() if pair[0].startswith("AWS_")))
        key = (os.getpid(), CONNECT_S, STALL_S, said)
        if key not in _clients:
            _clients[key] = self._new_client()
        return _clients[key]

    def _new_client(self) -> Any:
        import botocore.session
        from botocore import UNSIGNED
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError

        session = botocore.session.get_session()
        options: dict[str, Any] = {
            "connect_timeout": CONNECT_S,
            "read_timeout": STALL_S,
            "max_pool_connections": CONNECTIONS,
            "retries": {"total_max_attempts": 1},  # retried here, where the byte to resume at is known
            "request_checksum_calculation": "when_required",  # servers other than AWS refuse the newer checksums
            "response_checksum_validation": "when_required",
        }
        try:
            if session.get_credentials() is None:
                options["signature_version"] = UNSIGNED
            client = session.create_client("s3", config=Config(**options))
            if "amazonaws.com" in client.meta.endpoint_url:
                return client
            return session.create_client("s3", config=Config(s3={"addressing_style": "path"}, **options))
        except (BotoCoreError, ValueError) as error:
            raise ConfigError(f"{self.root}: {error}; set AWS credentials, region and AWS_ENDPOINT_URL") from None


_clients: dict[tuple[Any, ...], Any] = {}  # guarded by `process_lock`


class _Taken(Exception):
    """PUT: the name is taken."""


# ------------------------------------------------------------------------------------------------- http


_CODINGS = {
    "aes128gcm",
    "br",
    "compress",
    "dcb",
    "dcz",
    "deflate",
    "exi",
    "gzip",
    "pack200-gzip",
    "zstd",
}  # IANA's list
_PAGE_BEGINS = b"<\xef \r\n\t"  # first byte of a page: "<", a byte order mark or white space


def packings(headers: Any) -> list[str]:
    """Return the content codings (IANA's names) that Content-Encoding gives for a body, outermost first.

    Other words (utf-8, none, binary, image/jpeg, aws-chunked) name no coding: the body is not encoded.
    """
    said = ",".join(value for name, value in headers.items() if name.lower() == "content-encoding")
    words = [word.strip().strip('"').lower() for word in said.split(",")]
    return [word for word in reversed(words) if word.removeprefix("x-") in _CODINGS]


class Head(NamedTuple):
    """A server's metadata of an object. status: 200 if it exists. packed: encoded as gzip, by its Content-Encoding."""

    status: int
    reason: str
    version: Version
    packed: bool


class HttpStorage(RemoteStorage):
    """A folder behind http(s), read only. The server must support range requests, except for whole objects.

    Redirects to private networks are refused, except to the host that the root itself names.
    takes_packed: accept objects that the server encodes as gzip, and return them encoded; otherwise refuse them.
    """

    takes_packed = False

    def exists(self, name: str) -> bool:
        """Return whether an object of this name exists."""
        return self._head(name).status == 200

    def stat(self, name: str) -> tuple[int, str]:
        """Return (bytes, -1 if the server does not say; etag or date). Raises DataError when the object is missing."""
        return self.head(name).version

    def head(self, name: str) -> Head:
        """Return the server's metadata of an object. Raises DataError when it is missing."""
        answer = self._head(name)
        if answer.status != 200:
            raise self._refused(name, answer.status, answer.reason or "")
        return answer

    def list(self) -> list[str]:
        """Return nothing: http cannot list objects."""
        return []

    folders = list

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """Raise DataError: http is read only."""
        raise DataError(f"{self.path(name)}: http is read-only; write to a folder or to s3://")

    def put_file_if_absent(self, name: str, path: Path) -> bool:
        """Raise DataError: http is read only."""
        return self.put_if_absent(name, b"")

    def replace(self, name: str, data: bytes) -> None:
        """Raise DataError: http is read only."""
        self.put_if_absent(name, data)

    def remove(self, name: str) -> None:
        """Raise DataError: http is read only."""
        self.put_if_absent(name, b"")

    def remove_all(self) -> None:
        """Raise DataError: http is read only."""
        self.put_if_absent("", b"")

    def _head(self, name: str) -> Head:
        """Use HEAD, or a GET of the first byte when HEAD is refused or a web page may replace a missing object."""

        def attempt() -> Head:
            answer = self._request("HEAD", name, {"Accept-Encoding": "identity"})
            answer.release_conn()
            if answer.status == 200 and not _says_page(answer.headers):
                return self._told(name, answer)
            answer = self._request("GET", name, {"Accept-Encoding": "identity", "Range": _range(0, 1)})
            try:
                first = _reading_raw(answer)(1) if answer.status in (200, 206) else b""
            finally:
                answer.close()
            if first and first in _PAGE_BEGINS and _says_page(answer.headers) and not _is_page(name):
                return Head(404, "got a web page instead", Version(-1, ""), False)
            return self._told(name, answer)

        return Patience(self.path(name)).until_done(attempt)

    def _told(self, name: str, answer: Any) -> Head:
        """Return the Head of an answer. Raises Transient, and DataError for an unsupported content coding."""
        said, total = answer.reason or "", answer.headers.get("Content-Range", "")
        if answer.status == 416 and total.endswith("*/0"):  # an empty object has no first byte
            return Head(200, said, Version(0, _tag(answer.headers)), False)
        if answer.status not in (200, 206):
            if isinstance(error := self._fault(name, answer), Transient):
                raise error
            return Head(answer.status, said, Version(-1, ""), False)
        _, size = _place_of(answer)
        return Head(200, said, Version(size, _tag(answer.headers)), self._packed(name, answer.headers))

    def _fault(self, name: str, answer: Any) -> Exception:
        """Return the exception for an answer without an object."""
        error = self._refused(name, answer.status, answer.reason or "")
        if isinstance(error, Transient):
            error.wait_s = retry_after_s(answer.headers)
        return error

    def _packed(self, name: str, headers: Any) -> bool:
        """Return whether the object is encoded as gzip. Raises DataError for a coding that is not accepted."""
        found = packings(headers)
        if not found or (found in (["gzip"], ["x-gzip"]) and self.takes_packed):
            return bool(found)
        raise DataError(
            f"{self.path(name)}: the server compresses it as {', '.join(found)} against Accept-Encoding: identity; "
            "disable Content-Encoding for this file"
        )

    def _get(self, name: str, start: int, stop: int | None) -> Answer:
        ranged = {} if start == 0 and stop is None else {"Range": _range(start, stop)}
        answer = self._request("GET", name, {"Accept-Encoding": "identity", **ranged})
        if answer.status not in (200, 206):
            answer.close()
            raise self._fault(name, answer)
        try:
            self._packed(name, answer.headers)
        except DataError:
            answer.close()
            raise
        first, size = _place_of(answer)
        return Answer(Version(size, _tag(answer.headers)), first, _reading_raw(answer), answer.close)

    def _request(self, method: str, name: str, headers: dict[str, str]) -> Any:
        import urllib3

        try:
            return self.client.request(method, self.path(name), headers=headers, preload_content=False)
        except _PrivateTarget as target:
            raise DataError(
                f"{self.path(name)}: the server redirects to {target}, on a private network; use that address itself "
                "to permit it"
            ) from None
        except urllib3.exceptions.LocationValueError as error:
            raise DataError(f"{self.path(name)}: not an address ({error})") from None
        except urllib3.exceptions.HTTPError as error:
            raise Transient(str(error)) from None

    def _connect(self) -> Any:
        import urllib3

        manager = urllib3.PoolManager(
            maxsize=CONNECTIONS,
            timeout=urllib3.Timeout(connect=CONNECT_S, read=STALL_S),
            retries=urllib3.Retry(connect=0, read=0, status=0, other=0, redirect=5, respect_retry_after_header=False),
        )
        with contextlib.suppress(urllib3.exceptions.LocationParseError):  # reported by the first request
            manager.pool_classes_by_scheme = _guarded_pools(urllib3.util.parse_url(self.root).host or "")
        return manager


class _PrivateTarget(Exception):
    """A redirect to a host on a private network; the message is the host."""


def _guarded_pools(named: str) -> dict[str, Any]:
    """Return pools by scheme whose connections reach only public addresses and the host that the user named."""
    from urllib3 import HTTPConnectionPool, HTTPSConnectionPool
    from urllib3.connection import HTTPConnection, HTTPSConnection

    own = named.strip("[]").rstrip(".").lower()

    class Guarded:
        def _new_conn(self: Any) -> Any:
            if self.host.strip("[]").rstrip(".").lower() == own:
                return super()._new_conn()  # type: ignore[misc]
            with contextlib.suppress(socket.gaierror):  # raised again below, as urllib3's own
                for found in socket.getaddrinfo(self._dns_host, self.port, type=socket.SOCK_STREAM):
                    _refuse_private(str(found[4][0]), self.host)
            opened = super()._new_conn()  # type: ignore[misc]
            try:
                _refuse_private(opened.getpeername()[0], self.host)  # the name may resolve to another address by now
            except _PrivateTarget:
                opened.close()
                raise
            return opened

    plain = type("GuardedConnection", (Guarded, HTTPConnection), {})
    secure = type("GuardedSecureConnection", (Guarded, HTTPSConnection), {})
    return {
        "http": type("GuardedPool", (HTTPConnectionPool,), {"ConnectionCls": plain}),
        "https": type("GuardedSecurePool", (HTTPSConnectionPool,), {"ConnectionCls": secure}),
    }


def _refuse_private(address: str, host: str) -> None:
    if not is_public(address):
        raise _PrivateTarget(host)


def _reading(read: Callable[[int], bytes]) -> Callable[[int], bytes]:
    """Wrap `read` so that errors of either client within a body become Transient."""
    import urllib3
    from botocore.exceptions import BotoCoreError

    def checked(count: int) -> bytes:
        try:
            return read(count)
        except (urllib3.exceptions.HTTPError, BotoCoreError, OSError) as error:
            raise Transient(str(error)) from None

    return checked


def _reading_raw(answer: Any) -> Callable[[int], bytes]:
    """Return a reader of the bytes as sent, without decoding: sizes and ranges count these."""
    return _reading(functools.partial(answer.read, decode_content=False))


def _range(start: int, stop: int | None) -> str:
    return f"bytes={start}-{'' if stop is None else stop - 1}"


def _content_range(header: str | None, length: int) -> tuple[int, int]:
    """Parse Content-Range -> (first byte sent, size of the whole object or -1 if not given).

    length: of the body if it is the whole object, else -1.
    """
    found = _TOTAL.match(header or "")
    if found is None:
        return 0, length
    return int(found[1]), -1 if found[2] == "*" else int(found[2])


def _place_of(answer: Any) -> tuple[int, int]:
    """Return `_content_range` of an http answer; the length of a part says nothing about the whole."""
    length = int(answer.headers.get("Content-Length", -1)) if answer.status == 200 else -1
    return _content_range(answer.headers.get("Content-Range"), length)


def retry_after_s(headers: Any) -> float:
    """Return the seconds that Retry-After asks for: a number, or until a date by the server's clock; else 0."""
    said = headers.get("Retry-After", "").strip()
    if re.fullmatch(r"\d{1,9}(\.\d+)?", said, re.ASCII):
        return float(said)
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        until = parsedate_to_datetime(said)
        now = parsedate_to_datetime(headers["Date"]) if "Date" in headers else datetime.now(UTC)
        return max(0.0, (until - now).total_seconds())
    return 0.0


def _says_page(headers: Any) -> bool:
    return str(headers.get("Content-Type", "")).lower().startswith(("text/html", "application/xhtml"))


def _is_page(name: str) -> bool:
    return name.partition("?")[0].lower().endswith((".html", ".htm", ".xhtml"))


def _tag(headers: Any) -> str:
    return str(headers.get("ETag") or headers.get("Last-Modified") or "").strip('"')
