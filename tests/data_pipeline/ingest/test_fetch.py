"""Fetching from a real server that misbehaves, and refusing what must not be asked."""

import asyncio
import hashlib
import http.server
import ipaddress
import resource
import socket
import threading
import time
from urllib.parse import unquote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.config import FetchRules
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.ingest.cache import RawCache
from data_pipeline.ingest.fetch import (
    FetchError,
    GuardedResolver,
    PrivateAddress,
    check_address,
    fetch_all,
    is_allowed,
    opt_outs,
)
from data_pipeline.schema import Link
from tests.data_pipeline.web import Web

HERE = ("127.0.0.0/8",)


@pytest.fixture
def web(tmp_path, make_png):
    (tmp_path / "files").mkdir()
    (tmp_path / "files/a.png").write_bytes(make_png())
    (tmp_path / "files/empty").touch()
    with Web(tmp_path / "files") as server:
        yield server


@pytest.fixture
def fetch(web, tmp_path):
    """fetch(*paths, **rules) -> outcomes."""

    def call(*paths, links=(), **rules):
        settings = FetchRules(**{"allow_networks": HERE, "timeout_s": 20, "attempts": 2, **rules})
        wanted = [Link("k", web.address + path if path.startswith("/") else path, ("c",)) for path in paths] + list(
            links
        )
        return fetch_all(wanted, settings, RawCache(str(tmp_path / "cache")))

    return call


WAYS = [
    # path, reason, transient, http status, attempts
    ("/file/gone", "http_404", False, 404, 1),
    ("/status/403/x", "http_403", False, 403, 1),
    ("/status/204/x", "http_204", False, 204, 1),
    ("/status/500/x", "http_500", True, 500, 2),
    ("/status/503/x", "http_503", True, 503, 2),
    ("/status/429/x", "http_429", True, 429, 2),
    ("/stall/x", "fetch_timeout", True, 0, 2),
    ("/drip/x", "fetch_timeout", True, 0, 2),
    ("/cut/a.png", "fetch_cut_short", True, 0, 2),
    ("/endless/x", "too_large", False, 200, 1),
    ("/huge/x", "too_large", False, 200, 1),
    ("/packed-bomb/x", "too_large", False, 200, 1),
    ("/redirect/6/a.png", "too_many_redirects", False, 0, 1),
    ("/to?file:///etc/passwd", "wrong_url", False, 0, 1),
    ("/to?http://10.1.2.3/x", "private_address", False, 0, 1),
    ("/to?http://169.254.169.254/latest/meta-data", "private_address", False, 0, 1),
    ("/robots/noai/a.png", "opted_out", False, 200, 1),
    ("/robots/noindex, nofollow/a.png", "opted_out", False, 200, 1),
    ("/garbage/x", "fetch_connection", True, 0, 2),
    ("/closed/x", "fetch_connection", True, 0, 2),
    ("ftp://127.0.0.1/x", "wrong_url", False, 0, 1),
    ("http://", "wrong_url", False, 0, 1),
    ("http://[::1", "wrong_url", False, 0, 1),
    ("http://no-such-host.invalid/x", "unknown_host", False, 0, 1),
]


@pytest.mark.slow
def test_every_way_to_fail_has_its_reason_in_bounded_time_and_memory(fetch):
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    endless = [way[0] for way in WAYS if way[1] == "fetch_timeout"]  # no load on the machine changes how these end
    others = [way[0] for way in WAYS if way[1] != "fetch_timeout"]  # and none makes these wait for their deadline
    outcomes = fetch(*endless, max_bytes=1_000_000, timeout_s=1)
    outcomes += fetch(*others, "/file/a.png", max_bytes=1_000_000, timeout_s=50)
    assert time.monotonic() - start < 60
    found = [(o.reason, o.transient, o.http_status, o.attempts) for o in outcomes[:-1]]
    assert dict(zip([*endless, *others], found, strict=True)) == {way[0]: way[1:] for way in WAYS}
    assert outcomes[-1].sha256 and not outcomes[-1].reason
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB; the server's bomb included


