"""Output streams that never fail a command: not by a reader that exited, a full disk or a closed terminal."""

import contextlib
import errno
import io
import os
import select
import sys
from typing import Any

from data_pipeline.errors import DataError

PATIENCE_S = 5.0
"""Seconds to wait for the slow reader of a non-blocking descriptor before a piece of output is dropped."""


class Unfailing(io.RawIOBase):
    """Raw writer to a file descriptor. Output that fails is dropped; the error is kept in `refused`."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.refused: OSError | None = None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.descriptor

    def isatty(self) -> bool:
        return os.isatty(self.descriptor)

    def write(self, data: Any) -> int:
        """Return the bytes handled, written or dropped: at least one, so that the buffer above makes progress."""
        for _ in range(2):
            try:
                return os.write(self.descriptor, data)
            except BlockingIOError as error:
                refused: OSError = error
                select.select([], [self.descriptor], [], PATIENCE_S)
            except OSError as error:
                refused = error
                break
        self.refused = refused
        return memoryview(data).nbytes


def protect_output() -> None:
    """Replace sys.stdout and sys.stderr by streams that do not raise, unless another program has replaced them.

    A character that their encoding lacks is written as an escape. Closed descriptors 0 to 2 are first opened onto
    /dev/null; otherwise the next file to be opened would receive what is printed.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free descriptor, this one
    for descriptor, name in enumerate(("stdout", "stderr"), 1):
        if getattr(sys, name) is getattr(sys, f"__{name}__"):
            setattr(sys, name, _protected(getattr(sys, name), descriptor))


def _protected(stream: Any, descriptor: int) -> io.TextIOWrapper:
    if stream is not None:
        with contextlib.suppress(OSError):
            stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(Unfailing(descriptor)),
        encoding=getattr(stream, "encoding", None) or "utf-8",
        errors="backslashreplace",
        line_buffering=getattr(stream, "line_buffering", False),
        write_through=getattr(stream, "write_through", False),
    )


def print_program(text: str) -> None:
    """Print a rendered job as it would be submitted: in UTF-8, whatever the encoding of standard output.

    An escape in place of a character would change what the job runs.
    """
    sys.stdout.flush()
    sys.stdout.buffer.write(text.encode("utf-8", "surrogateescape"))
    sys.stdout.flush()


def finish_output(code: int, needed: bool) -> int:
    """Flush both streams; return the exit code: 74 instead of 0 if standard output is `needed` but was lost.

    Output refused by a closed pipe does not count as lost: its reader, such as `head`, has what it wanted.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    refused = raw.refused if isinstance(raw, Unfailing) else None
    if code or not needed or refused is None or refused.errno == errno.EPIPE:
        return code
    sys.stderr.write(f"error: standard output: {refused.strerror}; free space, then run the command again\n")
    sys.stderr.flush()
    return DataError.exit_code
