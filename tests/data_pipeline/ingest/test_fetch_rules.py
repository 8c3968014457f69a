"""The rules of fetching one by one: which addresses may be dialled, what an answer means, how long to wait."""

import asyncio
import contextlib
import dataclasses
import hashlib
import ipaddress
import random
import socket
import ssl
import zlib
from typing import Any

import aiohttp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from multidict import CIMultiDict
from yarl import URL

from data_pipeline.addresses import is_public, number_of
from data_pipeline.config import FetchRules
from data_pipeline.errors import ConfigError
from data_pipeline.ingest import fetch as module
from data_pipeline.ingest.cache import RawCache
from data_pipeline.ingest.fetch import (
    Fetcher,
    FetchError,
    GuardedResolver,
    Outcome,
    PrivateAddress,
    check_address,
    check_digests,
    fetch_all,
    is_allowed,
    is_named,
    opt_outs,
    refuse_private,
)
from data_pipeline.schema import Link
from tests.data_pipeline.web import Web

# -------------------------------------------------------------------------------------------- which addresses

NOT_PUBLIC = [
    "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
    "192.0.2.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/3",
]  # fmt: skip
"""IANA's special-purpose registry of IPv4, and what lies behind multicast."""
NOT_PUBLIC_6 = [
    "::/96", "64:ff9b:1::/48", "100::/64", "2001:10::/28", "2001:2::/48", "2001:db8::/32", "3fff::/20", "5f00::/16",
    "fc00::/7", "fe80::/10", "fec0::/10", "ff00::/8", "4000::/2", "8000::/1", "1fff::/16",
]  # fmt: skip
RANGES = [(int(net[0]), int(net[-1])) for net in map(ipaddress.IPv4Network, NOT_PUBLIC)]
EDGES = sorted({number for low, high in RANGES for number in (low - 1, low, high, high + 1) if 0 <= number < 2**32})


def spellings(number: int) -> list[str]:
    """An IPv4 address as itself and in each of IPv6's forms for it."""
    text = ipaddress.IPv4Address(number)
    forms = [str(text), f"::ffff:{text}", f"::ffff:{text}%eth0", f"::ffff:0:{text}", f"64:ff9b::{text}"]
    forms += [str(ipaddress.IPv6Address(0x2002 << 112 | number << 80 | 1))]
    forms += [str(ipaddress.IPv6Address(0x2001 << 112 | 0x08080808 << 64 | number ^ 0xFFFFFFFF))]  # Teredo's client
    return forms + ([f"::{text}"] if number > 1 else [])


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(EDGES) | st.integers(0, 2**32 - 1))
def test_ipv4_is_dialled_where_no_registry_reserves_it_in_each_of_its_forms(number: int) -> None:
    public = not any(low <= number <= high for low, high in RANGES)
    assert {text: is_allowed(text, FetchRules()) for text in spellings(number)} == dict.fromkeys(
        spellings(number), public
    )


@pytest.mark.parametrize("number", EDGES)
def test_the_first_and_the_last_address_of_each_reserved_network_and_their_neighbours(number: int) -> None:
    public = not any(low <= number <= high for low, high in RANGES)
    assert {text for text in spellings(number) if is_allowed(text, FetchRules()) != public} == set()


@pytest.mark.parametrize("network", NOT_PUBLIC_6)
def test_reserved_networks_of_ipv6_are_not_dialled(network: str) -> None:
    net = ipaddress.IPv6Network(network, strict=False)
    assert not is_allowed(str(net[0]), FetchRules())
    assert network == "::/96" or not is_allowed(str(net[-1]), FetchRules())


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("2000::", True), ("1fff:ffff::1", False), ("3ffe::1", True), ("3fff:1000::", True), ("4000::", False),
        ("2606:4700::1111%eth0", True), ("fe80::1", False), ("::8.8.8.8", True), ("::1:8.8.8.8", False),
        ("64:ff9b::8.8.8.8", True), ("64:ff9b::1:808:808", False), ("::fffe:8.8.8.8", False),
    ],
)  # fmt: skip
def test_of_ipv6_what_is_given_out_is_dialled(address: str, public: bool) -> None:
    assert is_allowed(address, FetchRules()) == public


