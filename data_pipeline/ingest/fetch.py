"""Fetch URLs with bounded time and memory, and without reaching private networks.

Every attempt ends within `timeout_s`, and all pauses between attempts together within `attempts * timeout_s`. A body is
limited to `max_bytes` while it arrives; redirects are followed one by one. Only http(s) URLs are fetched, and none on a
private network: the socket itself refuses such a peer, however the host is spelled and whatever its name resolves to.
Behind a proxy (http_proxy, https_proxy, no_proxy) the peer is the proxy, so the target's addresses are resolved and
checked instead. Transient failures (timeouts, broken connections, busy or failing servers) are retried and finally
recorded as transient: they do not count as bad data, and `tessera data retry` tries them again.
"""

import asyncio
import contextlib
import hashlib
import random
import socket
import ssl
import time
import zlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urljoin
from urllib.request import getproxies, proxy_bypass

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from data_pipeline.addresses import is_public, is_within
from data_pipeline.config import FetchRules
from data_pipeline.errors import ConfigError
from data_pipeline.ingest.cache import RawCache
from data_pipeline.ingest.inputs import GZIP_MAGIC
from data_pipeline.remote import packings, retry_after_s
from data_pipeline.schema import Link

MAX_REDIRECTS = 5
DNS_TTL_S = 300.0
USER_AGENT = "tessera"

_BACKOFF_S = 0.5
_CHUNK = 65536
_REDIRECTS = {301, 302, 303, 307, 308}
_BUSY = {408, 425, 429}
_GZIP = 16 + zlib.MAX_WBITS  # zlib's `wbits` for the gzip format


@dataclass(frozen=True)
class Outcome:
    """Result of fetching one URL: the sha256 of its bytes in the cache, or the reason for failure.

    http_status: of the last response, 0 without one. attempts: how many were made.
    """

    sha256: str = ""
    reason: str = ""
    detail: str = ""
    http_status: int = 0
    attempts: int = 1
    transient: bool = False


class FetchError(Exception):
    """One failed attempt. transient: a retry may succeed, after the `wait_s` seconds that the server asks for."""

    def __init__(
        self, reason: str, detail: str = "", status: int = 0, transient: bool = False, wait_s: float = 0.0
    ) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail, self.status = reason, detail, status
        self.transient, self.wait_s = transient, wait_s


class PrivateAddress(OSError):
    """Raised for an address in a forbidden network, or a host name that resolves to one."""


def fetch_all(links: list[Link], rules: FetchRules, cache: RawCache) -> list[Outcome]:
    """Fetch all links into the cache and return their outcomes in order."""

    async def run() -> list[Outcome]:
        async with Fetcher(rules, cache) as fetcher:
            return await fetcher.fetch_all(links)

    return asyncio.run(run())


