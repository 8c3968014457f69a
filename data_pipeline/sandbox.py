"""Decode images in a child process, so that a decoder that crashes costs one image, never the build.

A worker keeps one such process. Its memory is limited, and an image may use CPU_SECONDS of its processor time (not of
wall time: a busy machine changes no outcome). If it dies of a fault, the image is tried once more in a fresh process,
as an earlier image may have damaged the memory, and rejected if that dies of a fault too. If it is killed from outside,
the image is tried again, as that says nothing about the image.

Messages over its two pipes are the two lengths, then JSON, then bytes; nothing is unpickled.
"""

import atexit
import contextlib
import json
import os
import resource
import signal
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from data_pipeline.config import ImageRules
from data_pipeline.errors import NodeFault
from data_pipeline.images import PreparedImage, Reject, check_side, decode, store

CPU_SECONDS = 10.0
MEMORY_BYTES = 2 * 1024**3
KILLED_AT_MOST = 5
LETHAL = ("decoder_crash", "decoder_timeout")
"""Reject reasons of lethal images, which outside of a sandbox end the process that decodes them."""

_LENGTHS = struct.Struct("<II")
_FAULTS = {signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL}


@dataclass(frozen=True)
class Looked:
    """A decoded image: as it is stored (no bytes if it was only checked) and, if requested, its signatures.

    phash: its perceptual hash, None for a plain image. colours: its colour signature, in hex.
    """

    prepared: PreparedImage
    phash: int | None
    colours: str | None = None