def test_of_teredo_the_client_counts_not_the_server() -> None:
    def teredo(server: str, client: str) -> str:
        low = int(ipaddress.IPv4Address(client)) ^ 0xFFFFFFFF
        return str(ipaddress.IPv6Address(0x2001 << 112 | int(ipaddress.IPv4Address(server)) << 64 | low))

    assert is_allowed(teredo("10.0.0.1", "8.8.8.8"), FetchRules())
    assert not is_allowed(teredo("8.8.8.8", "10.0.0.1"), FetchRules())


@pytest.mark.parametrize(
    ("networks", "named", "others"),
    [
        (
            ("10.1.0.0/16",),
            ["10.1.0.0", "10.1.255.255", "::ffff:10.1.2.3", "2002:a01:1::"],
            ["10.0.255.255", "10.2.0.0"],
        ),
        (("::1/128",), ["::1", "::1%lo"], ["::", "::2", "0.0.0.1", "127.0.0.1"]),
        (("::/128",), ["::"], ["::1", "0.0.0.0"]),
        (("0.0.0.1/32", "0.0.0.0/32"), ["0.0.0.1", "0.0.0.0"], ["::1", "::"]),
        (("fd00::/8", "192.168.0.0/24"), ["fd00::1", "192.168.0.9", "fdff::%en0"], ["fc00::1", "192.168.1.0"]),
        (("224.0.0.0/4", "192.0.0.0/24"), ["224.0.0.1", "192.0.0.192"], ["10.0.0.1"]),
        (("0.0.0.0/0",), ["10.0.0.1", "127.0.0.1"], ["fd00::1", "::1"]),
        ((), [], ["10.0.0.1", "::1", "fe80::1"]),
    ],
)
def test_private_networks_that_are_named_are_dialled_and_no_others(
    networks: tuple[str, ...], named: list[str], others: list[str]
) -> None:
    rules = FetchRules.model_validate({"allow_networks": networks})
    assert [address for address in named if not (is_named(address, rules) and is_allowed(address, rules))] == []
    assert [address for address in others if is_named(address, rules) or is_allowed(address, rules)] == []
    assert not is_named("8.8.8.8", FetchRules()) and is_allowed("8.8.8.8", rules)


@pytest.mark.parametrize(
    "address", ["localhost", "", "127.1", "1.2.3", "8.8.8.8.", "%eth0", "[::1]", "08.8.8.8", "a::g"]
)
def test_what_is_no_ip_address_is_none_and_is_refused(address: str) -> None:
    for judge in (is_allowed, is_named):
        with pytest.raises(ValueError, match="IPv4 or IPv6"):
            judge(address, FetchRules())
    with pytest.raises(PrivateAddress, match="^the host is on a private network; add it to fetch.allow_networks"):
        refuse_private(["8.8.8.8", address], "the host", FetchRules())


@pytest.mark.parametrize(
    ("addresses", "refused"),
    [
        (["8.8.8.8"], False), (["8.8.8.8", "10.0.0.1"], True), (["10.0.0.1", "8.8.8.8"], True), (["::1"], True),
        (["8.8.8.8", "2606:4700::1111"], False), ([], False),
    ],
)  # fmt: skip
def test_a_host_is_refused_for_one_private_address_among_others(addresses: list[str], refused: bool) -> None:
    expected = pytest.raises(PrivateAddress) if refused else contextlib.nullcontext()
    with expected:
        refuse_private(addresses, "h", FetchRules())


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "10.1.2.3", "0.0.0.0", "", "127.1"])
def test_a_guarded_socket_connects_to_no_private_peer(host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with module._GuardedSocket(FetchRules(), socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as guarded:
            with pytest.raises(PrivateAddress, match="^the peer is on"):
                guarded.connect((host, port))
            with pytest.raises(OSError, match="not connected"):
                guarded.getpeername()
        rules = FetchRules.model_validate({"allow_networks": ["127.0.0.1/32"]})
        with module._GuardedSocket(rules, socket.AF_INET, socket.SOCK_STREAM, 0) as guarded:
            guarded.connect(("127.0.0.1", port))
            assert guarded.getpeername() == ("127.0.0.1", port)
            assert (guarded.family, guarded.type) == (socket.AF_INET, socket.SOCK_STREAM)


@pytest.mark.parametrize(
    ("url", "asked"),
    [
        ("http://a.example/x", "http://a.example/x"), ("HTTPS://A.Example:8443/x", "https://a.example:8443/x"),
        ("https://a.example", "https://a.example/"),
    ],
)  # fmt: skip
def test_an_address_of_http_is_asked(url: str, asked: str) -> None:
    assert check_address(url) == URL(asked)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://a/" + "x" * 200, "wrong_url: only http and https are fetched: ftp://a/" + "x" * 92),
        ("httpx://a/", "wrong_url: only http and https are fetched: httpx://a/"),
        ("http:///x", "wrong_url: "),
        ("ws://a/", "wrong_url: only http"),
        ("//a/x", "wrong_url: only http"),
        ("http://a:99999/", "wrong_url: "),
    ],
)
def test_another_address_is_refused_with_its_beginning(url: str, message: str) -> None:
    with pytest.raises(FetchError) as caught:
        check_address(url)
    assert str(caught.value).startswith(message) and len(str(caught.value)) < 330
    assert (caught.value.status, caught.value.transient, caught.value.wait_s) == (0, False, 0.0)