class Fetcher:
    """Fetcher for one event loop: at most `concurrency` requests at once, at most `per_host` to one host."""

    def __init__(self, rules: FetchRules, cache: RawCache) -> None:
        self._rules = rules
        self._cache = cache
        self._all = asyncio.Semaphore(rules.concurrency)
        self._hosts: dict[str, asyncio.Semaphore] = {}

    async def __aenter__(self) -> "Fetcher":
        said = {scheme: url for scheme, url in getproxies().items() if scheme in ("http", "https")}
        self._proxies = {scheme: _proxy(url) for scheme, url in said.items()}
        for proxy in set(self._proxies.values()):
            await _must_be_known(proxy)
        self._resolver = GuardedResolver(self._rules)
        self._direct = self._session(lambda info: _GuardedSocket(self._rules, *info[:3]))
        self._proxied = self._session(None)  # unguarded: its peers are proxies, which may be on a private network
        return self

    def _session(self, socket_factory: Callable[[Any], socket.socket] | None) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(
            resolver=self._resolver if socket_factory else None,
            limit=0,
            use_dns_cache=socket_factory is None,
            socket_factory=socket_factory,
        )
        headers = {"User-Agent": USER_AGENT, "Accept-Encoding": "identity", "Accept": "image/*,*/*;q=0.5"}
        options: dict[str, Any] = {"cookie_jar": aiohttp.DummyCookieJar(), "trust_env": False, "auto_decompress": False}
        return aiohttp.ClientSession(connector=connector, headers=headers, **options)

    async def __aexit__(self, *_: object) -> None:
        await self._direct.close()
        await self._proxied.close()
        await self._resolver.close()

    async def fetch_all(self, links: list[Link]) -> list[Outcome]:
        """Fetch all links and return their outcomes in order."""
        return list(await asyncio.gather(*(self.fetch(link) for link in links)))

    async def fetch(self, link: Link) -> Outcome:
        """Fetch one link, with retries. Server and network failures are returned as outcomes, never raised."""
        url = link.url.replace("&amp;", "&")
        patience_s = self._rules.attempts * self._rules.timeout_s  # limit on all pauses; waiting in the queue is free
        host = self._hosts.setdefault(_host(url), asyncio.Semaphore(self._rules.per_host))
        attempt = 0
        while True:
            attempt += 1
            async with host, self._all:
                outcome, wait_s = await self._attempt(url, link, attempt, self._rules.timeout_s)
            pause_s = max(wait_s, _BACKOFF_S * 2 ** (attempt - 1) * (0.5 + random.random()))
            if not outcome.transient or attempt == self._rules.attempts or pause_s > patience_s:
                return outcome
            patience_s -= pause_s
            await asyncio.sleep(pause_s)

    async def _attempt(self, url: str, link: Link, attempt: int, timeout_s: float) -> tuple[Outcome, float]:
        """Return (outcome, seconds to wait before the next attempt as requested by the server)."""
        try:
            async with asyncio.timeout(timeout_s):
                data, status = await self._get(url)
            check_digests(data, link)
            # a put to S3 waits for the network, so it runs in a thread and does not block other requests
            put: Callable[[bytes], str] = self._cache.put
            digest = await asyncio.to_thread(put, data) if self._cache.root.startswith("s3://") else put(data)
            return Outcome(digest, http_status=status, attempts=attempt), 0.0
        except FetchError as error:
            return Outcome("", error.reason, error.detail, error.status, attempt, error.transient), error.wait_s
        except TimeoutError:
            return Outcome("", "fetch_timeout", f"{timeout_s:.0f} s", 0, attempt, True), 0.0
        except (aiohttp.ClientError, OSError, ValueError) as error:
            reason, transient = _reason_of(error)
            detail = str(_below(error)) if reason == "private_address" else type(error).__name__
            return Outcome("", reason, detail, 0, attempt, transient), 0.0

    async def _get(self, url: str) -> tuple[bytes, int]:
        for _ in range(MAX_REDIRECTS + 1):
            target = check_address(url)
            session, proxy = await self._way_to(target)
            async with session.get(target, allow_redirects=False, proxy=proxy, timeout=_NO_TIMEOUT) as response:
                if response.status in _REDIRECTS and "Location" in response.headers:
                    url = urljoin(url, response.headers["Location"])
                    continue
                check_answer(response, self._rules)
                return await _body(response, self._rules.max_bytes), response.status
        raise FetchError("too_many_redirects", f"more than {MAX_REDIRECTS}, the last to {url:.100}")

    async def _way_to(self, target: URL) -> tuple[aiohttp.ClientSession, URL | None]:
        """Return (session, proxy). proxy: None for a direct request, always so for targets in `allow_networks`."""
        proxy = self._proxies.get(target.scheme)
        host = target.raw_host or ""
        if proxy is None or proxy_bypass(f"{target.host_subcomponent}:{target.port}"):
            return self._direct, None
        found = await self._resolver.resolve(host, target.port or 0, socket.AF_UNSPEC)
        if all(is_named(entry["host"], self._rules) for entry in found):
            return self._direct, None
        return self._proxied, proxy


def _proxy(url: str) -> URL:
    """Parse the address of a proxy. Raises ConfigError unless it is an http or https URL."""
    try:
        proxy = URL(url if "://" in url else f"http://{url}")
    except ValueError:
        proxy = URL()
    if proxy.scheme not in ("http", "https") or not proxy.host:
        raise ConfigError(f"http_proxy or https_proxy is {url!r}; set http://HOST:PORT, or unset it")
    return proxy


async def _must_be_known(proxy: URL) -> None:
    """Raise ConfigError if the proxy's host name is invalid or unknown; temporary DNS failures are ignored."""
    try:
        await asyncio.get_running_loop().getaddrinfo(proxy.raw_host, proxy.port)
    except (OSError, UnicodeError) as error:
        if _is_unknown(error) or isinstance(error, UnicodeError):
            raise ConfigError(
                f"http_proxy or https_proxy is {proxy.with_user(None)}: its host does not resolve; set another, or "
                "unset it"
            ) from None


_NO_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=None, sock_read=None)  # asyncio.timeout covers all of it


