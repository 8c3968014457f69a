"""Faults of checkpoint storage: a full disk, a failing proxy before S3, a damaged shard."""

import contextlib
import errno
import os
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

import psutil

from data_pipeline.errors import ConfigError, NodeFault
from data_pipeline.storage import open_storage
from launchers.chaos import plan, proxy
from launchers.chaos.attempt import PATIENCE_S, Attempt
from launchers.chaos.plan import Fault, Strike, When
from launchers.chaos.points import POLL_S, SHARD, FolderPoints, Points
from pretrain.checkpoint.catalog import committed

MET = 6
"""Number of requests that one S3 fault affects; few enough for a run to survive it by retries."""
SLOW_S = 0.7
SPARE = 3
"""Number of checkpoints that fit on the small disk in addition to those that the reference kept."""
SLACK = 4 << 20
ENDPOINT = "AWS_ENDPOINT_URL"
NOT_COMMITTED = re.compile(r"step-(\d+)\.attempt-\d+ was not committed")
REQUESTS: dict[When, re.Pattern[str]] = {
    "load": re.compile(r"GET \S+/r\d+\S*\.safetensors"),
    "shard": re.compile(r"PUT \S+/r\d+\S*\.safetensors"),
    "commit": re.compile(r"PUT \S+/MANIFEST\.json"),
    "retention": re.compile(r"DELETE \S+/step-\S+"),
}
DEALT: dict[Fault, proxy.Fault] = {
    "503": ("503", 0), "refuse": ("refuse", 0), "slow": ("delay", SLOW_S), "torn": ("torn", 0.5),
}  # fmt: skip


class Ground(Protocol):
    """Storage of a struck run's checkpoints, with fault injection."""

    faults: Sequence[Fault]
    """Faults that can be injected here."""
    points: Points
    environment: dict[str, str]

    def strike(self, fault: Fault, attempt: Attempt) -> list[int]:
        """Inject a fault, wait until the run has met it, and remove it. Returns the steps whose saves failed."""
        ...

    def close(self) -> None:
        """Remove mounts and proxies; checkpoints remain as plain files."""
        ...


# -------------------------------------------------------------------------------------------------- a folder


class FaultyFolder:
    """A local folder; on its own file system, which can be filled to the last byte, if this user may mount one."""

    def __init__(self, root: str, world: int, model: str = "") -> None:
        """model: checkpoint folder of the reference, which determines the file system's size; empty: do not mount."""
        self.root = Path(root)
        self.points: Points = FolderPoints(root, world)
        self.environment: dict[str, str] = {}
        sizes = _sizes(Path(model)) if model else []
        self._mounted = bool(sizes) and self._mount(sum(sizes) + SPARE * max(sizes) + SLACK)
        self.faults: Sequence[Fault] = plan.FAULTS_OF_DISK if self._mounted else ()

    def strike(self, fault: Fault, attempt: Attempt) -> list[int]:
        """Keep the disk full until a save has failed. Retention frees no space before a save is done."""
        assert fault == "full"
        attempt.said()  # discard earlier log lines
        ballast, failed = self.root / ".ballast", list[int]()
        try:
            while not failed and not attempt.done:
                _fill(ballast)
                failed = _failed(attempt)
                if attempt.stuck:
                    raise NodeFault(f"{self.root} is full, no step for {PATIENCE_S:g} s, see {attempt.log}")
                time.sleep(POLL_S)
        finally:
            ballast.unlink(missing_ok=True)
        return failed or _failed(attempt)

    def close(self) -> None:
        if self._mounted:
            aside = self.root.with_name(f"{self.root.name}.kept")
            shutil.copytree(self.root, aside)
            unmount(self.root)
            self.root.rmdir()
            aside.rename(self.root)
            self._mounted = False

    def _mount(self, size: int) -> bool:
        """Mount a tmpfs of `size` bytes, at most a quarter of available memory. Returns whether it is mounted."""
        if os.geteuid() != 0 or size > psutil.virtual_memory().available // 4:
            return False
        self.root.mkdir(parents=True, exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tessera-chaos", str(self.root)]
        return subprocess.run(command, capture_output=True).returncode == 0


def unmount(root: Path) -> None:
    """Unmount `root` if it is a mount point, also one left by an earlier campaign."""
    if root.is_mount():
        subprocess.run(["umount", "-l", str(root)], check=True, capture_output=True)


def _sizes(root: Path) -> list[int]:
    """Return the size of each checkpoint, in bytes."""
    folders = [folder for folder in root.iterdir() if folder.is_dir()]
    return [sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) for folder in folders]


