"""Standard output and standard error that never end a command: a reader that left, a full disk, a closed terminal."""

import contextlib
import errno
import io
import os
import select
import sys
from typing import Any

from data_pipeline.errors import DataError

PATIENCE_S = 5.0
"""How long a non-blocking descriptor whose reader is slow is waited for before a piece of output is dropped."""


class Unfailing(io.RawIOBase):
    """Writes to a file descriptor. What it does not take is dropped, and why is kept in `refused`."""

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
        """-> the bytes that are dealt with: never fewer than one, so that the buffer above makes progress."""
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
    """Replace sys.stdout and sys.stderr by streams that do not raise, unless another program put its own there.

    A character that their encoding lacks is written as an escape. Descriptors 0 to 2 that are closed are opened onto
    /dev/null first: the next file to be opened would otherwise receive what is printed.
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

    An escape in the place of a letter would change what the job runs.
    """
    sys.stdout.flush()
    sys.stdout.buffer.write(text.encode("utf-8", "surrogateescape"))
    sys.stdout.flush()


def finish_output(code: int, needed: bool) -> int:
    """Flush both streams -> the exit code: 74 for 0 where standard output is `needed` and did not arrive.

    A reader that closed its pipe, such as `head`, has what it wanted.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    refused = raw.refused if isinstance(raw, Unfailing) else None
    if code or not needed or refused is None or refused.errno == errno.EPIPE:
        return code
    sys.stderr.write(f"error: standard output: {refused.strerror}; make room, then give the command again\n")
    sys.stderr.flush()
    return DataError.exit_code
