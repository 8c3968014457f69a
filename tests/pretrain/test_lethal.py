"""An image that kills its decoder costs one attempt: the next one finds it, replaces it everywhere and remembers it."""

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.errors import BadSample, NodeFault
from data_pipeline.schema import Sample
from data_pipeline.stream.order import order
from data_pipeline.stream.reader import Stream
from pretrain.config import RunConfig
from pretrain.inputs.bad import Ledger, Usable
from pretrain.inputs.feed import Feed
from pretrain.inputs.lethal import (
    Screened,
    image_number,
    known_to_all,
    looking_decoder,
    remember,
    remembered,
    screened,
    search,
)  # fmt: skip
from pretrain.runtime.faults import ENDED, may_have_been_killed, record_fault
from pretrain.runtime.goodput import ATTEMPTS, append_line
from pretrain.tasks.reconstruction import ReconstructionInputs
from tests.pretrain.commands import Material, command, finish, loss_bits, recipe, vqgan
from tests.pretrain.processes import ROOT
from tests.pretrain.test_reading import evaluated
from tests.pretrain.test_reading import ledger as listed

BATCH = 8
PATIENCE_S = 30.0


def ends(material: Material, samples: dict[int, str]) -> dict[str, str]:
    """Variables of processes whose decoder aborts at, or never ends with, the images of these samples."""
    stream = Stream(material.dataset, 0)
    named = {hashlib.sha256(stream.fetch(number).image).hexdigest(): end for number, end in samples.items()}
    path = f"{ROOT / 'tests' / 'pretrain' / 'lethal'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    return {"TESSERA_TEST_LETHAL": json.dumps(named), "PYTHONPATH": path}


