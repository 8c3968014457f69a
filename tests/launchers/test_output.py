"""Output that is refused ends no command and hides no lost result; on real descriptors and in real runs."""

import contextlib
import errno
import io
import json
import os
import pty
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from launchers.arguments import emit
from launchers.output import Unfailing, finish_output
from tests.pretrain.commands import Material, command, electra, environment, recipe, steps_of, vqgan
from tests.pretrain.processes import ROOT

HELP = command("--help")


def test_what_a_descriptor_refuses_is_dropped_and_remembered() -> None:
    reader, writer = os.pipe()
    raw = Unfailing(writer)
    stream = io.TextIOWrapper(io.BufferedWriter(raw), encoding="ascii", errors="backslashreplace")
    print("█ to the end", file=stream, flush=True)
    assert os.read(reader, 100) == b"\\u2588 to the end\n" and raw.refused is None
    os.close(reader)
    for _ in range(3):
        print("x" * 100_000, file=stream, flush=True)
    assert raw.refused is not None and raw.refused.errno == errno.EPIPE


def test_a_reader_that_stands_still_costs_the_piece_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launchers.output.PATIENCE_S", 0.05)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    stream = io.TextIOWrapper(io.BufferedWriter(Unfailing(writer)))
    print("x" * 1_000_000, file=stream, flush=True)
    assert len(os.read(reader, 1_000_000)) >= 4096
    print("again", file=stream, flush=True)
    os.close(reader)
    os.close(writer)


def test_a_slow_reader_that_takes_everything_costs_nothing() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    raw, got = Unfailing(writer), bytearray()

    def read() -> None:
        while data := os.read(reader, 1024):
            got.extend(data)

    slow = threading.Timer(0.1, read)
    slow.start()
    stream = io.TextIOWrapper(io.BufferedWriter(raw))
    print("x" * 300_000, file=stream, flush=True)
    os.close(writer)
    slow.join(60)
    assert len(got) == 300_001 and raw.refused is None


@pytest.mark.parametrize(
    ("refused", "code", "needed", "expected"),
    [
        (errno.ENOSPC, 0, True, 74),
        (errno.EIO, 0, True, 74),
        (errno.ENOSPC, 64, True, 64),
        (errno.ENOSPC, 0, False, 0),
        (errno.EPIPE, 0, True, 0),
        (None, 0, True, 0),
    ],
)
def test_a_lost_result_is_an_error_and_a_lost_progress_line_is_not(
    refused: int | None, code: int, needed: bool, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = Unfailing(os.open(os.devnull, os.O_WRONLY))
    raw.refused = OSError(refused, os.strerror(refused)) if refused else None
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BufferedWriter(raw)))
    assert finish_output(code, needed) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shell", "expected"),
    [("> /dev/full", 74), ("| true", 0), (">&-", 0), ("<&- >&- 2>&-", 0), ("> /dev/full 2>&1", 74)],
)
def test_a_command_whose_output_is_refused_ends_without_a_traceback(shell: str, expected: int) -> None:
    line = f"set -o pipefail; {' '.join(HELP)} {shell}"
    done = subprocess.run(["bash", "-c", line], env=environment(), text=True, capture_output=True, timeout=120)
    assert (done.returncode, "Traceback" in done.stderr) == (expected, False), done.stderr


# ------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.slow
@pytest.mark.real
def test_a_run_whose_reader_left_and_whose_encoding_lacks_the_bar_ends_well(material: Material, tmp_path: Path) -> None:
    tree = vqgan(material, tmp_path / "run")
    tree["train"] |= {"steps": 4, "log_every_steps": 1}
    path = recipe(tree, tmp_path / "run.yaml")
    reader, writer = os.pipe()
    os.close(reader)
    environ = environment(PYTHONIOENCODING="ascii", NO_COLOR="1", COLUMNS="1", TERM="dumb")
    log = (tmp_path / "log").open("w")
    done = subprocess.run(command("train", path), env=environ, stdout=writer, stderr=log, timeout=200)
    assert done.returncode == 0, (tmp_path / "log").read_text()[-3000:]
    assert max(steps_of(tmp_path / "run")) == 4 and (tmp_path / "run/checkpoints").is_dir()


@pytest.mark.slow
@pytest.mark.real
def test_a_closed_terminal_asks_for_a_save(material: Material, tmp_path: Path) -> None:
    """The launcher leads a session on a real terminal, which hangs up: SIGHUP, and every write fails with EIO."""
    tree = vqgan(material, tmp_path / "run")
    tree["train"] |= {"steps": 100_000, "log_every_steps": 1, "checkpoint_every_steps": 100_000}
    argv = command("launch", "local", recipe(tree, tmp_path / "run.yaml"), "--procs-per-node", "1")
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(argv[0], argv, environment())
    said, deadline = b"", time.monotonic() + 250
    with contextlib.suppress(OSError):
        while b" 3/100000 " not in said:
            assert time.monotonic() < deadline, said[-3000:]
            said += os.read(terminal, 4096)
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 75, said[-3000:]
    saved = [path.name for path in (tmp_path / "run/checkpoints").glob("step-*/MANIFEST.json")]
    assert saved, said[-3000:]


IMAGE = {"kubernetes": {"image": "tessera:1", "claims": {"work": "/work"}}}
LETTERS = "é字 😀 'q"
ASCII = [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}]


@pytest.mark.slow
@pytest.mark.parametrize("place", ["local", "slurm", "kubernetes"])
@pytest.mark.parametrize("locale", ASCII, ids=lambda locale: next(iter(locale)))
def test_a_dry_run_prints_the_same_program_under_every_locale(
    place: str, locale: dict[str, str], tmp_path: Path
) -> None:
    tree = electra(Material(Path("data"), Path("vocab")), Path("runs") / LETTERS, checkpoints=f"s3://bucket/{LETTERS}")
    config = recipe(tree, tmp_path / "run.yaml")
    cluster = recipe({"kind": place, "env": {"NAME": LETTERS}, **IMAGE.get(place, {})}, tmp_path / "cluster.yaml")
    words = ["launch", place, str(config), "--cluster", str(cluster), "--dry-run"]
    port = ["--master-port", "29500"] if place == "local" else []
    plain, bare = (
        subprocess.run(command(*words, *port), env=environment(**more), cwd=ROOT, capture_output=True, timeout=120)
        for more in ({"PYTHONUTF8": "1"}, locale)
    )
    assert (plain.returncode, bare.returncode) == (0, 0), bare.stderr
    assert plain.stdout == bare.stdout and (place == "kubernetes" or "é字 😀".encode() in bare.stdout), bare.stdout


def test_json_stays_json_where_the_encoding_lacks_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding="ascii", errors="backslashreplace"))
    emit({"prompt": LETTERS}, as_json=True)
    sys.stdout.flush()
    assert json.loads(raw.getvalue()) == {"prompt": LETTERS}