async def _body(response: aiohttp.ClientResponse, max_bytes: int) -> bytes:
    """Read the body, decompressing it if the server compressed it although identity was requested.

    Memory is bounded by `max_bytes` plus one chunk. Raises FetchError for a larger or a damaged body.
    """
    if (response.content_length or 0) > max_bytes:
        raise FetchError("too_large", f"{response.content_length} bytes, at most {max_bytes}", status=response.status)
    packings = _packings(response)
    unpackers = [_Unpacker(packing) for packing in packings]
    body = bytearray()
    async for chunk in response.content.iter_chunked(_CHUNK):
        try:
            body += _unpacked(unpackers, chunk, max_bytes + 1 - len(body))
        except zlib.error as error:
            why = f"not {', '.join(packings)}: {error}"
            raise FetchError("fetch_encoding", why, status=response.status) from None
        if len(body) > max_bytes or any(unpacker.is_full for unpacker in unpackers):
            raise FetchError("too_large", f"more than {max_bytes} bytes", status=response.status)
    if not all(unpacker.is_whole for unpacker in unpackers):  # truncated at the sender: a retry may succeed
        why = f"{', '.join(packings)} that is truncated"
        raise FetchError("fetch_encoding", why, status=response.status, transient=True)
    return bytes(body)


def _packings(response: aiohttp.ClientResponse) -> list[str]:
    """Return the content encodings (gzip, x-gzip, deflate), outermost first. Raises FetchError for any other."""
    found = packings(response.headers)
    if unknown := set(found) - {"gzip", "x-gzip", "deflate"}:
        raise FetchError("unknown_encoding", min(unknown), status=response.status)
    return found


def _unpacked(unpackers: "list[_Unpacker]", data: bytes, at_most: int) -> bytes:
    for unpacker in unpackers:
        data = unpacker.unpack(data, at_most) if data else data
    return data


class _Unpacker:
    """Incremental decompressor for one Content-Encoding.

    Some servers send x-gzip to describe how a file is stored, although the body is plain: it is then passed through.
    """

    def __init__(self, packing: str) -> None:
        self._packing = packing
        self._stream: Any = None
        self._is_plain = False

    def unpack(self, piece: bytes, at_most: int) -> bytes:
        """Decompress the next piece, up to `at_most` bytes. Raises zlib.error if it is not in this encoding."""
        if self._stream is None and not self._is_plain:
            self._begin(piece)
        if self._is_plain:
            return piece
        unpacked: bytes = self._stream.decompress(piece, at_most)
        if self._stream.unused_data:
            raise zlib.error("bytes after its end")
        return unpacked

    def _begin(self, piece: bytes) -> None:
        self._is_plain = self._packing == "x-gzip" and not GZIP_MAGIC.startswith(piece[:2])
        # deflate means the zlib format, whose first byte ends in hex 8; in raw deflate, which some send, it never does
        bare = piece[0] & 15 != 8
        wbits = -zlib.MAX_WBITS if bare else zlib.MAX_WBITS
        self._stream = zlib.decompressobj(wbits if self._packing == "deflate" else _GZIP)

    @property
    def is_full(self) -> bool:
        """True if the last piece decompressed to more than `at_most` bytes."""
        return self._stream is not None and bool(self._stream.unconsumed_tail)

    @property
    def is_whole(self) -> bool:
        """True if the compressed stream is complete."""
        return self._is_plain or (self._stream is not None and self._stream.eof)


# ------------------------------------------------------------------------------------------------ checks


def check_address(url: str) -> URL:
    """Parse a URL as it will be requested. Raises FetchError unless it is http(s)."""
    try:
        parsed = URL(url)
    except ValueError as error:
        raise FetchError("wrong_url", f"{error!s:.200}: {url:.100}") from None
    if parsed.scheme not in ("http", "https") or not parsed.raw_host:
        raise FetchError("wrong_url", f"only http and https are fetched: {url:.100}")
    return parsed


def is_allowed(address: str, rules: FetchRules) -> bool:
    """Return whether requests to this IP address are allowed. Raises ValueError if it is not an IP address."""
    return is_public(address, rules.allow_networks)


def is_named(address: str, rules: FetchRules) -> bool:
    """Return whether this IP address is in one of `allow_networks`. Raises ValueError if it is not an IP address."""
    return is_within(address, rules.allow_networks)


class _GuardedSocket(socket.socket):
    """A socket that refuses to connect to private networks; it checks the very address it connects to."""

    def __init__(self, rules: FetchRules, family: int, kind: int, protocol: int) -> None:
        super().__init__(family, kind, protocol)
        self._rules = rules

    def connect(self, address: Any) -> None:
        """Connect. Raises PrivateAddress for a forbidden address, and for one that is not numeric."""
        refuse_private([address[0]], "the peer", self._rules)
        super().connect(address)


