"""Sources behind real web servers: HEAD refused, pages for what is not there, odd headers, queries in addresses."""

import gzip
import http.server
import io
import json
import tarfile
import threading
import zlib
from collections import Counter
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from urllib.parse import unquote, urlsplit

import pytest
from urllib3 import HTTPResponse

from data_pipeline.errors import DataError
from data_pipeline.ingest.inputs import open_input, read_input
from data_pipeline.ingest.sources import open_source
from data_pipeline.remote import Forbidden, HttpStorage, NotFound, retry_after_s
from data_pipeline.schema import Pair
from data_pipeline.shards.verify import verify
from data_pipeline.storage import open_storage
from data_pipeline.stream import cache
from data_pipeline.stream.reader import Stream

PAGE = b"<!doctype html><title>Not here</title>"


class Odd(http.server.BaseHTTPRequestHandler):
    """Files of a folder as the server's settings say: head (status of every HEAD, 0: answered), page (for what is not
    there), encoding (Content-Encoding), packing (of the body), ranges, total
    (in Content-Range; empty: no such header)."""

    def log_message(self, *_):
        return None

    def do_HEAD(self):
        self.server.asked["HEAD"] += 1
        if self.server.head:
            return self.say(self.server.head, b"", send=False)
        self.file(send=False)

    def do_GET(self):
        self.server.asked["GET"] += 1
        self.file(send=True)

    def file(self, send):
        path = self.server.folder / unquote(urlsplit(self.path).path).lstrip("/")
        if not path.is_file():
            return (
                self.say(200, PAGE, send, Content_Type=self.server.page)
                if self.server.page
                else self.say(404, b"", send)
            )
        data = {"gzip": gzip.compress, "deflate": zlib.compress}.get(self.server.packing, bytes)(path.read_bytes())
        headers = {"Content_Encoding": self.server.encoding} if self.server.encoding else {}
        headers |= {"Content_Type": self.server.kind} if self.server.kind else {}
        said = self.headers.get("Range", "") if self.server.ranges else ""
        if not said:
            return self.say(200, data, send, **headers)
        first, _, last = said.removeprefix("bytes=").partition("-")
        start, stop = int(first), min(int(last or len(data)) + 1, len(data))
        if start >= len(data):
            return self.say(416, b"", send, Content_Range=f"bytes */{len(data)}")
        if self.server.total:
            headers["Content_Range"] = f"bytes {start}-{stop - 1}/{self.server.total.format(len(data))}"
        self.say(206, data[start:stop], send, **headers)

    def say(self, status, body, send, **headers):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if send:
            self.wfile.write(body)


