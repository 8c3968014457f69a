"""File systems of their own: small ones that fill up and ones that take nothing, as the operating system has them."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def mounted(folder: Path, kilobytes: int) -> Iterator[Path]:
    """A tmpfs of `kilobytes` at the new `folder`. Skips the test where this user may not mount; in CI it fails."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    made = subprocess.run(command, capture_output=True, timeout=10)
    if made.returncode:
        message = f"mounting a tmpfs needs root ({made.stderr.decode().strip()}): run the tests as root"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(message)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True, timeout=10)


def make_read_only(folder: Path) -> None:
    """Mount again what `mounted` made, for reading alone: root has no rights on it either."""
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True, timeout=10)


def fill_up(folder: Path, leave: int) -> None:
    """Write a file that leaves `leave` bytes of room."""
    left = os.statvfs(folder)
    (folder / "filling").write_bytes(bytes(left.f_bavail * left.f_frsize - leave))
