"""Errors that are shown to the user, each with the exit code of the command line.

0 done, 64 configuration, 70 node or training fault, 74 storage or data, 75 requeue, 130 interrupted.
An error's text names the value, the rule and the remedy; the command line prints it without a traceback.
"""

import contextlib
import errno
from collections.abc import Iterator


class TesseraError(Exception):
    """Base of every error meant for the user."""

    exit_code = 70


class ConfigError(TesseraError):
    """The configuration is wrong; running it again gives the same error."""

    exit_code = 64


class Overtaken(ConfigError):
    """A later attempt has claimed the run; this one may commit nothing more, and ends without changing the run."""


class NodeFault(TesseraError):
    """A process, device or collective failed; another attempt may succeed.

    blamed: the ranks that caused it, if known.
    """

    exit_code = 70

    def __init__(self, message: str, blamed: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.blamed = blamed


class TrainingFault(TesseraError):
    """Training diverged, identically on every rank; another attempt would diverge again."""

    exit_code = 70


class DataError(TesseraError):
    """Storage or data is missing, damaged or does not match the manifest."""

    exit_code = 74


class Conflict(DataError):
    """An object exists with other contents than this run makes; nothing was overwritten."""


class BadSample(DataError):
    """One sample cannot be used: it does not decode, or lacks what the task needs. Storage is not at fault.

    key: of the sample; reason: one word with underscores, for counting.
    """

    def __init__(self, message: str, key: str = "", reason: str = "unusable_sample") -> None:
        super().__init__(message)
        self.key, self.reason = key, reason


class Interrupted(TesseraError):
    """Ctrl-C ended the command; the text says what was written."""

    exit_code = 130


class Requeue(TesseraError):
    """The run was asked to stop, has saved its state and is to be requeued."""

    exit_code = 75


# ------------------------------------------------------------------------------------ file system errors

FILE_SYSTEM_ERRORS = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE, errno.EACCES, errno.EPERM,
    errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ENAMETOOLONG, errno.ELOOP, errno.EBUSY,
    errno.ENXIO, errno.ETXTBSY, errno.ENOENT,
}  # fmt: skip
"""Errors of the operating system caused by a disk, a path or missing permissions, not by a bug of the program."""


_REMEDIES = (
    ({errno.ENOSPC, errno.EDQUOT, errno.EFBIG}, "free space there, or use another location"),
    ({errno.EACCES, errno.EPERM}, "grant this user access, or use another location"),
    ({errno.EROFS}, "use a writable location"),
    (
        {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ENAMETOOLONG, errno.ELOOP},
        "use another path",
    ),
)


def storage_error(error: OSError, where: object) -> DataError:
    """Return the DataError for an error of the operating system at `where`, with the remedy for its kind."""
    remedy = next((remedy for numbers, remedy in _REMEDIES if error.errno in numbers), "check the storage")
    return DataError(f"{where}: {error.strerror or error}; {remedy}, then run it again")


@contextlib.contextmanager
def storage_errors(where: object) -> Iterator[None]:
    """Raise an OSError of the block as a DataError about `where`."""
    try:
        yield
    except OSError as error:
        raise storage_error(error, where) from None