@pytest.fixture
def site(tmp_path, make_png):
    """A server of the folder tmp_path/site: its address and its settings."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "a.png").write_bytes(make_png())
    (folder / "empty.csv").touch()
    rows = [json.dumps({"image": f"http://host/{number}", "caption": f"row {number}"}) for number in range(2000)]
    (folder / "m.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "m.jsonl.gz").write_bytes(gzip.compress((folder / "m.jsonl").read_bytes()))
    (folder / "t.csv").write_text("image,caption\na.png,a picture\nb.png,none there\n")
    with tarfile.open(folder / "0.tar", "w") as tar:
        for name, data in (("k.png", make_png()), ("k.txt", b"a picture")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Odd) as server:
        server.folder, server.asked = folder, Counter()
        server.head, server.page, server.encoding, server.packing, server.kind, server.ranges = 0, "", "", "", "", True
        server.total = "{}"
        server.address = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def rows(make_config):
    """rows(**source) -> its rows."""

    def read(**source):
        source = open_source(make_config(source=source, output="unused").source)
        return list(source.rows(0, source.count()))

    return read


REFUSALS = [400, 401, 403, 404, 405, 500, 501, 503]


@pytest.mark.parametrize("head", REFUSALS)
@pytest.mark.parametrize("ranges", [True, False])
def test_a_server_that_refuses_head_is_asked_for_the_first_byte(site, rows, head, ranges):
    site.head, site.ranges = head, ranges
    storage = open_storage(site.address)
    assert storage.exists("m.jsonl") and not storage.exists("gone.jsonl")
    assert storage.stat("m.jsonl")[0] == (site.folder / "m.jsonl").stat().st_size
    assert storage.stat("empty.csv")[0] == 0
    assert read_input(f"{site.address}/a.png") == (site.folder / "a.png").read_bytes()
    assert len(rows(kind="jsonl", path=f"{site.address}/m.jsonl")) == 2000
    with pytest.raises(NotFound, match="not found"):
        storage.stat("gone.jsonl")


@pytest.mark.parametrize("total", ["*", ""])
def test_a_size_that_a_server_does_not_say_is_unknown(site, rows, total):
    site.head, site.total = 405, total
    storage = open_storage(site.address)
    assert storage.exists("m.jsonl") and storage.stat("m.jsonl")[0] == -1
    content = (site.folder / "m.jsonl").read_bytes()
    assert storage.get_range("m.jsonl", 0, 9) == content[:9] and storage.get("m.jsonl") == content
    if total:  # without the header nobody knows which bytes came
        assert storage.get_range("m.jsonl", 5, 9) == content[5:9]
        assert open_input(f"{site.address}/m.jsonl").read() == content
    with pytest.raises(DataError, match="m.jsonl: the server does not send its size"):
        open_input(f"{site.address}/m.jsonl").seek(0, 2)


def test_the_first_byte_is_looked_at_as_it_is_sent(site, monkeypatch):
    decoded = []
    original = HTTPResponse.read
    monkeypatch.setattr(
        HTTPResponse, "read", lambda answer, *args, **more: (decoded.append(more), original(answer, *args, **more))[1]
    )
    site.head = 405
    assert open_storage(site.address).exists("m.jsonl.gz") and decoded == [{"decode_content": False}]


@pytest.mark.parametrize("ask", ["get_range", "stream"])
def test_an_answer_in_a_packing_that_is_refused_is_closed(site, monkeypatch, ask):
    answers = []  # held here, else they are closed when they are freed
    original = HttpStorage._request
    monkeypatch.setattr(HttpStorage, "_request", lambda *args: (answers.append(original(*args)), answers[-1])[1])
    site.encoding = "br"
    storage = open_storage(site.address)
    with pytest.raises(DataError, match="compresses it as br"):
        b"".join(storage.stream("m.jsonl")) if ask == "stream" else storage.get_range("m.jsonl", 0, 9)
    assert [answer.closed for answer in answers] == [True]


@pytest.mark.parametrize("wait", ["3600", "date"])
def test_a_server_that_asks_for_a_longer_wait_than_patience_is_left_alone(site, monkeypatch, wait):
    until = format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True) if wait == "date" else wait
    monkeypatch.setattr(Odd, "do_GET", lambda self: self.say(503, b"", True, Retry_After=until))
    storage = open_storage(site.address)
    with pytest.raises(DataError, match="given up after 0 s and 1 faults"):
        storage.get("m.jsonl")
    site.head = 405
    with pytest.raises(DataError, match="given up after 0 s and 1 faults"):
        storage.stat("m.jsonl")


WAITS = ["0", "1.0", "-5", "soon", "", "Wed, 21 Oct 2015 07:28:00 GMT", "Wed, 99 Oct 2015", "9" * 400]


@pytest.mark.parametrize("wait", WAITS)
def test_any_words_for_a_wait_are_seconds_or_none(wait):
    assert retry_after_s({"Retry-After": wait}) == (1.0 if wait == "1.0" else 0.0)


def test_a_date_to_wait_for_is_held_against_the_clock_of_the_server():
    headers = {"Date": "Wed, 21 Oct 2015 07:28:00 GMT", "Retry-After": "Wed, 21 Oct 2015 07:30:00 GMT"}
    assert retry_after_s(headers) == 120
    assert retry_after_s({**headers, "Date": "no date"}) == 0


def test_who_may_read_nothing_is_told_so(site, monkeypatch):
    site.head = 403
    monkeypatch.setattr(Odd, "do_GET", lambda self: self.say(403, b"", True))
    with pytest.raises(Forbidden, match="permission denied"):
        open_storage(site.address).stat("m.jsonl")


def test_a_server_that_answers_head_is_asked_once(site):
    open_storage(site.address).stat("m.jsonl")
    assert site.asked == {"HEAD": 1}


@pytest.mark.parametrize("head", [0, 405])
@pytest.mark.parametrize("page", ["text/html", "text/html; charset=utf-8", "Text/HTML", "application/xhtml+xml"])
def test_a_page_for_what_is_not_there_is_nothing(site, rows, head, page):
    site.page, site.head = page, head
    storage = open_storage(site.address)
    assert not storage.exists("0.parquet") and storage.exists("0.tar")
    with pytest.raises(NotFound, match="not found"):
        storage.stat("gone.tar")
    with pytest.raises(FileNotFoundError):
        read_input(f"{site.address}/gone.png")
    [row] = rows(kind="tars", path=f"{site.address}/0.tar")
    assert (row.captions, row.meta) == (("a picture",), {})
    there, gone = rows(kind="csv", path=f"{site.address}/t.csv")
    assert there.image == (site.folder / "a.png").read_bytes() and gone.reason == "unreadable_file"


def test_files_that_a_server_calls_pages_are_read_all_the_same(site, rows):
    site.kind = "text/html"
    (site.folder / "p.html").write_bytes(PAGE)
    assert open_storage(site.address).stat("p.html")[0] == len(PAGE)
    assert len(rows(kind="jsonl", path=f"{site.address}/m.jsonl")) == 2000
    [row] = rows(kind="tars", path=f"{site.address}/0.tar")
    assert isinstance(row, Pair)


QUERIES = ["?download=true", "?download=true&x=a/b", "#top", "?X-Amz-Credential=A%2F1/s3/aws4_request", "?a=.gz&b"]


@pytest.mark.parametrize("query", ["", *QUERIES])
@pytest.mark.parametrize("encoding", ["", "gzip", "x-gzip", "utf-8"])
def test_a_packed_table_is_unpacked_whatever_stands_behind_its_name(site, rows, query, encoding):
    site.encoding = encoding
    found = rows(kind="jsonl", path=f"{site.address}/m.jsonl.gz{query}")
    assert [row.captions[0] for row in found] == [f"row {number}" for number in range(2000)]


ON_THE_WAY = [*((word, "") for word in ("utf-8", "none", "aws-chunked, binary", "image/jpeg", "x-gzip"))]
ON_THE_WAY += [("gzip", "gzip"), ("aws-chunked,x-gzip", "gzip")]


@pytest.mark.parametrize("query", ["", *QUERIES])
@pytest.mark.parametrize(("encoding", "packing"), ON_THE_WAY)
def test_no_row_is_lost_to_a_packing_on_the_way(site, rows, query, encoding, packing):
    site.encoding, site.packing = encoding, packing
    assert len(rows(kind="jsonl", path=f"{site.address}/m.jsonl{query}")) == 2000
    assert read_input(f"{site.address}/a.png{query}") == (site.folder / "a.png").read_bytes()
    with open_input(f"{site.address}/0.tar{query}") as file:
        assert file.seek(512) == 512 and file.read(4) == b"\x89PNG"


REFUSED = [("br", ""), ("deflate", "deflate"), ("gzip, gzip", "gzip"), ("zstd", "")]


@pytest.mark.parametrize(("encoding", "packing"), REFUSED)
def test_another_packing_on_the_way_is_refused_by_name(site, rows, encoding, packing):
    site.encoding, site.packing = encoding, packing
    with pytest.raises(DataError, match="compresses it as"):
        rows(kind="jsonl", path=f"{site.address}/m.jsonl")


def test_a_dataset_is_read_past_refused_heads_and_pages_and_refused_where_it_comes_packed(
    site, scenes, tmp_path, monkeypatch
):
    monkeypatch.setenv(cache.FOLDER, str(tmp_path / "cache"))
    site.folder, site.head, site.page, site.encoding = scenes, 405, "text/html", "binary"
    here = [(sample.key, sample.image) for sample in Stream(scenes, seed=0).read(0, 25)]
    assert [(sample.key, sample.image) for sample in Stream(site.address, seed=0).read(0, 25)] == here
    assert verify(site.address)["samples"] == 25
    site.encoding = site.packing = "gzip"
    with pytest.raises(DataError, match="compresses it as gzip"):
        Stream(site.address, seed=0)
