"""Fetching from a real server that misbehaves, and refusing what must not be asked."""

import asyncio
import hashlib
import resource
import socket
import threading
import time

import pytest

from data_pipeline.build.cache import RawCache
from data_pipeline.build.fetch import GuardedResolver, PrivateAddress, check_address, fetch_all, is_allowed, opt_outs
from data_pipeline.config import FetchRules
from data_pipeline.errors import DataError
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


@pytest.mark.parametrize("host", ["127.1", "2130706433", "0x7f.1", "localhost"])
def test_names_that_lead_home_are_refused_when_they_are_connected_to(fetch, web, host):
    port = web.server_port
    (outcome,) = fetch(f"http://{host}:{port}/file/a.png", allow_networks=())
    assert outcome.reason in ("private_address", "wrong_url", "unknown_host") and not web.asked


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
        check_address(url, FetchRules())


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
    with pytest.raises(DataError, match="other bytes"):
        cache.get(digest)
    (tmp_path / "c" / digest[:2] / digest).unlink()
    with pytest.raises(DataError, match="restore"):
        cache.get(digest)


def test_a_cache_that_cannot_be_written_is_an_error_of_storage(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="see to the storage"):
        RawCache(str(tmp_path / "file")).put(b"data")
