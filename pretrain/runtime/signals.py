"""Stop signals: the same rules for training processes and their launcher. Imports no torch.

The first SIGTERM, SIGINT, SIGHUP or SIGUSR1 requests a save at the end of the step; a second one requests an immediate
exit. SIGUSR1 (announced by a scheduler, as with Slurm's --signal) and SIGHUP (which a closed terminal may send more
than once) never request the exit: repeating them changes nothing, and the first SIGTERM after one does not cut off the
requested save; only the next one does. SIGHUP stays ignored if the process was started so, as by `nohup`.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

ASK_TO_STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
ANNOUNCE = {signal.SIGHUP, signal.SIGUSR1}
"""Signals that request a save but never an immediate exit."""
INSISTED_EXIT = 130


class StopSignals:
    """Context manager whose `count` is the request so far: 0 nothing, 1 save and exit, 2 exit immediately.

    A thread reads the signals from a socket that the interpreter writes them to: Python's own handlers run only when
    the main thread returns from C, which it never does in a collective that hangs.
    """

    def __init__(self, leave: Callable[[], None] | None = None) -> None:
        self.count = 0
        self.received: list[int] = []
        self._leave = leave
        self._before: dict[int, Any] = {}
        self._inlet, self._outlet = socket.socketpair()
        self._wakeup = -1

    def __enter__(self) -> "StopSignals":
        self._inlet.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._inlet.fileno(), warn_on_full_buffer=False)
        ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()
        self._before = {
            number: signal.signal(number, lambda *_: None) for number in ASK_TO_STOP if number not in ignored
        }
        threading.Thread(target=self._listen, name="stop signals", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        with contextlib.suppress(OSError):
            self._outlet.shutdown(socket.SHUT_RDWR)
        self._inlet.close()

    def _listen(self) -> None:
        with self._outlet:
            while numbers := self._outlet.recv(64):
                for number in numbers:
                    if number in self._before:
                        self.note(number)

    def note(self, number: int) -> None:
        """Count one signal."""
        announced = set(self.received) <= ANNOUNCE
        expected = not self.received or number in ANNOUNCE or (announced and number == signal.SIGTERM)
        self.received.append(number)
        self.count = max(self.count, 1 if expected else 2)
        if self.count == 2 and self._leave is not None:
            self._leave()


def leave_at_once() -> None:
    """Exit the process immediately, whatever its threads are doing; committed checkpoints stay."""
    print("second stop signal: exiting without a save", file=sys.stderr, flush=True)
    os._exit(INSISTED_EXIT)


def ignore_stop_signals() -> None:
    """Ignore stop signals in a worker process; its parent decides when to stop and ends it."""
    for number in ASK_TO_STOP:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ASK_TO_STOP)


@contextlib.contextmanager
def stop_signals_held() -> Iterator[None]:
    """Block stop signals in processes started within the block, until they have set themselves up to ignore them.

    These processes inherit this thread's mask; this process still receives signals in its other threads.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ASK_TO_STOP)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
