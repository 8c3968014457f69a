"""S3 and http against real servers: the contract of a storage, what a fault costs, and what no patience can mend."""

import functools
import http.server
import pickle
import socket
import threading
import time
from urllib.parse import unquote

import numpy as np
import pytest

from data_pipeline import remote
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.storage import open_storage
from launchers.chaos.proxy import CLEAN, fault_proxy


def on_s3(test):
    return pytest.mark.real(pytest.mark.slow(test))


BYTES = np.random.default_rng(0).bytes(3_000_000)


@pytest.fixture
def short_waits(monkeypatch):
    """The same rules with a clock that tests can wait for."""
    monkeypatch.setattr(remote, "PATIENCE_S", 20.0)
    monkeypatch.setattr(remote, "STALL_S", 0.5)


@pytest.fixture
def site(tmp_path):
    """A folder behind a plain http server that lacks ranges -> (folder, port)."""
    folder = tmp_path / "site"
    folder.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield folder, server.server_port
    server.shutdown()
    server.server_close()


# ---------------------------------------------------------------------------------- the contract, on S3


@pytest.fixture
def storage(bucket):
    return open_storage(f"{bucket}/some/prefix")


@on_s3
class TestContract:
    def test_what_is_put_is_listed_and_read(self, storage):
        assert storage.list() == [] and not storage.exists("a")
        assert storage.put_if_absent("a", b"0123456789")
        assert storage.list() == ["a"] and storage.exists("a")
        assert (storage.get("a"), storage.get_range("a", 2, 5), storage.stat("a")[0]) == (b"0123456789", b"234", 10)
        assert storage.get_range("a", 3, 3) == b""

    def test_an_empty_object_is_read(self, storage):
        storage.put_if_absent("empty", b"")
        assert storage.get("empty") == b"" and storage.stat("empty")[0] == 0

    def test_nothing_is_overwritten_unless_replaced(self, storage, tmp_path):
        (tmp_path / "file").write_bytes(BYTES)
        assert storage.put_file_if_absent("a", tmp_path / "file") and storage.get("a") == BYTES
        assert not storage.put_file_if_absent("a", tmp_path / "file") and not storage.put_if_absent("a", b"second")
        assert storage.get("a") == BYTES
        storage.replace("a", b"third")
        assert storage.get("a") == b"third"

    def test_of_many_writers_one_wins(self, storage):
        results = []
        write = lambda n: results.append(storage.put_if_absent("a", b"%d" % n))  # noqa: E731
        writers = [threading.Thread(target=write, args=(n,)) for n in range(8)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        assert sorted(results) == [False] * 7 + [True]

    def test_folders_are_listed_and_removed_with_what_is_under_them(self, storage, bucket):
        for name in ("x/1", "x/y/2", ".tmp/3", "4"):
            storage.put_if_absent(name, b"")
        assert storage.folders() == ["x"] and storage.list() == ["4"]
        open_storage(f"{bucket}/some/prefix/x").remove_all()
        assert storage.folders() == [] and storage.list() == ["4"]
        storage.remove("4")
        storage.remove("4")
        assert storage.list() == []

    def test_a_listing_longer_than_a_page_is_whole(self, storage, monkeypatch):
        monkeypatch.setattr(remote, "_PAGE", 3)
        names = [f"{number:04d}" for number in range(8)]
        for name in names:
            storage.put_if_absent(name, b"")
        assert storage.list() == names

    @pytest.mark.parametrize("ask", [lambda s: s.get("x"), lambda s: s.stat("x"), lambda s: s.get_range("x", 0, 1)])
    def test_a_missing_object_is_named(self, storage, ask):
        with pytest.raises(DataError, match="prefix/x: not found"):
            ask(storage)

    def test_a_range_beyond_the_end_is_refused(self, storage):
        storage.put_if_absent("a", b"0123")
        with pytest.raises(DataError, match="prefix/a: shorter than the requested"):
            storage.get_range("a", 4, 6)
        with pytest.raises(DataError, match=r"prefix/a: requested bytes 2\.\.6 of 4"):
            storage.get_range("a", 2, 6)

    def test_wrong_credentials_are_told_from_a_missing_object(self, storage, monkeypatch):
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        with pytest.raises(DataError, match="permission denied .*SignatureDoesNotMatch"):
            open_storage(storage.root).get("a")

    def test_a_storage_travels_to_another_process_without_its_connections(self, storage):
        storage.put_if_absent("a", b"0123")
        assert pickle.loads(pickle.dumps(storage)).get_range("a", 1, 3) == b"12"

    def test_an_object_that_is_replaced_between_two_reads_is_refused(self, storage):
        storage.replace("a", BYTES)
        seen = {}
        assert b"".join(storage.stream("a", 0, 10, seen)) == BYTES[:10]
        storage.replace("a", BYTES[::-1])
        with pytest.raises(DataError, match="prefix/a: replaced while read"):
            list(storage.stream("a", 10, 20, seen))


@on_s3
@pytest.mark.parametrize("fault", [("503", 0), ("refuse", 0), ("cut", 0), ("stall", 0), ("short", 0)])
def test_a_write_whose_answer_was_lost_is_still_ours(bucket, gateway, monkeypatch, short_waits, fault, tmp_path):
    (tmp_path / "file").write_bytes(BYTES)
    with fault_proxy(gateway.port, lambda number, line: fault if number in (0, 2) else CLEAN) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        storage = open_storage(bucket)
        assert storage.put_if_absent("a", BYTES) and storage.put_file_if_absent("b", tmp_path / "file")
        assert not storage.put_if_absent("a", b"other") and not storage.put_file_if_absent("a", tmp_path / "file")
        assert storage.get("a") == storage.get("b") == BYTES and proxy.happened[fault[0]] == 2


# ------------------------------------------------------------------------------- faults within a body


FAULTS = [("delay", 0.3), ("trickle", 0.01), ("refuse", 0), ("503", 0), ("cut", 900_000), ("short", 900_000),
          ("stall", 900_000), ("cut", 100), ("short", 0)]  # fmt: skip


@on_s3
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault[0]}-{fault[1]}")
def test_a_read_goes_on_where_it_was_broken(bucket, gateway, monkeypatch, short_waits, fault):
    open_storage(bucket).put_if_absent("a", BYTES)
    with fault_proxy(gateway.port, lambda number, line: fault if number < 3 else CLEAN) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        storage = open_storage(bucket)
        assert storage.get_range("a", 5, 2_900_000) == BYTES[5:2_900_000]
        assert storage.received == 2_900_000 - 5, "bytes that had come were not asked for again"
    assert proxy.happened[fault[0]] >= 1


