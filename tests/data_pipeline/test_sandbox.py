"""Decoding apart: a decoder's death costs one image, a kill from outside costs none."""

import json
import os
import resource
import signal
import tarfile
import time

import pytest

from data_pipeline import sandbox
from data_pipeline.config import ImageRules
from data_pipeline.images import Reject, prepare

# stands in for a decoder with a fault: what an image named so makes the child do to itself
FAULTY = """
import os, resource, signal, sys
from data_pipeline import sandbox
look = sandbox._look
def faulty(data, *rest):
    if data.startswith(b"signal "):
        os.kill(os.getpid(), int(data.split()[1]))
    if data.startswith(b"once "):
        path = data.split()[1].decode()
        if not os.path.exists(path):
            open(path, "w").close()
            os.kill(os.getpid(), int(data.split()[2]))
        data = open(path + ".png", "rb").read()
    if data == b"spin":
        while True: pass
    if data == b"eat":
        bytearray(8 * 1024**3)
    return look(data, *rest)
sandbox._look = faulty
sandbox.CPU_SECONDS = 0.5
sandbox._main()
"""


@pytest.fixture
def decoder(monkeypatch):
    made = sandbox.SandboxDecoder(ImageRules(), hashed=True)
    yield made
    made.close()


@pytest.fixture
def faulty(decoder, monkeypatch):
    popen = sandbox.subprocess.Popen
    monkeypatch.setattr(
        sandbox.subprocess, "Popen", lambda command, **options: popen([command[0], "-c", FAULTY], **options)
    )
    return decoder


def test_the_child_gives_what_the_functions_give(decoder, make_png):
    for number in range(3):
        assert decoder.look(make_png(number)).prepared == prepare(make_png(number), ImageRules())
    with pytest.raises(Reject, match="not_an_image"):
        decoder.look(b"<html>")
    with pytest.raises(Reject, match="empty_file"):
        decoder.look(b"")


@pytest.mark.slow
@pytest.mark.parametrize("fault", [signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE])
def test_a_crash_of_the_decoder_costs_that_image_only(faulty, make_png, fault):
    with pytest.raises(Reject, match=f"decoder_crash: {fault.name}"):
        faulty.look(b"signal %d" % fault)
    assert faulty.look(make_png()).prepared.data == make_png()


@pytest.mark.slow
def test_an_image_that_does_not_end_is_rejected_by_processor_time(faulty, make_png, monkeypatch):
    monkeypatch.setattr(sandbox, "CPU_SECONDS", 0.5)
    start = time.monotonic()
    with pytest.raises(Reject, match="decoder_timeout"):
        faulty.look(b"spin")
    assert time.monotonic() - start < 120
    assert faulty.look(make_png()).prepared.data == make_png()


def test_an_image_that_wants_all_memory_is_rejected(faulty, make_png):
    with pytest.raises(Reject, match="too_much_memory"):
        faulty.look(b"eat")
    assert faulty.look(make_png()).prepared.data == make_png()


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_a_child_that_dies_once_costs_nothing(faulty, tmp_path, make_png, end):
    (tmp_path / "x.png").write_bytes(make_png())
    looked = faulty.look(f"once {tmp_path}/x {int(end)}".encode())
    assert (looked.prepared.width, looked.prepared.height) == (16, 16)


@pytest.mark.slow
def test_a_child_killed_between_two_images_costs_nothing(decoder, make_png):
    decoder.look(make_png())
    os.kill(decoder.pid, signal.SIGKILL)
    assert decoder.look(make_png(1)).prepared.data == make_png(1)


@pytest.mark.slow
def test_looking_only_says_what_storing_would(make_png):
    looks, stores = (sandbox.SandboxDecoder(ImageRules(min_side=16), stored=stored) for stored in (False, True))
    for data in (make_png(), make_png(1, 15), b"x", make_png(2)[:200]):
        outcomes = []
        for made in (looks, stores):
            try:
                outcomes.append(made.look(data).prepared.source_width)
            except Reject as reject:
                outcomes.append(str(reject))
        assert outcomes[0] == outcomes[1]
    looks.close(), stores.close()


def outcome(decoder, data):
    try:
        return "stored" if decoder.look(data).prepared.data else ""
    except Reject as reject:
        return f"reject {reject.reason}"


@pytest.mark.slow
def test_every_nasty_image_ends_as_its_index_says_in_bounded_time_and_memory(shared):
    folder = shared / "data/nasty-images"
    cases = [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]
    decoder, wrong = sandbox.SandboxDecoder(ImageRules(mode="center_crop", size=64, format="jpeg"), hashed=True), []
    with tarfile.open(folder / "images.tar") as tar:
        for case in cases:
            start = time.monotonic()
            found = outcome(decoder, tar.extractfile(case["file"]).read())
            acceptable = {"reject" if kind == "reject" else "stored" for kind in case["acceptable"]}
            if time.monotonic() - start > 60 or found.split()[0] not in acceptable:
                wrong.append((case["file"], found, case["acceptable"]))
    decoder.close()
    assert len(cases) >= 117 and wrong == []
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 2 * 1024**2  # KiB