def test_a_host_is_counted_with_its_port() -> None:
    assert module._host("http://A.example/x?y") == module._host("http://a.example:80/z") == "a.example:80"
    assert module._host("https://a.example/") == "a.example:443" and module._host("http://[::1]:81/") == "::1:81"
    assert module._host("ftp://a.example/") == module._host("http://[") == ""


# ------------------------------------------------------------------------------------------------ answers


@pytest.fixture
def web(tmp_path, make_png):
    (tmp_path / "files").mkdir()
    (tmp_path / "files/a.png").write_bytes(make_png())
    (tmp_path / "files/large").write_bytes(random.Random(0).randbytes(200_000))
    (tmp_path / "files/even").write_bytes(b"0123456789" * 20_000)
    with Web(tmp_path / "files") as server:
        yield server


@pytest.fixture
def fetch(web, tmp_path):
    """fetch(*paths, **rules) -> outcomes."""

    def call(*paths: str, **rules: Any) -> list[Outcome]:
        chosen = FetchRules(**{"allow_networks": ("127.0.0.0/8",), "timeout_s": 20, "attempts": 1, **rules})
        links = [Link("k", web.address + path if path.startswith("/") else path, ("c",)) for path in paths]
        return fetch_all(links, chosen, RawCache(str(tmp_path / "cache")))

    return call


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_to_a_relative_address_is_followed_without_cookies(fetch, web, make_png, status) -> None:
    (outcome,) = fetch(f"/moved/{status}/a.png")
    assert (outcome.sha256, outcome.http_status) == (hashlib.sha256(make_png()).hexdigest(), 200)
    headers = web.headers["/file/a.png"]
    assert (headers["User-Agent"], headers["Accept-Encoding"]) == ("tessera", "identity")
    assert headers["Accept"] == "image/*,*/*;q=0.5" and "Cookie" not in headers


STATUSES = [
    *((status, True) for status in (408, 425, 429, 500, 502, 503, 504, 599)),
    *((status, False) for status in (201, 206, 300, 302, 305, 308, 400, 404, 407, 409, 424, 426, 428, 430, 451, 499)),
]


def test_busy_and_broken_servers_are_transient_and_other_statuses_are_not(fetch) -> None:
    outcomes = fetch(*(f"/status/{status}/x" for status, _ in STATUSES), "/moved/300/a.png", "/moved/305/a.png")
    found = [(o.reason, o.detail, o.http_status, o.transient, o.sha256, o.attempts) for o in outcomes]
    expected = [(f"http_{status}", "", status, transient, "", 1) for status, transient in STATUSES]
    assert found == [*expected, ("http_300", "", 300, False, "", 1), ("http_305", "", 305, False, "", 1)]


def test_five_redirects_are_followed_and_a_sixth_is_not(fetch, web) -> None:
    fifth, sixth = fetch("/redirect/5/a.png", "/redirect/6/a.png")
    assert fifth.sha256 and web.asked["/file/a.png"] == 1
    assert (sixth.reason, sixth.http_status) == ("too_many_redirects", 0)
    assert sixth.detail == f"more than 5, the last to {web.address}/file/a.png"