@contextlib.contextmanager
def deadly(material: Material, samples: dict[int, str]) -> Iterator[None]:
    """Sandboxes that are started meanwhile have this decoder; this process does not."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ends(material, samples).items():
            patch.setenv(name, value)
        yield


def inputs_of(material: Material) -> Screened:
    config = RunConfig.model_validate(vqgan(material, Path("unused")))
    return Screened(ReconstructionInputs(config, None, None))  # type: ignore[arg-type]


def at(position: int, seed: int = 0) -> int:
    """The sample at a position of the stream of 200 samples."""
    return int(order(np.array([position]), 200, seed)[1][0])


def alone(values: list[int]) -> list[int]:
    return values


class Together:
    """The element-wise maximum over ranks that are threads."""

    def __init__(self, world: int) -> None:
        self.values: list[list[int]] = []
        self.lock, self.barrier = threading.Lock(), threading.Barrier(world, timeout=60)

    def __call__(self, values: list[int]) -> list[int]:
        with self.lock:
            self.values.append(values)
        self.barrier.wait()
        highest = [max(column) for column in zip(*self.values, strict=True)]
        self.barrier.wait()
        with self.lock:
            self.values = []
        self.barrier.wait()
        return highest


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_rank_knows_what_any_of_them_found_and_replaces_it_alike(world: int, material: Material) -> None:
    lethal = {at(19), at(26)}
    maximum = Together(world)
    feeds = [Feed(Stream(material.dataset, 0), inputs_of(material), BATCH, (r, world), 2, 2) for r in range(world)]

    def searched(feed: Feed) -> Screened:
        stream, inputs = feed.preparer.stream, feed.preparer.inputs
        assert isinstance(inputs, Screened)
        search(stream, inputs, feed.prepared_by(16, 0), PATIENCE_S, maximum)
        return inputs

    with deadly(material, dict.fromkeys(lethal, "abort")), ThreadPoolExecutor(world) as pool:
        found = list(pool.map(searched, feeds))
    stream = Stream(material.dataset, 0)
    assert all(inputs.known == {image_number(stream.fetch(number).image) for number in lethal} for inputs in found)
    assert sum(len(inputs.found) for inputs in found) == 2
    replaced = []
    for feed in feeds:
        feed.ledger = Ledger(None, 1.0)
        list(feed.steps(2, 5))
        replaced += feed.ledger.entries
    assert {entry.sample for entry in replaced} == lethal and not {entry.replacement for entry in replaced} & lethal
    assert {entry.position for entry in replaced} == {19, 26}
    assert all("crashes the decoder" in entry.reason for entry in replaced)


def test_the_share_of_each_rank_covers_what_is_in_preparation_once() -> None:
    for world in (1, 2, 4):
        feeds = [Feed(None, None, BATCH, (rank, world), 2, 2, workers=3) for rank in range(world)]  # type: ignore[arg-type]
        for least in (0, 99):
            shares = [feed.prepared_by(16, least) for feed in feeds]
            assert len({len(share) for share in shares}) == 1
            covered = sorted(np.concatenate(shares).tolist())
            assert covered == list(range(16, 16 + len(covered))) and covered[-1] >= max(16 + 5 * BATCH, least) - 1


@pytest.mark.slow
def test_a_lethal_image_that_stands_in_for_a_bad_one_is_found_too(material: Material) -> None:
    stream, bad = Stream(material.dataset, 0), at(3)
    plain = Usable(stream, lambda samples: refuse(samples, {bad}))
    plain.checked(plain.take(np.array([3])))
    stand_in = plain.replaced[0].replacement
    inputs = inputs_of(material)
    inputs.inputs = lambda samples: refuse(samples, {bad})
    with deadly(material, {stand_in: "abort"}):
        search(stream, inputs, np.arange(BATCH), PATIENCE_S, alone)
    assert inputs.known == {image_number(stream.fetch(stand_in).image)}
    again = Usable(stream, inputs)
    again.checked(again.take(np.array([3])))
    assert again.replaced[0].replacement not in (stand_in, bad)


def refuse(samples: list[Sample], bad: set[int]) -> None:
    if bad & {sample.id for sample in samples}:
        raise BadSample("it is bad")


@pytest.mark.slow
def test_an_image_that_never_ends_is_found_by_its_processor_time(material: Material) -> None:
    inputs, stream = inputs_of(material), Stream(material.dataset, 0)
    with deadly(material, {at(2): "spin"}):
        search(stream, inputs, np.arange(4), 1.0, alone)
    assert [line["key"] for line in inputs.found] == [stream.fetch(at(2)).key]
    assert "decoder_timeout" in inputs.found[0]["reason"]


@pytest.mark.slow
@pytest.mark.parametrize("end", ["kill", "leave"])
def test_an_image_whose_decoder_is_killed_or_leaves_every_time_is_found(end: str, material: Material) -> None:
    inputs, stream = inputs_of(material), Stream(material.dataset, 0)
    with deadly(material, {at(1): end}):
        search(stream, inputs, np.arange(3), PATIENCE_S, alone)
    assert [line["key"] for line in inputs.found] == [stream.fetch(at(1)).key]


def test_a_sandbox_that_dies_of_any_image_is_a_fault_of_the_node(
    material: Material, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = inputs_of(material)
    monkeypatch.setattr("data_pipeline.sandbox.sys.executable", "/bin/false")
    with pytest.raises(NodeFault, match="the decoding process ended"):
        search(Stream(material.dataset, 0), inputs, np.arange(3), PATIENCE_S, alone)
    assert not inputs.known


@pytest.mark.slow
def test_sound_and_merely_damaged_images_are_not_lethal(material: Material) -> None:
    inputs, stream = inputs_of(material), Stream(material.dataset, 0)
    search(stream, inputs, np.arange(8), PATIENCE_S, alone)
    damaged = Sample(0, 0, 0, "damaged", image=b"\x89PNG, but no further")
    with contextlib.closing(looking_decoder(PATIENCE_S)) as decoder:
        looking = Screened(inputs.inputs, (), decoder)
        with pytest.raises(BadSample, match="cannot be decoded"):
            looking([damaged])
    assert not inputs.known and not looking.known


def test_what_is_remembered_is_known_to_all_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert remembered(tmp_path) == set()
    line = {"image": (1 << 63) - 1, "key": "red", "reason": "decoder_crash: SIGABRT"}
    remember(tmp_path, [line, line | {"image": 0}])
    for torn in ({"image": "0"}, {"image": 1 << 63}, {"image": -1}, {"image": None}, {}):
        append_line(tmp_path / "lethal_images.jsonl", torn)
    assert remembered(tmp_path) == {(1 << 63) - 1, 0} and "'red'" in capsys.readouterr().out
    ranks, maximum = [{5, 0}, {9}, set()], Together(3)
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda mine: known_to_all(mine, maximum), ranks)) == [{0, 5, 9}] * 3


def test_only_inputs_that_decode_images_are_screened() -> None:
    def text(samples: list[Sample]) -> None:
        raise AssertionError

    assert screened(text) is text


@pytest.mark.parametrize(
    ("causes", "ended", "killed"),
    [
        ([], False, True),
        (["node"], False, True),
        (["node", "user code"], False, False),
        (["storage"], False, False),
        (["preemption"], True, False),
        ([], True, False),
    ],
)
def test_after_which_end_an_image_is_looked_for(causes: list[Any], ended: bool, killed: bool, tmp_path: Path) -> None:
    assert not may_have_been_killed(tmp_path)  # a new run
    record_fault(tmp_path, "user code", "of an attempt before", 0)
    append_line(tmp_path / ATTEMPTS, {"attempt": 1, "time": 4e9})
    for cause in causes:
        append_line(tmp_path / "faults.jsonl", {"time": 4e9 + 1, "cause": cause, "rank": 0, "why": ""})
    if ended:
        (tmp_path / ENDED).touch()
    assert may_have_been_killed(tmp_path) == killed


# ------------------------------------------------------------------------------------------- whole runs


def launched(material: Material, run: Path, lethal: dict[int, str], procs: int, **data: Any) -> tuple[int, str]:
    tree = vqgan(material, run)
    tree["data"] |= data
    tree["train"] |= {"steps": 8, "sample_every_steps": 4}
    argv = command(
        "launch", "local", recipe(tree, run.with_suffix(".yaml")), "--procs-per-node", str(procs), "--restarts", "1"
    )
    done = finish(argv, **ends(material, lethal))
    return done.returncode, done.stdout


def ledger_of(run: Path) -> set[tuple[Any, ...]]:
    lines = [line for path in run.glob("bad_samples/rank-*.jsonl") for line in path.read_text().splitlines()]
    return {tuple(json.loads(line).values()) for line in lines}


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize(("procs", "workers"), [(2, 0), (1, 1)])
def test_a_run_gets_past_images_that_abort_the_process_as_if_it_had_always_known_them(
    procs: int, workers: int, material: Material, tmp_path: Path
) -> None:
    lethal = {at(42): "abort", at(47): "abort"}  # both of the sixth step
    code, output = launched(material, tmp_path / "run", lethal, procs, workers=workers)
    assert code == 0, output[-3000:]
    assert workers or "was killed by SIGABRT; it crashed while decoding an image" in output
    attempts = (tmp_path / "run" / ATTEMPTS).read_text().splitlines()
    assert len(attempts) == 2 and f"'{Stream(material.dataset, 0).fetch(at(42)).key}'" in output
    assert {entry[2] for entry in ledger_of(tmp_path / "run")} == set(lethal)

    if workers:
        return
    (tmp_path / "knowing").mkdir()
    (tmp_path / "knowing/lethal_images.jsonl").write_bytes((tmp_path / "run/lethal_images.jsonl").read_bytes())
    code, output = launched(material, tmp_path / "knowing", lethal, procs)
    assert code == 0 and len((tmp_path / "knowing" / ATTEMPTS).read_text().splitlines()) == 1, output[-3000:]
    assert loss_bits(tmp_path / "knowing") == loss_bits(tmp_path / "run")
    assert ledger_of(tmp_path / "knowing") == ledger_of(tmp_path / "run")


@pytest.mark.slow
def test_an_evaluation_replaces_a_lethal_image(
    material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with deadly(material, {at(5): "abort"}):
        assert evaluated(vqgan(material, tmp_path / "run"), monkeypatch)
    assert [row["sample"] for row in listed(tmp_path / "run")] == [at(5)]
