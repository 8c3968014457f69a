"""A real HTTP server that misbehaves: what it does is in the path. Runs in a thread, or alone as a program.

    python -m tests.data_pipeline.web FOLDER      serves FOLDER/NAME under /NAME, prints its address

/file/NAME the file; the rest are its ways to fail, each followed by anything: /status/503/... /once/503/NAME (the first
time only), /stall/..., /drip/..., /cut/NAME (half of what it announced), /endless/..., /huge/..., /packed-bomb/...,
/said/CONTENT-ENCODING/PACKINGS/NAME, /later/RETRY-AFTER/NAME, /packed/NAME, /deflate/NAME, /bare-deflate/NAME (without
zlib's header), /badly-packed/HOW/NAME, /redirect/COUNT/NAME,
/moved/STATUS/NAME, /open/PACKING/NAME (without a length), /to?URL, /robots/DIRECTIVES/NAME, /garbage/..., /closed/....
"""

import contextlib
import email.utils
import functools
import gzip
import http.server
import socket
import sys
import threading
import time
import zlib
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import unquote


class Misbehaving(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "Web"

    def log_message(self, *_):
        return None

    def setup(self):
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def do_GET(self):
        path = unquote(self.path)
        self.server.asked[path] += 1
        self.server.headers[path] = dict(self.headers)
        path, _, query = path.partition("?")
        way, _, rest = path.lstrip("/").partition("/")
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            getattr(self, "way_" + way.replace("-", "_"))(rest or query)

    def answer(self, body=b"", status=200, length=None, **headers):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def way_file(self, name):
        path = self.server.folder / name
        self.answer(path.read_bytes()) if path.is_file() else self.answer(status=404)

    def way_status(self, rest):
        self.answer(status=int(rest.partition("/")[0]))

    def way_once(self, rest):
        status, _, name = rest.partition("/")
        self.answer(status=int(status)) if self.server.asked[unquote(self.path)] == 1 else self.way_file(name)

    def way_stall(self, _):
        self.answer(b"\xff\xd8\xff", length=1000)
        self.server.ended.wait(60)
        self.close_connection = True

    def way_drip(self, _):
        self.answer(length=10_000)
        while not self.server.ended.wait(0.05):
            self.wfile.write(b"x")

    def way_cut(self, name):
        data = (self.server.folder / name).read_bytes()
        self.answer(data[: len(data) // 2], length=len(data))
        self.close_connection = True

    def way_endless(self, _):
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        while not self.server.ended.is_set():
            self.wfile.write(bytes(65536))

    def way_huge(self, _):
        self.answer(b"x", length=10**12)
        self.close_connection = True

    def way_packed_bomb(self, _):
        self.answer(packed_bomb(), Content_Encoding="gzip")

    def way_packed(self, name):
        self.answer(gzip.compress((self.server.folder / name).read_bytes()), Content_Encoding="gzip")

    def way_deflate(self, name):
        self.answer(zlib.compress((self.server.folder / name).read_bytes()), Content_Encoding="deflate")

    def way_bare_deflate(self, name):
        packed = zlib.compress((self.server.folder / name).read_bytes(), wbits=-zlib.MAX_WBITS)
        self.answer(packed, Content_Encoding="deflate")

    def way_said(self, rest):
        """/said/HEADERS,.../PACKINGS/NAME: Content-Encoding as it is said, and how the file is packed."""
        said, packings, name = rest.split("/", 2)
        data = (self.server.folder / name).read_bytes()
        for packing in packings.split("+"):
            data = {"gzip": gzip.compress, "deflate": zlib.compress}.get(packing, bytes)(data)
        self.answer(data, Content_Encoding=said.replace("|", "/"))

    def way_later(self, rest):
        """/later/HOW/NAME: 503 with a Retry-After the first time, then the file."""
        how, _, name = rest.partition("/")
        if self.server.asked[unquote(self.path)] > 1:
            return self.way_file(name)
        until = email.utils.format_datetime(datetime.now(UTC) + timedelta(seconds=3600), usegmt=True)
        past = "Wed, 21 Oct 2015 07:28:00 GMT"
        wait = {"date": until, "past": past, "seconds": "3600", "word": "soon", "wrong": "Wed, 99 Oct 2015"}[how]
        self.answer(status=503, Retry_After=wait)

    def way_badly_packed(self, rest):
        how, _, name = rest.partition("/")
        data = (self.server.folder / name).read_bytes()
        packed = zlib.compress(data) if how == "cut-deflate" else gzip.compress(data)
        middle = len(packed) // 2
        body = {
            "plain": data,
            "plain-deflate": data,
            "cut": packed[:middle],
            "cut-deflate": packed[:middle],
            "wrong-sum": packed[:-8] + bytes(8),
            "more": packed + b"more",
            "nothing": b"",
        }[how]
        self.answer(body, Content_Encoding="deflate" if how.endswith("deflate") else "gzip")

    def way_redirect(self, rest):
        count, _, name = rest.partition("/")
        left = int(count) - 1
        self.answer(status=302, Location=f"/redirect/{left}/{name}" if left else f"/file/{name}")

    def way_moved(self, rest):
        """/moved/STATUS/NAME: to the file by a relative address, and a cookie that nobody should bring back."""
        status, _, name = rest.partition("/")
        self.answer(status=int(status), Location=f"../../file/{name}", Set_Cookie="who=me; Path=/")

    def way_open(self, rest):
        """/open/PACKING/NAME: the file until the connection is closed."""
        packing, _, name = rest.partition("/")
        data = (self.server.folder / name).read_bytes()
        self.send_response(200)
        self.send_header("Connection", "close")
        self.send_header("Content-Encoding", packing)
        self.end_headers()
        self.wfile.write(gzip.compress(data) if packing == "gzip" else data)
        self.close_connection = True

    def way_to(self, url):
        self.answer(status=301, Location=url.encode().decode("latin-1"))  # as UTF-8

    def way_robots(self, rest):
        directives, _, name = rest.partition("/")
        self.answer((self.server.folder / name).read_bytes(), X_Robots_Tag=directives)

    def way_garbage(self, _):
        self.wfile.write(b"this is not HTTP\r\n\r\n")
        self.close_connection = True

    def way_closed(self, _):
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)


@functools.cache
def packed_bomb():
    """50 KB that unpack to 50 MB."""
    return gzip.compress(bytes(50_000_000))


class Web(http.server.ThreadingHTTPServer):
    """address; asked: how often each path was, headers: with which the last time; folder: what /file/ serves."""

    daemon_threads = True
    request_queue_size = 512

    def __init__(self, folder, port=0):
        super().__init__(("127.0.0.1", port), Misbehaving)
        self.folder, self.asked, self.ended = Path(folder), Counter(), threading.Event()
        self.headers = {}
        packed_bomb()
        self.address = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        return None

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        self.shutdown()
        self.server_close()


if __name__ == "__main__":
    with Web(sys.argv[1]) as web:
        print(web.address, flush=True)
        while True:
            time.sleep(3600)