@pytest.mark.parametrize(
    ("way", "name"),
    [
        ("file", "a.png"), ("file", "large"), ("open/plain", "a.png"), ("open/plain", "large"), ("open/gzip", "large"),
        ("open/gzip", "even"), ("packed", "even"), ("deflate", "even"), ("said/gzip, gzip/gzip+gzip", "even"),
    ],
)  # fmt: skip
def test_a_body_of_the_largest_size_is_fetched_and_one_byte_more_is_not(fetch, web, way, name) -> None:
    data = (web.folder / name).read_bytes()
    (fits,) = fetch(f"/{way}/{name}", max_bytes=len(data))
    assert (fits.sha256, fits.reason) == (hashlib.sha256(data).hexdigest(), "")
    (larger,) = fetch(f"/{way}/{name}", max_bytes=len(data) - 1)
    assert (larger.reason, larger.http_status, larger.transient) == ("too_large", 200, False)
    told = f"{len(data)} bytes, at most {len(data) - 1}" if way == "file" else f"more than {len(data) - 1} bytes"
    assert larger.detail == told


@pytest.mark.parametrize(
    ("path", "detail"),
    [
        ("/badly-packed/plain/a.png", "not gzip: "), ("/badly-packed/more/a.png", "not gzip: bytes after its end"),
        ("/badly-packed/cut/a.png", "gzip that is truncated"),
        ("/said/gzip, deflate/gzip/a.png", "not deflate, gzip: "),
        ("/said/gzip, br, zstd/plain/a.png", "br"), ("/to?http://10.1.2.3/x", "the peer is on a private network"),
        ("/robots/all, NoAI/a.png", "X-Robots-Tag: all, NoAI"), ("/cut/a.png", "ClientPayloadError"),
    ],
)  # fmt: skip
def test_an_outcome_says_what_was_wrong(fetch, path, detail) -> None:
    (outcome,) = fetch(path)
    assert outcome.detail.startswith(detail) and not outcome.sha256


@pytest.mark.slow
def test_an_attempt_ends_after_its_time(fetch) -> None:
    (outcome,) = fetch("/stall/x", timeout_s=0.6)
    assert (outcome.reason, outcome.detail, outcome.transient) == ("fetch_timeout", "1 s", True)


def test_opt_outs_are_those_that_are_asked_for(fetch) -> None:
    paths = ("/robots/nosnippet/a.png", "/robots/noai/a.png", "/robots/nosnippet, none/a.png")
    assert [o.reason for o in fetch(*paths, opt_out=("none", "nosnippet"))] == ["opted_out", "", "opted_out"]
    assert [o.reason for o in fetch(*paths, opt_out=())] == ["", "", ""]


@pytest.mark.parametrize(
    ("value", "meant"),
    [
        (" NoAI ,noindex", ["noai", "noindex"]), ("", [""]), ("tessera : noai", ["noai"]),
        ("TESSERA:noai,x", ["noai", "x"]),
        (" * : noai", ["noai"]), ("max-snippet: 5, noai", ["max-snippet: 5", "noai"]), ("tesseract: noai", []),
        ("Max-Image-Preview:large,noai", ["max-image-preview:large", "noai"]), (": noai", []),
        ("tessera: unavailable_after: noai", ["unavailable_after: noai"]), ("maximum: noai", []), ("other:*", []),
    ],
)  # fmt: skip
def test_directives_without_a_name_or_with_ours_are_for_us(value: str, meant: list[str]) -> None:
    assert opt_outs(value) == meant


def test_every_header_of_directives_is_looked_at() -> None:
    headers = [("X-Robots-Tag", "other: noai"), ("X-Robots-Tag", "all"), ("x-robots-tag", "tessera: noai")]

    class Response:
        status = 200

        def __init__(self, headers: list[tuple[str, str]]) -> None:
            self.headers = CIMultiDict(headers)

    answer: Any = Response(headers)
    with pytest.raises(FetchError, match="^opted_out: X-Robots-Tag: tessera: noai$"):
        module.check_answer(answer, FetchRules())
    answer = Response(headers[:2])
    module.check_answer(answer, FetchRules())
    answer.status, answer.headers["Retry-After"] = 503, "7"
    with pytest.raises(FetchError) as caught:
        module.check_answer(answer, FetchRules())
    assert (caught.value.reason, caught.value.transient, caught.value.wait_s) == ("http_503", True, 7.0)