@on_s3
@pytest.mark.parametrize("fault", [("refuse", 0), ("503", 0), ("stall", 500), ("short", 500)], ids=lambda f: f[0])
def test_a_server_that_stays_broken_is_given_up_in_time_naming_object_and_range(
    bucket, gateway, monkeypatch, short_waits, fault
):
    open_storage(bucket).put_if_absent("a", BYTES)
    monkeypatch.setattr(remote, "PATIENCE_S", 1.0)
    with fault_proxy(gateway.port, lambda number, line: fault) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        began = time.monotonic()
        with pytest.raises(DataError, match=rf"{bucket}/a bytes 5\.\.2000000: given up after .* last fault: "):
            open_storage(bucket).get_range("a", 5, 2_000_000)
        assert time.monotonic() - began < 1 + 20 + 0.5 + 3  # patience, a second for 100 KB that came, a stall


@pytest.mark.slow
def test_nobody_listening_is_given_up_in_time(monkeypatch):
    monkeypatch.setattr(remote, "PATIENCE_S", 1.0)
    began = time.monotonic()
    with pytest.raises(DataError, match=r"http://127.0.0.1:1/x/a bytes 0\.\.4: given up after"):
        open_storage("http://127.0.0.1:1/x").get_range("a", 0, 4)
    assert time.monotonic() - began < 40


# ------------------------------------------------------------------------------------------------ http


def test_http_reads_whole_objects_and_names_what_is_missing(site):
    folder, port = site
    (folder / "a").write_bytes(BYTES)
    storage = open_storage(f"http://127.0.0.1:{port}")
    assert storage.get("a") == BYTES and storage.stat("a")[0] == len(BYTES)
    assert storage.exists("a") and not storage.exists("b") and storage.list() == []
    with pytest.raises(DataError, match=f"http://127.0.0.1:{port}/b: not found"):
        storage.get("b")
    with pytest.raises(DataError, match="http is read-only"):
        storage.put_if_absent("b", b"")