@pytest.mark.slow
def test_fetched_bytes_are_kept_by_their_sha256(fetch, tmp_path, make_png):
    outcomes = fetch(
        "/file/a.png", "/packed/a.png", "/redirect/3/a.png", "/once/503/a.png", "/robots/other: noai/a.png"
    )
    digest = hashlib.sha256(make_png()).hexdigest()
    assert [outcome.sha256 for outcome in outcomes] == [digest] * 5
    assert [outcome.attempts for outcome in outcomes] == [1, 1, 1, 2, 1]
    assert RawCache(str(tmp_path / "cache")).get(digest) == make_png()


@pytest.mark.parametrize("way", ["packed", "deflate", "bare-deflate"])
def test_a_body_that_comes_packed_is_unpacked(fetch, way, make_png):
    (outcome,) = fetch(f"/{way}/a.png")
    assert (outcome.sha256, outcome.reason) == (hashlib.sha256(make_png()).hexdigest(), "")


SAID = [
    # Content-Encoding with | for /, how the body is packed
    *(
        (said, "plain")
        for said in ("utf-8", "UTF-8", "none", "binary", "image|jpeg", "aws-chunked", "identity", "", "x-gzip")
    ),
    *(
        (said, "plain")
        for said in ("utf-8, none", "aws-chunked,binary", "none,x-gzip", "8bit", "base64", "*", ",,", '"utf-8"')
    ),
    *(
        (said, "gzip")
        for said in ("gzip", "x-gzip", "X-GZIP", "GZip ", "aws-chunked, gzip", "gzip,utf-8", "utf-8,x-gzip,none")
    ),
    ("deflate, gzip", "deflate+gzip"),
    ("gzip, gzip", "gzip+gzip"),
    ("gzip, deflate, aws-chunked", "gzip+deflate"),
]


def test_words_that_name_no_packing_leave_a_body_as_it_is(fetch, make_png):
    outcomes = fetch(*(f"/said/{said}/{packing}/a.png" for said, packing in SAID))
    digest = hashlib.sha256(make_png()).hexdigest()
    found = {row: (outcome.sha256, outcome.reason) for row, outcome in zip(SAID, outcomes, strict=True)}
    assert found == dict.fromkeys(SAID, (digest, ""))


@pytest.mark.parametrize("said", ["br", "zstd", "compress", "x-compress", "gzip, br", "BR"])
def test_a_packing_that_is_not_undone_is_named(fetch, said):
    (outcome,) = fetch(f"/said/{said}/plain/a.png")
    assert (outcome.reason, outcome.transient) == ("unknown_encoding", False)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.sampled_from('abgzipx-deflt, ;="*'), max_size=20), st.sampled_from(["plain", "gzip", "deflate"]))
def test_any_words_about_a_body_end_in_its_bytes_or_a_reason(fetch, said, packing):
    (outcome,) = fetch(f"/said/{said}/{packing}/a.png")
    assert bool(outcome.sha256) != bool(outcome.reason)
    assert outcome.reason in ("", "fetch_encoding", "unknown_encoding")


@pytest.mark.slow
def test_a_wait_until_a_date_is_kept_as_one_in_seconds_is(fetch, make_png):
    digest = hashlib.sha256(make_png()).hexdigest()
    for how in ("seconds", "date"):  # an hour: longer than all attempts may take together
        (outcome,) = fetch(f"/later/{how}/a.png")
        assert (outcome.reason, outcome.attempts, outcome.transient) == ("http_503", 1, True)
    for how in ("past", "word", "wrong"):
        (outcome,) = fetch(f"/later/{how}/a.png")
        assert (outcome.sha256, outcome.attempts) == (digest, 2)


BADLY_PACKED = [
    # how, transient, attempts: what was cut off may come whole the next time
    ("plain", False, 1),
    ("plain-deflate", False, 1),
    ("cut", True, 2),
    ("cut-deflate", True, 2),
    ("wrong-sum", False, 1),
    ("more", False, 1),
    ("nothing", True, 2),
]