def test_a_digest_may_be_in_capitals_and_have_blanks_around_it() -> None:
    sha, md5 = hashlib.sha256(b"data").hexdigest(), hashlib.md5(b"data", usedforsecurity=False).hexdigest()
    for right in ((sha, md5), ("", ""), (f" {sha.upper()}\n", ""), ("", f"\t{md5.upper()} "), (sha, "")):
        check_digests(b"data", Link("k", "u", (), {}, sha256=right[0], md5=right[1]))
    for name, wrong in (("sha256", (sha[:-1] + "g", md5)), ("md5", (sha, md5[::-1])), ("sha256", (md5, sha))):
        with pytest.raises(FetchError) as caught:
            check_digests(b"data", Link("k", "u", (), {}, sha256=wrong[0], md5=wrong[1]))
        came, wanted = (sha, wrong[0]) if name == "sha256" else (md5, wrong[1])
        assert str(caught.value) == f"wrong_{name}: received {came[:16]}, expected {wanted[:16]}"
        assert (caught.value.status, caught.value.transient) == (200, False)


KEY: Any = type("Key", (), {"host": "h", "port": 1, "ssl": True, "is_ssl": True})()
DNS = aiohttp.ClientConnectorDNSError
REASONS = [
    (PrivateAddress("x"), "private_address", False),
    (aiohttp.ClientConnectorError(KEY, PrivateAddress("x")), "private_address", False),
    (DNS(KEY, PrivateAddress("x")), "private_address", False),
    (socket.gaierror(socket.EAI_NONAME, "x"), "unknown_host", False),
    (socket.gaierror(socket.EAI_NODATA, "x"), "unknown_host", False),
    (socket.gaierror(socket.EAI_AGAIN, "x"), "fetch_dns", True),
    (DNS(KEY, socket.gaierror(socket.EAI_NONAME, "x")), "unknown_host", False),
    (DNS(KEY, socket.gaierror(socket.EAI_FAIL, "x")), "fetch_dns", True),
    (DNS(KEY, OSError(socket.EAI_NONAME, "x")), "fetch_dns", True),
    (ssl.SSLError("x"), "tls_error", False),
    (ssl.SSLCertVerificationError("x"), "tls_error", False),
    (aiohttp.ClientConnectorCertificateError(KEY, ssl.SSLCertVerificationError("x")), "tls_error", False),
    (aiohttp.ClientConnectorSSLError(KEY, ssl.SSLError("x")), "tls_error", False),
    (aiohttp.InvalidURL("x"), "wrong_url", False),
    (UnicodeError("x"), "wrong_url", False),
    (aiohttp.ClientPayloadError("x"), "fetch_cut_short", True),
    (aiohttp.ServerDisconnectedError("x"), "fetch_connection", True),
    (aiohttp.ClientConnectorError(KEY, ConnectionRefusedError("x")), "fetch_connection", True),
    (ConnectionResetError("x"), "fetch_connection", True),
]


@pytest.mark.parametrize(("error", "reason", "transient"), REASONS, ids=lambda value: str(value)[:30])
def test_each_error_has_its_reason(error: Exception, reason: str, transient: bool) -> None:
    assert module._reason_of(error) == (reason, transient)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(
    st.binary(max_size=2000), st.sampled_from(["gzip", "x-gzip", "deflate", "bare"]),
    st.lists(st.integers(1, 60), min_size=1, max_size=9), st.integers(1, 300),
)  # fmt: skip
def test_a_body_is_unpacked_alike_in_whatever_pieces_it_comes(data, packing, sizes, at_most) -> None:
    wbits = {"deflate": 15, "bare": -15}.get(packing, 31)
    packed = zlib.compress(data, wbits=wbits)
    unpacker, found, at = module._Unpacker("deflate" if packing == "bare" else packing), b"", 0
    for number in range(len(packed)):
        if at >= len(packed):
            break
        piece = packed[at : at + sizes[number % len(sizes)]]
        at += len(piece)
        assert not unpacker.is_whole
        part = unpacker.unpack(piece, at_most)
        assert len(part) <= at_most
        found += part
        if len(part) == at_most:  # how much more zlib holds back cannot be seen; the caller stops here
            return
        assert not unpacker.is_full and found == zlib.decompressobj(wbits).decompress(packed[:at])
    assert found == data and unpacker.is_whole


@pytest.mark.parametrize("data", [b"\x1e", b"\x89PNG", b"\x1f\x8a", b"\x1e\x8b\x08", b"\x8b"])
def test_what_is_said_to_be_stored_as_gzip_and_is_not_is_left_alone(data: bytes) -> None:
    unpacker = module._Unpacker("x-gzip")
    assert unpacker.unpack(data, 1) + unpacker.unpack(b"\x1f\x8b", 1) == data + b"\x1f\x8b"
    assert unpacker.is_whole and not unpacker.is_full
    with pytest.raises(zlib.error):
        module._Unpacker("gzip").unpack(data + bytes(9), 100)


