"""A proxy that does to each request what a script says: delay, refuse, 503, cut, end early, stall, trickle, nothing."""

import contextlib
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator

Fault = tuple[str, float]
"""(kind, argument): delay and trickle seconds; cut, short and stall: after how many bytes of the answer; others: 0."""

CLEAN: Fault = ("clean", 0)
_UNAVAILABLE = b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class FaultProxy:
    """One request a connection. `script(n, request line)` -> what happens to the n-th request; `drop`: a header."""

    def __init__(self, upstream_port: int, script: Callable[[int, str], Fault], drop: bytes = b"") -> None:
        self.script = script
        self.drop = drop
        self.happened: Counter[str] = Counter()
        self.requests: list[str] = []
        self._upstream = ("127.0.0.1", upstream_port)
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._server = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = int(self._server.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """No more connections; stalled ones are let go."""
        self._closed.set()
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
            head = _read_head(client)
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
            with socket.create_connection(self._upstream, timeout=30) as server:
                server.sendall(_without(head, self.drop).replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
                threading.Thread(target=_relay, args=(client, server), daemon=True).start()
                self._answer(server, client, kind, argument)

    def _answer(self, server: socket.socket, client: socket.socket, kind: str, argument: float) -> None:
        sent = 0
        while data := server.recv(65536):
            if kind in ("cut", "short", "stall") and sent + len(data) > argument:
                client.sendall(data[: max(0, int(argument) - sent)])
                if kind == "cut":
                    _reset(client)
                elif kind == "stall":
                    self._closed.wait(30)
                return
            if kind == "trickle":
                time.sleep(argument)
            client.sendall(data)
            sent += len(data)
        client.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def fault_proxy(upstream_port: int, script: Callable[[int, str], Fault], drop: bytes = b"") -> Iterator[FaultProxy]:
    """A running proxy, closed at the end."""
    proxy = FaultProxy(upstream_port, script, drop)
    try:
        yield proxy
    finally:
        proxy.close()


def _read_head(client: socket.socket) -> bytes:
    head = b""
    while b"\r\n\r\n" not in head:
        data = client.recv(65536)
        if not data:
            return b""
        head += data
    return head


def _without(head: bytes, name: bytes) -> bytes:
    lines = head.split(b"\r\n")
    return b"\r\n".join(line for line in lines if not name or not line.lower().startswith(name + b":"))


def _relay(client: socket.socket, server: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := client.recv(65536):
            server.sendall(data)


def _reset(client: socket.socket) -> None:
    """Close with RST instead of FIN."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