@pytest.mark.slow
def test_a_body_that_is_not_packed_as_its_header_says_is_a_rejection(fetch):
    outcomes = fetch(*(f"/badly-packed/{how}/a.png" for how, *_ in BADLY_PACKED), "/file/a.png")
    found = [(o.reason, o.http_status, o.transient, o.attempts) for o in outcomes]
    assert found == [("fetch_encoding", 200, *rest) for _, *rest in BADLY_PACKED] + [("", 200, False, 1)]


def test_an_empty_file_is_fetched_and_left_to_the_decoder(fetch):
    (outcome,) = fetch("/file/empty")
    assert outcome.sha256 == hashlib.sha256(b"").hexdigest()


def test_escaped_ampersands_are_understood(fetch, web):
    fetch("/file/a.png?x=1&amp;y=2")
    assert web.asked["/file/a.png?x=1&y=2"] == 1


@pytest.mark.parametrize("name", ["sha256", "md5"])
def test_bytes_are_compared_with_the_digest_of_the_source(fetch, web, make_png, name):
    right = hashlib.new(name, make_png()).hexdigest().upper()
    links = [Link("k", f"{web.address}/file/a.png", ("c",), {}, **{name: value}) for value in (right, "0" * len(right))]
    assert [outcome.reason for outcome in fetch(links=links)] == ["", f"wrong_{name}"]


def test_no_more_requests_at_once_than_allowed(web, tmp_path):
    peak, lock, three = [0, 0], threading.Lock(), threading.Event()
    handler, original = web.RequestHandlerClass, web.RequestHandlerClass.way_file

    def counted(self, name):
        with lock:
            peak[0] += 1
            peak[1] = max(peak)
            three.set() if peak[1] == 3 else None
        three.wait(20)  # that as many come as may
        time.sleep(0.02)  # and one too many, if it does
        with lock:
            peak[0] -= 1  # before the answer, on which the next request may come at once
        original(self, name)

    class Counted(handler):
        way_file = counted

    web.RequestHandlerClass = Counted
    for limits in ({"concurrency": 3, "per_host": 16}, {"concurrency": 64, "per_host": 3}):
        peak[:] = [0, 0]
        three.clear()
        links = [Link("k", f"{web.address}/file/a.png?{number}", ("c",)) for number in range(30)]
        outcomes = fetch_all(links, FetchRules(allow_networks=HERE, **limits), RawCache(str(tmp_path / "cache")))
        assert all(outcome.sha256 for outcome in outcomes) and peak[1] == 3


# --------------------------------------------------------------------------------------- what is refused

PRIVATE = [
    "::",
    "::7f00:1",
    "::ffff:0:10.0.0.1",
    "::1%lo",
    "::ffff:127.0.0.1%lo",
    "64:ff9b:1::7f00:1",
    "fec0::1",
    "ff02::1",
    "4000::1",
    "255.255.255.255",
    "192.168.1.1%eth0",
    "127.0.0.1",
    "10.0.0.1",
    "172.16.3.4",
    "192.168.1.1",
    "169.254.169.254",
    "100.64.0.1",
    "0.0.0.0",
    "224.0.0.1",
    "::1",
    "fe80::1%eth0",
    "fd00::1",
    "::ffff:127.0.0.1",
    "::ffff:10.0.0.1",
    "2002:7f00:1::",
    "64:ff9b::a00:1",
]


@pytest.mark.parametrize("address", PRIVATE)
def test_private_networks_are_refused_in_every_spelling(address):
    assert not is_allowed(address, FetchRules())


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "64:ff9b::808:808"])
def test_public_networks_are_asked(address):
    assert is_allowed(address, FetchRules())


def test_a_private_network_is_asked_where_it_is_allowed():
    rules = FetchRules(allow_networks=("10.1.0.0/16",))
    assert is_allowed("10.1.2.3", rules) and not is_allowed("10.2.0.1", rules) and not is_allowed("::1", rules)