def refuse_private(addresses: list[str], host: str, rules: FetchRules) -> None:
    """Raise PrivateAddress if any of a host's addresses is forbidden or is not an IP address."""
    with contextlib.suppress(ValueError):
        if all(is_allowed(address, rules) for address in addresses):
            return
    raise PrivateAddress(f"{host} is on a private network; add it to fetch.allow_networks to permit it")


def check_answer(response: aiohttp.ClientResponse, rules: FetchRules) -> None:
    """Raise FetchError for any status but 200, and if the owner opts out by X-Robots-Tag."""
    status = response.status
    if status in _BUSY or status >= 500:
        raise FetchError(f"http_{status}", "", status, True, retry_after_s(response.headers))
    if status != 200:
        raise FetchError(f"http_{status}", status=status)
    for value in response.headers.getall("X-Robots-Tag", []):
        for directive in opt_outs(value):
            if directive in rules.opt_out:
                raise FetchError("opted_out", f"X-Robots-Tag: {value:.80}", status=status)


def opt_outs(value: str) -> list[str]:
    """Return the directives of an X-Robots-Tag value that apply here: those for no agent, all agents or ours."""
    agent, colon, rest = value.partition(":")
    named = colon and not agent.strip().lower().startswith(("unavailable_after", "max-"))
    if named and agent.strip().lower() not in (USER_AGENT, "*"):
        return []
    return [directive.strip().lower() for directive in (rest if named else value).split(",")]


def check_digests(data: bytes, link: Link) -> None:
    """Raise FetchError if the bytes do not match the digest in the source's sha256 or md5 column."""
    for name, wanted in (("sha256", link.sha256), ("md5", link.md5)):
        if wanted and (found := hashlib.new(name, data, usedforsecurity=False).hexdigest()) != wanted.strip().lower():
            raise FetchError(f"wrong_{name}", f"received {found[:16]}, expected {wanted[:16]}", status=200)


def _reason_of(error: Exception) -> tuple[str, bool]:
    """Return (reason, transient) for an error of aiohttp or the operating system."""
    below = _below(error)
    if isinstance(below, PrivateAddress):
        return "private_address", False
    if isinstance(below, socket.gaierror) or isinstance(error, aiohttp.ClientConnectorDNSError):
        return ("unknown_host", False) if _is_unknown(below) else ("fetch_dns", True)
    if isinstance(error, aiohttp.ClientSSLError | ssl.SSLError):
        return "tls_error", False
    if isinstance(error, aiohttp.InvalidURL | ValueError):
        return "wrong_url", False
    if isinstance(error, aiohttp.ClientPayloadError):
        return "fetch_cut_short", True
    return "fetch_connection", True


def _below(error: Exception) -> Exception:
    """Return the underlying error of the operating system or the guard if aiohttp wrapped it."""
    return error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error


def _is_unknown(error: Exception) -> bool:
    return isinstance(error, socket.gaierror) and error.errno in (socket.EAI_NONAME, socket.EAI_NODATA)


def _host(url: str) -> str:
    """Return HOST:PORT, the unit of the `per_host` limit; empty for an invalid URL."""
    with contextlib.suppress(FetchError):
        parsed = check_address(url)
        return f"{parsed.raw_host}:{parsed.port}"
    return ""


# --------------------------------------------------------------------------------------------------- DNS


class GuardedResolver(AbstractResolver):
    """DNS resolver that refuses private networks and caches each answer for DNS_TTL_S.

    Refused and unknown names are cached too; temporary failures are not.
    """

    def __init__(self, rules: FetchRules, lookup: Callable[..., Awaitable[list[ResolveResult]]] | None = None) -> None:
        self._rules = rules
        self._lookup = lookup or aiohttp.ThreadedResolver().resolve
        self._known: dict[tuple[str, int], tuple[float, asyncio.Task[list[ResolveResult]]]] = {}

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        asked, task = self._known.get((host, port), (0.0, None))
        if task is None or time.monotonic() - asked > DNS_TTL_S:
            task = asyncio.ensure_future(self._ask(host, port, family))
            self._known[host, port] = time.monotonic(), task
        try:
            return await asyncio.shield(task)
        except OSError as error:
            if not (isinstance(error, PrivateAddress) or _is_unknown(error)):
                self._known.pop((host, port), None)  # temporary DNS failures are not cached
            raise

    async def close(self) -> None:
        for _, task in self._known.values():
            task.cancel()
        await asyncio.gather(*(task for _, task in self._known.values()), return_exceptions=True)

    async def _ask(self, host: str, port: int, family: socket.AddressFamily) -> list[ResolveResult]:
        found = await self._lookup(host, port, family)
        refuse_private([entry["host"] for entry in found], host, self._rules)
        return found