def test_a_server_without_ranges_is_named_when_one_is_needed(site):
    folder, port = site
    (folder / "a").write_bytes(BYTES)
    storage = open_storage(f"http://127.0.0.1:{port}")
    assert storage.get_range("a", 0, 10) == BYTES[:10]
    with pytest.raises(DataError, match="it lacks ranges"):
        storage.get_range("a", 10, 20)


@pytest.mark.slow
def test_an_unusable_endpoint_is_a_fault_of_the_configuration(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "no address")
    with pytest.raises(ConfigError, match="AWS_ENDPOINT_URL"):
        open_storage("s3://bucket/x").get("a")


# -------------------------------------------------------------------------------------------- redirects


class Elsewhere(http.server.BaseHTTPRequestHandler):
    """Answers /to?URL by a redirect, all else by b"here"; remembers the hosts that it was asked for."""

    def log_message(self, *_):
        return None

    def do_GET(self):
        self.server.asked.append(self.headers["Host"])
        where = unquote(self.path.partition("?")[2])
        self.send_response(self.server.status if where else 200)
        self.send_header("Content-Length", "0" if where else "4")
        if where:
            self.send_header("Location", where.encode().decode("latin-1"))
        self.end_headers()
        if not where and self.command == "GET":
            self.wfile.write(b"here")

    do_HEAD = do_GET


@pytest.fixture
def elsewhere():
    with http.server.ThreadingHTTPServer(("", 0), Elsewhere) as server:
        server.asked, server.status = [], 302
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield server
        server.shutdown()


PRIVATE = ["localhost", "127.0.0.2", "2130706434", "0x7f.2", "0.0.0.0", "[::ffff:127.0.0.1]", "10.0.0.1", "[::1]"]
PRIVATE += ["169.254.169.254", "user@127.0.0.2", "[fe80::1%25lo]"]
UNREAD = ["localhost.", "127。0。0。2", "①②⑦.0.0.2"]
"""Spellings that the client may read as no address, or as a name: none of which leads to the server."""


@pytest.mark.parametrize("host", PRIVATE + UNREAD)
@pytest.mark.parametrize("scheme", ["http", "https", "//"])
def test_a_redirect_to_a_private_network_is_refused(elsewhere, monkeypatch, host, scheme):
    monkeypatch.setattr(remote, "PATIENCE_S", 0.01)
    port, to = elsewhere.server_port, "" if scheme == "//" else f"{scheme}:"
    storage = open_storage(f"http://127.0.0.1:{port}")
    for ask in (storage.get, storage.stat, lambda name: b"".join(storage.stream(name))):
        with pytest.raises(DataError, match=None if host in UNREAD else "redirects to .*, on a private network; use"):
            ask(f"to?{to}//{host}:{port}/x")
    assert set(elsewhere.asked) == {f"127.0.0.1:{port}"}


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_within_the_host_that_the_user_named_is_followed(elsewhere, status):
    elsewhere.status, port = status, elsewhere.server_port
    storage = open_storage(f"http://localhost:{port}")
    assert storage.get(f"to?http://LOCALHOST:{port}/x") == storage.get("to?/x") == b"here"
    with pytest.raises(DataError, match="private network"):
        storage.get(f"to?http://localhost:{port}/to?http://127.0.0.1:{port}/x")


def test_a_redirect_to_a_public_address_is_followed(elsewhere, monkeypatch):
    monkeypatch.setattr(remote, "is_public", lambda address: address == "127.0.0.2")
    port = elsewhere.server_port
    storage = open_storage(f"http://127.0.0.1:{port}")
    assert storage.get(f"to?http://127.0.0.2:{port}/x") == b"here"
    assert elsewhere.asked[-1] == f"127.0.0.2:{port}"
    with pytest.raises(DataError, match="private network"):
        storage.get(f"to?http://127.0.0.3:{port}/x")


def test_a_name_that_changes_its_address_is_judged_by_the_connection(elsewhere, monkeypatch):
    port, real = elsewhere.server_port, socket.getaddrinfo
    calls = []

    def looked_up(host, *args, **more):
        if host != "changes.example":
            return real(host, *args, **more)
        calls.append(host)
        return real("93.184.216.34" if len(calls) == 1 else "127.0.0.1", *args, **more)

    monkeypatch.setattr(socket, "getaddrinfo", looked_up)
    with pytest.raises(DataError, match="private network"):
        open_storage(f"http://127.0.0.1:{port}").get(f"to?http://changes.example:{port}/x")
    assert len(calls) == 2 and set(elsewhere.asked) == {f"127.0.0.1:{port}"}