def test_the_loopback_of_ipv6_is_asked_where_it_is_allowed():
    assert is_allowed("::1", FetchRules(allow_networks=("::1/128",)))


def embedded(number):
    """The ways in which IPv6 writes an IPv4 address."""
    text = ipaddress.IPv4Address(number)
    yield from (f"::ffff:{text}", f"::ffff:0:{text}", f"64:ff9b::{text}", f"::ffff:{text}%eth0")
    yield str(ipaddress.IPv6Address(0x2002 << 112 | number << 80))
    yield str(ipaddress.IPv6Address(0x20010000 << 96 | number ^ 0xFFFFFFFF))


@settings(max_examples=200, deadline=None)
@given(st.integers(2**16, 2**32 - 1) | st.ip_addresses(v=4).map(int).filter(lambda number: number >= 2**16))
def test_an_ipv4_address_is_judged_alike_however_ipv6_writes_it(number):
    alone = is_allowed(str(ipaddress.IPv4Address(number)), FetchRules())
    assert {is_allowed(text, FetchRules()) for text in embedded(number)} == {alone}


@settings(max_examples=200, deadline=None)
@given(st.ip_addresses(v=6) | st.ip_addresses(v=6, network="fc00::/6") | st.ip_addresses(v=6, network="2001::/20"))
def test_what_is_asked_of_ipv6_is_public(address):
    if is_allowed(str(address), FetchRules()):
        assert address.is_global and not address.is_multicast or address.ipv4_mapped or int(address) >> 32 in EMBEDDING


EMBEDDING = (0, 0xFFFF, 0xFFFF << 16, 0x64FF9B << 64)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.text(max_size=40) | st.text(max_size=30).map("http://{}".format) | st.binary(max_size=20).map(repr))
def test_any_text_is_an_address_of_a_host_or_refused_as_none(text):
    try:
        parsed = check_address(text)
    except FetchError as error:
        assert error.reason == "wrong_url" and len(str(error)) < 400
    else:
        assert parsed.scheme in ("http", "https") and parsed.raw_host


# ------------------------------------------------------------------------------------- spellings of home

WIDE = str.maketrans("0123456789.", "０１２３４５６７８９。")
CIRCLED = str.maketrans("0123456789", "⓪①②③④⑤⑥⑦⑧⑨")
NAMED = [
    *("127.1", "2130706433", "0x7f.1", "0x7f000001", "0177.0.0.1", "017700000001", "127.0.1", "0", "0.0.0.0"),
    *(
        "localhost",
        "LOCALHOST",
        "localhost.",
        "ⓛⓞⓒⓐⓛⓗⓞⓢⓣ",
        "localhost%00",
        "127.0.0.1.",
        "127.0.0.1\t",
        "a:b@127.0.0.1",
    ),
    *("%31%32%37.0.0.1", "127%2e0%2e0%2e1", "127.0.0.1".translate(WIDE), "127.0.0.1".translate(CIRCLED)),
    *("127｡0｡0｡1", "127．0．0．1", "①②⑦。⓪。⓪。①", "[::1]", "[0:0:0:0:0:0:0:1]", "[::1%25lo]", "[::1%lo]", "[::]"),
    *("[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::127.0.0.1]", "[::ffff:127.0.0.1%lo]", "[64:ff9b::127.0.0.1]"),
    *("[2002:7f00:1::]", "[::ffff:0:127.0.0.1]"),
]


@st.composite
def spelled(draw):
    """127.0.0.1 or a neighbour, each letter in one of its forms."""
    host = draw(st.sampled_from(["127.0.0.1", "127.0.0.53", "127.255.255.254"]))
    forms = ({letter, letter.translate(WIDE), letter.translate(CIRCLED), *DOTS.get(letter, "")} for letter in host)
    return "".join(draw(st.sampled_from(sorted(form))) for form in forms) + draw(st.sampled_from(["", ".", "。"]))


DOTS = {".": ".。．｡"}
REFUSED = ("private_address", "wrong_url", "unknown_host", "fetch_connection", "fetch_dns")