# --------------------------------------------------------------------------------------- waiting and trying


@pytest.fixture
def pauses(monkeypatch) -> list[float]:
    """The pauses that were made, none of which takes any time; the random part of each is 0.25."""
    made: list[float] = []
    original = asyncio.sleep

    async def sleep(seconds: float) -> None:
        made.append(seconds)
        await original(0)

    monkeypatch.setattr(module.asyncio, "sleep", sleep)
    monkeypatch.setattr(module.random, "random", lambda: 0.25)
    return made


class Failing(Fetcher):
    """A fetcher whose attempts end at once, as given."""

    def __init__(self, rules: FetchRules, *results: tuple[bool, float]) -> None:
        unused: Any = None
        super().__init__(rules, unused)
        self.results, self.attempts = list(results), []

    async def _attempt(self, url: str, link: Link, attempt: int, timeout_s: float) -> tuple[Outcome, float]:
        self.attempts.append((url, attempt, timeout_s))
        transient, wait_s = self.results[min(attempt, len(self.results)) - 1]
        return Outcome(reason="r", attempts=attempt, transient=transient), wait_s


@pytest.mark.parametrize(
    ("results", "rules", "expected"),
    [
        ([(True, 0.0)], {"attempts": 1}, []),
        ([(True, 0.0)], {"attempts": 4}, [0.375, 0.75, 1.5]),
        ([(True, 0.0), (False, 0.0)], {"attempts": 4}, [0.375]),
        ([(False, 0.0)], {"attempts": 4}, []),
        ([(True, 2.0), (True, 0.5)], {"attempts": 3}, [2.0, 0.75]),
        ([(True, 30.0), (False, 0.0)], {"attempts": 3}, [30.0]),  # exactly attempts * timeout_s
        ([(True, 30.5)], {"attempts": 3}, []),
        ([(True, 20.0), (True, 10.0), (True, 0.0)], {"attempts": 3}, [20.0, 10.0]),
        ([(True, 20.0), (True, 10.5), (True, 0.0)], {"attempts": 3}, [20.0]),
    ],
)
def test_pauses_double_follow_the_server_and_end_with_the_patience(pauses, results, rules, expected) -> None:
    fetcher = Failing(FetchRules(timeout_s=10, **rules), *results)
    outcome = asyncio.run(fetcher.fetch(Link("k", "http://a/?x=1&amp;y=2", ())))
    assert pauses == expected and outcome.attempts == len(expected) + 1
    assert fetcher.attempts == [("http://a/?x=1&y=2", number + 1, 10) for number in range(len(expected) + 1)]


@pytest.mark.parametrize(
    ("error", "pause_s"),
    [
        (OSError("x"), 0.375), (TimeoutError(), 0.375), (aiohttp.ClientPayloadError("x"), 0.375),
        (FetchError("r", transient=True), 0.375), (FetchError("r", transient=True, wait_s=3.5), 3.5),
        (FetchError("r", wait_s=3.5), None), (ValueError("x"), None), (PrivateAddress("x"), None),
    ],
)  # fmt: skip
def test_what_may_be_different_next_time_is_tried_again_after_its_pause(monkeypatch, pauses, error, pause_s) -> None:
    async def get(url: str) -> tuple[bytes, int]:
        if asked:
            return b"data", 200
        asked.append(url)
        raise error

    asked: list[str] = []
    cache: Any = type("Cache", (), {"root": "/cache", "put": lambda self, data: "digest"})()
    fetcher = Fetcher(FetchRules(attempts=2), cache)
    monkeypatch.setattr(fetcher, "_get", get)
    outcome = asyncio.run(fetcher.fetch(Link("k", "http://a/", ())))
    assert pauses == ([pause_s] if pause_s else [])
    assert (outcome.sha256, outcome.attempts, outcome.http_status) == (("digest", 2, 200) if pause_s else ("", 1, 0))


