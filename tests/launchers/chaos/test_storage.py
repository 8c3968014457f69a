"""Strikes of the storage: a file system that is really full, requests of a real S3 gateway that are torn or held."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.storage import open_storage
from launchers.chaos.plan import FAULTS_OF_S3, Damage, Fault, Strike, When
from launchers.chaos.storage import MET, FaultyFolder, Gate, damage
from pretrain.checkpoint.catalog import committed
from tests.pretrain.checkpoint.simulated import model_of, ranks_of, save, write

DEADLINE_S = 60.0


class Said:
    """Stands where an attempt does: alive, and with what its log says."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.log = Path("log")
        self.done = self.stuck = False
        self.asked = threading.Event()

    def said(self) -> list[str]:
        self.asked.set()
        return [self.lines.pop(0) for _ in range(len(self.lines))]


# ---------------------------------------------------------------------------------------------- a full disk


@pytest.fixture
def small(tmp_path: Path) -> Iterator[FaultyFolder]:
    """A folder that can be filled, with room for some checkpoints of the tiny model."""
    write(tmp_path / "undisturbed", 4)
    folder = FaultyFolder(str(tmp_path / "checkpoints"), 2, str(tmp_path / "undisturbed" / "checkpoints"))
    if not folder.faults:
        pytest.skip("a file system can only be mounted as root")
    yield folder
    folder.close()


@pytest.mark.slow
@pytest.mark.real
def test_a_disk_is_full_until_a_save_failed_by_it_and_what_was_saved_outlives_it(small: FaultyFolder) -> None:
    said: Any = Said()
    ranks = ranks_of(small.root, 2)
    save(ranks, 4, model_of(4))

    def run() -> None:
        """A run that tries to save until it fails, as a run does that goes on; it begins when it is looked at."""
        step = 4
        assert said.asked.wait(DEADLINE_S)
        while True:
            step += 4
            try:
                save(ranks, step, model_of(step))
            except DataError as error:
                said.lines.append(f"{small.root}/step-{step:08d}.attempt-0 was not committed: {error}")
                return

    thread = threading.Thread(target=run)
    thread.start()
    failed = small.strike("full", said)
    thread.join(DEADLINE_S)
    assert len(failed) == 1 and not thread.is_alive()
    save(ranks, failed[0] + 4, model_of(3))
    steps = [saved.step for saved in committed(small.root)]
    small.close()
    assert not small.root.is_mount() and [saved.step for saved in committed(small.root)] == steps
    assert steps[0] == 4 and steps[-1] == failed[0] + 4 and failed[0] not in steps
    assert not any(saved.faults() for saved in committed(small.root))


@pytest.mark.parametrize("how", ["cut", "flip"])
def test_a_shard_of_the_newest_checkpoint_is_damaged_if_another_whole_one_stays(how: Damage, tmp_path: Path) -> None:
    strike = Strike("rank", 1, 8, "step", 0.5, how)
    write(tmp_path, 4)
    root = str(tmp_path / "checkpoints")
    assert damage(root, strike, set()) == ""
    write(tmp_path, 8)
    assert damage(root, strike, set()) == "step-00000008.attempt-0/r00001.safetensors"
    assert [bool(saved.faults()) for saved in committed(root)] == [False, True]
    assert damage(root, strike, {"step-00000008.attempt-0"}) == ""


# ------------------------------------------------------------------------------------------------------- S3


def test_an_endpoint_that_no_proxy_can_stand_before_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://s3.example.com")
    with pytest.raises(ConfigError, match="plain http"):
        Gate()


@pytest.fixture
def gate(bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """Before the real gateway; what this process stores goes through it."""
    gate = Gate()
    monkeypatch.setenv("AWS_ENDPOINT_URL", gate.environment["AWS_ENDPOINT_URL"])
    yield gate
    gate.close()


def until(there: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE_S
    while not there():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize("fault", FAULTS_OF_S3)
def test_a_save_outlives_each_fault_of_s3(fault: Fault, gate: Gate, bucket: str) -> None:
    said: Any = Said()
    thread = threading.Thread(target=lambda: gate.strike(fault, said))
    thread.start()
    ranks, step = ranks_of(f"{bucket}/run", 2), 0
    while thread.is_alive():
        step += 4
        save(ranks, step, model_of(step))
    whole = committed(f"{bucket}/run")
    assert [saved.step for saved in whole] == list(range(4, step + 4, 4))
    assert not any(saved.faults() for saved in whole)
    assert sum(gate._proxy.happened[kind] for kind in ("503", "refuse", "delay", "torn")) == MET


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize(("point", "there"), [("shard", 0), ("commit", 2)])
def test_a_save_is_held_at_a_point_until_the_blow_fell(
    point: When, there: int, gate: Gate, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt: Any = Said()
    gate.expect(point, attempt)
    thread = threading.Thread(target=lambda: save(ranks_of(f"{bucket}/run", 2), 4, model_of(4)))
    thread.start()
    until(gate.reached)
    held = open_storage(f"{bucket}/run/step-00000004.attempt-0").list()
    assert sum(name.endswith(".safetensors") for name in held) >= there
    assert point != "shard" or "MANIFEST.json" not in held
    gate.go_on()
    thread.join(DEADLINE_S)
    assert [saved.step for saved in committed(f"{bucket}/run")] == [4]