def test_no_spelling_of_home_is_asked(fetch, web):
    port = web.server_port
    for host in NAMED:
        (outcome,) = fetch(f"http://{host}:{port}/file/a.png", allow_networks=(), attempts=1)
        assert outcome.reason in REFUSED and not web.asked, host


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(spelled())
def test_no_letters_of_home_are_asked(fetch, web, host):
    (outcome,) = fetch(f"http://{host}:{web.server_port}/file/a.png", allow_networks=(), attempts=1)
    assert outcome.reason in ("private_address", "wrong_url") and not web.asked


ELSEWHERE = ["127.0.0.53", "127。0。0。53", "①②⑦.0.0.53", "１２７.0.0.53", "[::ffff:127.0.0.53]", "[::1]"]


@pytest.mark.parametrize("host", ELSEWHERE)
def test_a_redirect_is_judged_as_a_first_address_is(fetch, web, host):
    rules = {"allow_networks": ("127.0.0.1/32",), "attempts": 1}
    (outcome,) = fetch(f"/to?http://{host}:{web.server_port}/file/a.png", **rules)
    assert outcome.reason == "private_address" and len(web.asked) == 1


def test_the_socket_refuses_a_peer_that_the_look_up_let_through(fetch, web, monkeypatch):
    async def lying(self, host, port=0, family=socket.AF_INET):
        entry = {"hostname": host, "host": "127.0.0.1", "port": port, "family": family, "proto": 0, "flags": 0}
        return [entry, {**entry, "host": "::1"}]

    monkeypatch.setattr(GuardedResolver, "resolve", lying)
    (outcome,) = fetch(f"http://public.example:{web.server_port}/file/a.png", allow_networks=(), attempts=1)
    assert outcome.reason == "private_address" and not web.asked


# ------------------------------------------------------------------------------------------ behind a proxy