@pytest.mark.parametrize(("root", "threaded"), [("s3://bucket/cache", True), ("/cache", False), ("s3:/cache", False)])
def test_a_put_to_s3_is_made_in_a_thread_of_its_own(monkeypatch, root, threaded) -> None:
    asked: list[bool] = []

    async def to_thread(put: Any, data: bytes) -> str:
        asked.append(True)
        return str(put(data))

    async def get(url: str) -> tuple[bytes, int]:
        return b"data", 200

    cache: Any = type("Cache", (), {"root": root, "put": lambda self, data: f"digest of {data!r}"})()
    monkeypatch.setattr(module.asyncio, "to_thread", to_thread)
    fetcher = Fetcher(FetchRules(), cache)
    monkeypatch.setattr(fetcher, "_get", get)
    outcome = asyncio.run(fetcher.fetch(Link("k", "http://a/", ())))
    assert outcome == Outcome("digest of b'data'", http_status=200, attempts=1) and bool(asked) == threaded


# --------------------------------------------------------------------------------------------- names, proxies


def entry(address: str) -> Any:
    return {"hostname": "h", "host": address, "port": 80, "family": socket.AF_INET, "proto": 0, "flags": 0}


@pytest.mark.parametrize(("passed_s", "asked"), [(0.0, 1), (300.0, 1), (300.1, 2)])
def test_a_name_is_asked_again_after_five_minutes(monkeypatch, passed_s, asked) -> None:
    now, calls = [1000.0], []

    async def lookup(*given: Any) -> list[Any]:
        calls.append(given)
        return [entry("8.8.8.8")]

    async def run() -> None:
        resolver = GuardedResolver(FetchRules(), lookup)
        assert await resolver.resolve("h", 80, socket.AF_INET6) == [entry("8.8.8.8")]
        now[0] += passed_s
        await resolver.resolve("h", 80)
        await resolver.resolve("h", 80)
        assert len(calls) == asked
        await resolver.resolve("h", 81)
        await resolver.resolve("g", 80)
        assert len(calls) == asked + 2
        await resolver.close()

    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    asyncio.run(run())
    assert calls[0] == ("h", 80, socket.AF_INET6)
    assert calls[-2:] == [("h", 81, socket.AF_INET), ("g", 80, socket.AF_INET)]


def test_requests_at_the_same_moment_share_one_look_up_and_one_that_gives_up_ends_it_for_no_other() -> None:
    async def run() -> tuple[int, list[Any]]:
        answer, begun, calls = asyncio.Event(), asyncio.Event(), 0

        async def lookup(*_: Any) -> list[Any]:
            nonlocal calls
            calls += 1
            begun.set()
            await answer.wait()
            return [entry("8.8.8.8")]

        resolver = GuardedResolver(FetchRules(), lookup)
        waiting = [asyncio.ensure_future(resolver.resolve("h", 80)) for _ in range(3)]
        await begun.wait()
        waiting[0].cancel()
        await asyncio.gather(waiting[0], return_exceptions=True)
        answer.set()
        found = await asyncio.gather(*waiting[1:])
        answer.clear()
        begun.clear()
        still = asyncio.ensure_future(resolver.resolve("other", 80))
        await begun.wait()
        await resolver.close()  # cancels what has no answer yet
        with pytest.raises(asyncio.CancelledError):
            await still
        return calls, found

    assert asyncio.run(run()) == (2, [[entry("8.8.8.8")]] * 2)


@pytest.mark.parametrize("addresses", [["10.0.0.1"], ["8.8.8.8", "10.0.0.1"]])
def test_a_name_that_leads_home_is_refused_and_remembered(addresses) -> None:
    calls: list[str] = []

    async def lookup(host: str, *_: Any) -> list[Any]:
        calls.append(host)
        return [entry(address) for address in addresses]

    async def run() -> None:
        resolver = GuardedResolver(FetchRules(), lookup)
        for _ in range(2):
            with pytest.raises(PrivateAddress, match="^h is on a private network"):
                await resolver.resolve("h", 80)
        await resolver.close()

    asyncio.run(run())
    assert calls == ["h"]


@pytest.mark.parametrize(
    ("said", "proxy"),
    [
        ("http://p.example:3128", "http://p.example:3128"), ("p.example:3128", "http://p.example:3128"),
        ("https://u:p@p.example", "https://u:p@p.example"), ("p.example", "http://p.example"),
    ],
)  # fmt: skip
def test_a_proxy_may_be_named_without_its_scheme(said: str, proxy: str) -> None:
    assert module._proxy(said) == URL(proxy)


@pytest.mark.parametrize("said", ["socks5://p:1080", "http://", "ftp://p", "http://[::1", "", "://", "http://p:99999"])
def test_a_proxy_of_another_kind_is_refused(said: str) -> None:
    with pytest.raises(ConfigError, match="^http_proxy or https_proxy is .*; set http://HOST:PORT, or unset it$"):
        module._proxy(said)


