"""A proxy that injects a scripted fault per request: delay, refuse, 503, cut, end early, stall, trickle, or none.

It speaks plain http to one server, one request per connection. Requests can also be held until `release` is called, to
leave time to strike a run at one of them.
"""

import contextlib
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator

Fault = tuple[str, float]
"""(kind, argument); the argument is 0 where none is named.
delay: seconds before the request; trickle: seconds before each piece of the response.
cut, short, stall: reset, end or hang after this many bytes of the response.
torn: reset both sides after this fraction of the request's body.
hold, late: wait for `release` before forwarding the request, or its response.
pause: wait for `release` after this fraction of the request's body.
"""

CLEAN: Fault = ("clean", 0)
LONGEST_HOLD_S = 10.0
_PIECE = 65536
_UNAVAILABLE = b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
_CONTINUE = b"HTTP/1.1 100"  # interim response
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.I)


class FaultProxy:
    """The proxy. script(n, request line) -> fault of the n-th request. drop: name of a header to remove, lower case."""

    def __init__(
        self, upstream_port: int, script: Callable[[int, str], Fault], upstream: str = "127.0.0.1", drop: bytes = b""
    ) -> None:
        self.script = script
        self.drop = drop
        self.happened: Counter[str] = Counter()
        self.requests: list[str] = []
        self._upstream = (upstream, upstream_port)
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._released = threading.Event()
        self._server = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = int(self._server.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def release(self) -> None:
        """Let held requests continue."""
        self._released.set()

    def hold(self) -> None:
        """Hold the next requests whose fault is hold, late or pause."""
        self._released.clear()

    def close(self) -> None:
        """Stop accepting connections and release stalled ones."""
        self._closed.set()
        self._released.set()
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            head, body = _read_head(client)
            if not head:
                return
            line = head.split(b"\r\n", 1)[0].decode()
            with self._lock:
                kind, argument = self.script(len(self.requests), line)
                self.requests.append(line)
                self.happened[kind] += 1
            if kind == "refuse":
                return _reset(client)
            if kind == "503":
                client.sendall(_UNAVAILABLE)
                return
            if kind == "delay":
                time.sleep(argument)
            if kind == "hold":
                self._released.wait(LONGEST_HOLD_S)
            with socket.create_connection(self._upstream, timeout=30) as server:
                head = _without(head, self.drop)
                server.sendall(head.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
                length = _LENGTH.search(head)
                limit = int(argument * int(length[1])) if length and kind in ("torn", "pause") else None
                forward = (client, server, body, limit, kind == "torn")
                threading.Thread(target=self._relay, args=forward, daemon=True).start()
                self._answer(server, client, kind, argument)

    def _answer(self, server: socket.socket, client: socket.socket, kind: str, argument: float) -> None:
        sent = 0
        while data := server.recv(_PIECE):
            if kind in ("cut", "short", "stall") and sent + len(data) > argument:
                client.sendall(data[: max(0, int(argument) - sent)])
                if kind == "cut":
                    _reset(client)
                elif kind == "stall":
                    self._closed.wait(30)
                return
            if kind == "trickle":
                time.sleep(argument)
            if kind == "late" and not sent and not data.startswith(_CONTINUE):
                self._released.wait(LONGEST_HOLD_S)
            client.sendall(data)
            sent += 0 if data.startswith(_CONTINUE) else len(data)
        client.shutdown(socket.SHUT_WR)

    def _relay(self, client: socket.socket, server: socket.socket, data: bytes, limit: int | None, tear: bool) -> None:
        """Forward the request's body. data: the part received with the head. After `limit` bytes, reset or hold it."""
        with contextlib.suppress(OSError):
            sent = 0
            while True:
                if limit is not None and sent + len(data) >= limit:
                    server.sendall(data[: limit - sent])
                    sent, data = limit, data[limit - sent :]
                    if tear:
                        for side in (server, client):
                            _reset(side)
                            side.shutdown(socket.SHUT_RDWR)
                        return
                    self._released.wait(LONGEST_HOLD_S)
                    limit = None
                server.sendall(data)
                sent += len(data)
                data = client.recv(_PIECE)
                if not data:
                    return


@contextlib.contextmanager
def fault_proxy(upstream_port: int, script: Callable[[int, str], Fault], drop: bytes = b"") -> Iterator[FaultProxy]:
    """Run a proxy, and close it at the end."""
    proxy = FaultProxy(upstream_port, script, drop=drop)
    try:
        yield proxy
    finally:
        proxy.close()


def _without(head: bytes, name: bytes) -> bytes:
    lines = head.split(b"\r\n")
    return b"\r\n".join(line for line in lines if not name or not line.lower().startswith(name + b":"))


def _read_head(client: socket.socket) -> tuple[bytes, bytes]:
    """Return the request's head, and the part of the body received with it."""
    data = b""
    while b"\r\n\r\n" not in data:
        piece = client.recv(_PIECE)
        if not piece:
            return b"", b""
        data += piece
    head, end, body = data.partition(b"\r\n\r\n")
    return head + end, body


def _reset(client: socket.socket) -> None:
    """Close with RST instead of FIN."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