def _fill(ballast: Path) -> None:
    """Write until the disk is full to the last byte."""
    with ballast.open("ab", buffering=0) as file:
        for piece in (1 << 20, 1 << 12, 1):
            try:
                while file.write(b"\0" * piece) == piece:
                    pass
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise


def _failed(attempt: Attempt) -> list[int]:
    """Return the steps of saves that the run's log reports as not committed."""
    return [int(match[1]) for line in attempt.said() if (match := NOT_COMMITTED.search(line))]


# -------------------------------------------------------------------------------------------------------- S3


class Gate:
    """A proxy between a run and its S3 server, whose endpoint must be plain http. Raises ConfigError otherwise."""

    faults: Sequence[Fault] = plan.FAULTS_OF_S3

    def __init__(self) -> None:
        address = urlsplit(os.environ.get(ENDPOINT, ""))
        if address.scheme != "http" or not address.hostname:
            raise ConfigError(
                f"{ENDPOINT}={os.environ.get(ENDPOINT, '')!r}: a campaign injects S3 faults through a proxy, which "
                "needs a plain http endpoint; set http://host:port, or keep checkpoints in a folder"
            )
        self.points: Points = self
        self._proxy = proxy.FaultProxy(address.port or 80, self._happens, address.hostname)
        self.environment = {ENDPOINT: f"http://127.0.0.1:{self._proxy.port}"}
        self._dealt: proxy.Fault = proxy.CLEAN
        self._left = 0
        self._expected: When | None = None
        self._held = False

    def strike(self, fault: Fault, attempt: Attempt) -> list[int]:
        """Inject the fault into the next MET requests; torn uploads affect shard uploads only, not verification."""
        attempt.said()  # discard earlier log lines
        self._dealt, self._left = DEALT[fault], MET
        while self._left and not attempt.done:
            if attempt.stuck:
                raise NodeFault(f"fault {fault} on S3: no step for {PATIENCE_S:g} s, see {attempt.log}")
            time.sleep(POLL_S)
        self._left = 0
        return _failed(attempt)

    def expect(self, point: When, attempt: Attempt) -> None:
        self._held, self._expected = False, point
        self._proxy.hold()

    def reached(self) -> bool:
        return self._held

    def go_on(self) -> None:
        self._expected = None
        self._proxy.release()

    def close(self) -> None:
        self._proxy.close()

    def _happens(self, number: int, line: str) -> proxy.Fault:
        """Return the fault of a request; the proxy calls this from one thread at a time."""
        if self._expected and REQUESTS[self._expected].match(line):
            point, self._expected, self._held = self._expected, None, True
            if point == "shard":
                return ("pause", 0.5)
            return ("hold" if number % 2 else "late", 0)
        if self._left and (self._dealt[0] != "torn" or REQUESTS["shard"].match(line)):
            self._left -= 1
            return self._dealt
        return proxy.CLEAN


# -------------------------------------------------------------------------------------------------- damage


def damage(root: str, strike: Strike, spared: set[str]) -> str:
    """Truncate a shard of the newest checkpoint, or flip one bit, if another whole checkpoint remains to resume from.

    spared: names of checkpoints damaged before. Returns STEP_FOLDER/FILE of the shard; empty if nothing was damaged.
    """
    whole = [saved for saved in committed(root) if saved.name not in spared]
    if len(whole) < 2:
        return ""
    newest = whole[-1]
    shards = [name for name in newest.storage.list() if SHARD.fullmatch(name)]
    shard = shards[strike.rank % len(shards)]
    data = bytearray(newest.storage.get(shard))
    at = int(strike.after * (len(data) - 1))
    if strike.damage == "cut":
        data = data[:at]
    else:
        data[at] ^= 1
    newest.storage.replace(shard, bytes(data))
    return f"{newest.name}/{shard}"


def ground(root: str, world: int, model: str) -> Ground:
    """Open the storage of a run with its checkpoints in `root`, for fault injection."""
    return Gate() if root.startswith("s3://") else FaultyFolder(root, world, model)


def empty(root: str) -> None:
    """Remove all that an earlier campaign left in `root`."""
    if not root.startswith("s3://"):
        unmount(Path(root))
    with contextlib.suppress(FileNotFoundError):
        open_storage(root).remove_all()