@pytest.mark.parametrize(
    ("error", "refused"),
    [
        (socket.gaierror(socket.EAI_NONAME, "x"), True), (socket.gaierror(socket.EAI_NODATA, "x"), True),
        (UnicodeError("x"), True), (socket.gaierror(socket.EAI_AGAIN, "x"), False), (OSError("x"), False),
    ],
)  # fmt: skip
def test_a_proxy_that_no_name_server_knows_is_refused_without_its_password(monkeypatch, error, refused) -> None:
    async def run() -> None:
        async def getaddrinfo(host: str, port: int) -> list[Any]:
            asked.append((host, port))
            raise error

        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo, raising=False)
        await module._must_be_known(URL("http://me:secret@p.example:3128"))

    asked: list[tuple[str, int]] = []
    if refused:
        with pytest.raises(
            ConfigError, match="^http_proxy or https_proxy is http://p.example:3128: its host does not resolve"
        ):
            asyncio.run(run())
    else:
        asyncio.run(run())
    assert asked == [("p.example", 3128)]


@pytest.mark.parametrize(
    ("url", "no_proxy", "address", "proxied"),
    [
        ("http://a.example/x", "", "8.8.8.8", "http://127.0.0.1:1"),
        ("https://a.example/x", "", "8.8.8.8", "http://127.0.0.1:2"),
        ("http://a.example/x", "", "10.1.2.3", None),  # in a network that is named
        ("http://a.example/x", "a.example", "8.8.8.8", None),
        ("http://a.example/x", "a.example:80", "8.8.8.8", None),
        ("http://a.example/x", "a.example:81", "8.8.8.8", "http://127.0.0.1:1"),
        ("http://[2606:4700::1]/x", "b.example", "2606:4700::1", "http://127.0.0.1:1"),
    ],
)
def test_a_target_is_asked_by_the_proxy_of_its_scheme(monkeypatch, url, no_proxy, address, proxied) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("https_proxy", "127.0.0.1:2")
    monkeypatch.setenv("ftp_proxy", "socks5://no-such-host.invalid")  # of no account
    monkeypatch.setenv("no_proxy", no_proxy)

    async def run() -> URL | None:
        async with Fetcher(
            FetchRules.model_validate({"allow_networks": ["10.1.0.0/16"]}), RawCache("/nowhere")
        ) as fetcher:

            async def lookup(host: str, port: int, family: int) -> list[Any]:
                assert (host, port, family) == (URL(url).raw_host, URL(url).port, socket.AF_UNSPEC)
                return [entry(address)]

            fetcher._resolver._lookup = lookup
            session, proxy = await fetcher._way_to(URL(url))
            assert session is (fetcher._proxied if proxy else fetcher._direct)
            direct, behind_proxy = fetcher._direct.connector, fetcher._proxied.connector
            assert isinstance(direct, aiohttp.TCPConnector) and isinstance(behind_proxy, aiohttp.TCPConnector)
            assert (direct.limit, behind_proxy.limit) == (0, 0)  # the semaphores limit, which count by host too
            assert (direct.use_dns_cache, behind_proxy.use_dns_cache) == (False, True)  # the resolver remembers itself
        assert fetcher._direct.closed and fetcher._proxied.closed
        return proxy

    assert asyncio.run(run()) == (URL(proxied) if proxied else None)


def test_an_outcome_says_nothing_that_did_not_happen() -> None:
    assert Outcome() == Outcome("", "", "", 0, 1, False)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Outcome().reason = "other"  # type: ignore[misc]
    error = FetchError("r")
    assert (str(error), error.detail, error.status, error.transient, error.wait_s) == ("r: ", "", 0, False, 0.0)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(["::", "::ffff:", "::ffff:0:", "64:ff9b::"]), st.integers(2**16, 2**32 - 1))
def test_an_embedded_address_is_that_address_to_its_last_bit(prefix: str, number: int) -> None:
    inner = ipaddress.IPv4Address(number)
    assert number_of(f"{prefix}{inner}") == inner and number_of(f"{prefix}{inner}%eth0") == inner
    assert is_public(f"{prefix}{inner}", [ipaddress.ip_network(inner)])
    assert is_public(f"{prefix}{inner}") == is_public(str(inner))