class SandboxDecoder:
    """Decodes and prepares images by `rules`, in a child process that is started on demand.

    hashed: also compute perceptual hashes and colour signatures. stored: make the files to be stored, else only check.
    cpu_s: processor time per image, CPU_SECONDS by default.
    """

    def __init__(
        self, rules: ImageRules, hashed: bool = False, stored: bool = True, cpu_s: float | None = None
    ) -> None:
        orders = {"rules": rules.model_dump(mode="json"), "hashed": hashed, "stored": stored, "cpu_s": cpu_s}
        self._orders = json.dumps(orders).encode()
        self._child: subprocess.Popen[bytes] | None = None

    def look(self, data: bytes) -> Looked:
        """Decode an image. Raises Reject (also decoder_crash, decoder_timeout), NodeFault if killed too often."""
        faults = kills = 0
        while True:
            answer = self._ask(data)
            if answer is not None:
                return _unpacked(*answer, data)
            ended = -self._ended()
            if ended == signal.SIGPROF:
                raise Reject("decoder_timeout", "exceeded the CPU time limit of an image")
            faults += ended in _FAULTS
            kills += ended not in _FAULTS
            if faults == 2:
                raise Reject("decoder_crash", signal.Signals(ended).name)
            if kills > KILLED_AT_MOST:
                raise NodeFault(f"the decoding process ended {kills} times by {ended}; check this node's memory")

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            self._child.kill()
            self._ended()

    @property
    def pid(self) -> int:
        """Process id of the child, which is started if it does not run."""
        return self._started().pid

    def _ask(self, data: bytes) -> tuple[dict[str, Any], bytes] | None:
        """Send an image and return the answer; None if the child died."""
        child = self._started()
        try:
            _send(cast(BinaryIO, child.stdin), {}, data)
            return _receive(cast(BinaryIO, child.stdout))
        except BrokenPipeError:
            return None

    def _started(self) -> "subprocess.Popen[bytes]":
        if self._child is None:
            root = str(Path(__file__).resolve().parents[1])
            path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
            self._child = subprocess.Popen(
                [sys.executable, "-m", "data_pipeline.sandbox"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            )
            with contextlib.suppress(BrokenPipeError):
                _send(cast(BinaryIO, self._child.stdin), json.loads(self._orders), b"")
        return self._child

    def _ended(self) -> int:
        """Return the exit code of the child, which has ended; the next image starts another."""
        assert self._child is not None
        child, self._child = self._child, None
        for pipe in (child.stdin, child.stdout):
            with contextlib.suppress(OSError):
                cast(BinaryIO, pipe).close()
        return child.wait()


_DECODERS: dict[bytes, SandboxDecoder] = {}


def decoder(rules: ImageRules, hashed: bool = False, stored: bool = True) -> SandboxDecoder:
    """Return this process's decoder for these settings, kept from shard to shard; one for other settings is closed."""
    made = SandboxDecoder(rules, hashed, stored)
    if made._orders not in _DECODERS:
        close_decoders()
        _DECODERS[made._orders] = made
    return _DECODERS[made._orders]


@atexit.register
def close_decoders() -> None:
    """End the children of this process."""
    while _DECODERS:
        _DECODERS.popitem()[1].close()


# ------------------------------------------------------------------------------------------------ the child


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer image after image until the parent closes the pipe or is gone."""
    orders, _ = _receive(requests) or ({}, b"")
    rules = ImageRules.model_validate(orders["rules"])
    cpu_s = orders["cpu_s"] or CPU_SECONDS
    while (request := _receive(requests)) is not None:
        signal.setitimer(signal.ITIMER_PROF, cpu_s)
        try:
            looked = _look(request[1], rules, orders["hashed"], orders["stored"])
        except Reject as reject:
            _send(answers, {"reason": reject.reason, "detail": reject.detail}, b"")
            continue
        except Exception as error:  # scaling and storing also fail on unexpected shapes
            reason = "too_much_memory" if isinstance(error, MemoryError) or "Insufficient" in str(error) else "corrupt"
            _send(answers, {"reason": reason, "detail": f"{type(error).__name__}: {error}"[:200]}, b"")
            continue
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        same = looked.prepared.data is request[1]
        tree = {"prepared": looked.prepared._asdict() | {"data": ""}, "same": same}
        tree |= {"phash": looked.phash, "colours": looked.colours}
        _send(answers, tree, b"" if same else looked.prepared.data)


def _look(data: bytes, rules: ImageRules, hashed: bool, stored: bool) -> Looked:
    from data_pipeline.signatures import colour_signature, perceptual_hash

    decoded = decode(data, rules.max_pixels, rules if rules.decode == "scaled" else None)
    phash = perceptual_hash(decoded.pixels) if hashed else None
    colours = None if phash is None else colour_signature(decoded.pixels).hex()
    if stored:
        return Looked(store(data, decoded, rules), phash, colours)
    check_side(decoded, rules)
    shape = (decoded.width, decoded.height)
    return Looked(PreparedImage(b"", "", *shape, *shape, decoded.frames), phash, colours)


def _unpacked(tree: dict[str, Any], data: bytes, asked: bytes) -> Looked:
    if "reason" in tree:
        raise Reject(tree["reason"], tree["detail"])
    prepared = PreparedImage(**tree["prepared"])._replace(data=asked if tree["same"] else data)
    return Looked(prepared, tree["phash"], tree["colours"])


def _send(pipe: BinaryIO, tree: dict[str, Any], data: bytes) -> None:
    text = json.dumps(tree).encode()
    pipe.write(_LENGTHS.pack(len(text), len(data)))
    pipe.write(text)
    pipe.write(data)
    pipe.flush()


def _receive(pipe: BinaryIO) -> tuple[dict[str, Any], bytes] | None:
    """Receive a message; None at the end of the pipe, even in the middle of a message."""
    head = pipe.read(_LENGTHS.size)
    if len(head) < _LENGTHS.size:
        return None
    text_bytes, data_bytes = _LENGTHS.unpack(head)
    body = pipe.read(text_bytes + data_bytes)
    if len(body) < text_bytes + data_bytes:
        return None
    return json.loads(body[:text_bytes]), body[text_bytes:]


def _main() -> None:
    import cv2

    cv2.setNumThreads(1)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when this ends
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    with contextlib.suppress(BrokenPipeError):
        serve(sys.stdin.buffer, sys.stdout.buffer)


if __name__ == "__main__":
    _main()