class Proxy(http.server.ThreadingHTTPServer):
    """Answers for every host: /to?URL by a redirect, all else by the path; remembers what it was asked for."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), ProxyHandler)
        self.asked = []


class ProxyHandler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        return None

    def do_GET(self):
        self.server.asked.append(self.path)
        _, found, where = unquote(self.path).encode().decode("latin-1").partition("/to?")  # as UTF-8
        self.send_response(302 if found else 200)
        self.send_header("Content-Length", "0" if found else "4")
        if found:
            self.send_header("Location", where)
        self.end_headers()
        self.wfile.write(b"" if found else b"data")

    def do_CONNECT(self):
        self.server.asked.append(f"CONNECT {self.path}")
        self.send_error(403)


@pytest.fixture
def proxy(monkeypatch):
    with Proxy() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        for name in ("http_proxy", "https_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{server.server_port}")
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        yield server
        server.shutdown()


def test_behind_a_proxy_its_own_address_is_exempt_and_the_targets_are_checked(fetch, web, proxy):
    public, port = "http://93.184.216.34", web.server_port
    private = [f"http://{host}:{port}/file/a.png" for host in ("127.0.0.1", "10.1.2.3", "[::1]", *NAMED)]
    outcomes = fetch(f"{public}/a.png", *private, allow_networks=(), attempts=1)
    assert outcomes[0].sha256 == hashlib.sha256(b"data").hexdigest()
    assert {outcome.reason for outcome in outcomes[1:]} <= set(REFUSED)
    assert proxy.asked == [f"{public}/a.png"] and not web.asked
    (outcome,) = fetch(f"{public}/to?http://127。0。0。1:{port}/file/a.png", allow_networks=(), attempts=1)
    assert outcome.reason == "private_address" and len(proxy.asked) == 2 and not web.asked
    fetch("https://93.184.216.34/a.png", "https://127。0。0。1/a.png", allow_networks=(), attempts=1)
    assert proxy.asked[2:] == ["CONNECT 93.184.216.34:443"]


def test_networks_that_are_named_and_hosts_of_no_proxy_are_asked_directly(fetch, web, proxy, monkeypatch):
    (outcome,) = fetch("/file/a.png")
    assert outcome.sha256 and not proxy.asked
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (outcome,) = fetch("/file/a.png", allow_networks=())
    assert outcome.reason == "private_address" and not proxy.asked


def test_a_proxy_that_does_not_speak_http_is_an_error_of_configuration(fetch, monkeypatch):
    for wrong in ("socks5://127.0.0.1:1080", "http://"):
        monkeypatch.setenv("http_proxy", wrong)
        with pytest.raises(ConfigError, match="http_proxy"):
            fetch("/file/a.png")


@pytest.mark.parametrize("name", ["http_proxy", "https_proxy"])
def test_a_proxy_whose_name_does_not_resolve_is_an_error_of_configuration(fetch, monkeypatch, name):
    for wrong in ("http://no-such-host.invalid:3128", "no-such-host.invalid:3128", f"http://{'a' * 70}.invalid:3128"):
        monkeypatch.setenv(name, wrong)
        with pytest.raises(ConfigError, match="http_proxy or https_proxy is .*its host does not resolve"):
            fetch("/file/a.png")


def test_a_name_that_changes_its_mind_is_judged_by_what_is_connected_to():
    answers = iter(["93.184.216.34", "127.0.0.1"])

    async def lookup(host, port, family):
        return [{"hostname": host, "host": next(answers), "port": port, "family": family, "proto": 0, "flags": 0}]

    async def run():
        resolver = GuardedResolver(FetchRules(), lookup)
        first = await resolver.resolve("rebind.example", 80)
        again = await resolver.resolve("rebind.example", 80)  # remembered: asked once
        with pytest.raises(PrivateAddress):
            await resolver.resolve("rebind.example", 81)
        await resolver.close()
        return first, again

    first, again = asyncio.run(run())
    assert first == again and first[0]["host"] == "93.184.216.34"


def test_a_name_servers_bad_moment_is_not_remembered():
    calls = []

    async def lookup(host, port, family):
        calls.append(host)
        raise socket.gaierror(socket.EAI_AGAIN if host == "busy" else socket.EAI_NONAME, "no")

    async def run():
        resolver = GuardedResolver(FetchRules(), lookup)
        for host in ("busy", "busy", "gone", "gone"):
            with pytest.raises(socket.gaierror):
                await resolver.resolve(host, 80)
        await resolver.close()

    asyncio.run(run())
    assert calls == ["busy", "busy", "gone"]


@pytest.mark.parametrize("url", ["file:///etc/passwd", "gopher://x/", "javascript:1", "//host/x", "http://:80/", "x"])
def test_only_http_addresses_with_a_host_are_fetched(url):
    with pytest.raises(Exception, match="wrong_url"):
        check_address(url)


@pytest.mark.parametrize(
    ("value", "meant"),
    [
        ("noai, noimageai", ["noai", "noimageai"]),
        ("otherbot: noai", []),
        ("Tessera: noai", ["noai"]),
        ("*: NOINDEX", ["noindex"]),
        ("unavailable_after: 25 Jun 2030 15:00:00 PST", ["unavailable_after: 25 jun 2030 15:00:00 pst"]),
    ],
)
def test_robots_directives_for_others_are_not_ours(value, meant):
    assert opt_outs(value) == meant


# ----------------------------------------------------------------------------------------------- the cache


def test_the_cache_notices_damage_and_loss(tmp_path):
    cache = RawCache(str(tmp_path / "c"))
    digest = cache.put(b"data")
    assert cache.put(b"data") == digest and cache.get(digest) == b"data"
    (tmp_path / "c" / digest[:2] / digest).write_bytes(b"date")
    with pytest.raises(DataError, match="does not match the digest"):
        cache.get(digest)
    (tmp_path / "c" / digest[:2] / digest).unlink()
    with pytest.raises(DataError, match="restore"):
        cache.get(digest)


def test_a_cache_that_cannot_be_written_is_an_error_of_storage(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="check the storage"):
        RawCache(str(tmp_path / "file")).put(b"data")
