"""The words between ranks by tables: a store that only remembers, a clock that only sleeps move, saves that fail."""

import json
import os
import socket
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data_pipeline.errors import DataError, NodeFault, Overtaken, TesseraError
from data_pipeline.storage import open_storage
from pretrain.checkpoint import saver
from pretrain.checkpoint.catalog import Retention, committed, tidy
from pretrain.checkpoint.saver import Abandoned, Checkpoints, Save, from_rank_0, start_attempt
from tests.pretrain.checkpoint.simulated import Part, flip_a_bit, folder_of, mesh_of, ranks_of, save, write


class Clock:
    """Time that moves by its own sleeps alone, and what was slept."""

    def __init__(self) -> None:
        self.now = 100.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept.append(seconds)


class Words:
    """A store whose key is there from its time on."""

    def __init__(self, clock: Clock, held: dict[str, str], after: dict[str, float] | None = None) -> None:
        self.clock, self.held, self.after = clock, held, after or {}
        self.asked: list[list[str]] = []

    def check(self, keys: list[str]) -> bool:
        self.asked.append(keys)
        return all(key in self.held and self.after.get(key, 0.0) <= self.clock.now for key in keys)

    def get(self, key: str) -> bytes:
        return self.held[key].encode()

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [self.get(key) for key in keys]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(saver, "time", made)
    return made


# ---------------------------------------------------------------------------------------------- waiting


def pauses(longest: float, total: float) -> Iterator[float]:
    pause, slept = 0.005, 0.0
    while slept < total:
        yield pause
        slept += pause
        pause = min(2 * pause, longest)


@pytest.mark.parametrize(("pause_s", "longest"), [(0.0, 0.25), (0.1, 0.25), (0.25, 0.25), (1.5, 1.5)])
def test_a_wait_asks_ever_less_often_down_to_its_longest_pause(pause_s: float, longest: float, clock: Clock) -> None:
    store: Any = Words(clock, {"a": "1", "b": "2"}, {"a": 104.0})
    assert saver._wait(store, ["a", "b"], 1000.0, None, pause_s)
    assert clock.slept == pytest.approx(list(pauses(longest, 4.0))) and max(clock.slept) == longest
    assert store.asked == [["a", "b"]] * (len(clock.slept) + 1)


def test_a_wait_that_is_over_its_deadline_or_abandoned_ends(clock: Clock) -> None:
    store: Any = Words(clock, {"a": "1"})
    assert saver._wait(store, ["a"], 0.0, None) and clock.slept == []  # what is there needs no time
    assert not saver._wait(store, ["b"], 99.0, None) and clock.slept == []
    assert not saver._wait(store, ["b"], 100.0, None) and clock.slept == [0.005]  # at the deadline, and once behind it
    ended = threading.Event()
    assert not saver._wait(store, ["b"], 103.0, ended) and 103.0 < clock.now <= 103.25
    ended.set()
    assert saver._wait(store, ["a"], 200.0, ended)
    slept = len(clock.slept)
    with pytest.raises(Abandoned, match="the run ended before all parts were written"):
        saver._wait(store, ["b"], 200.0, ended)
    assert len(clock.slept) == slept


def test_a_word_is_waited_for_by_all_and_told_if_it_does_not_come(clock: Clock) -> None:
    store: Any = Words(clock, {"a": '{"result": [1]}'}, {"a": 130.0})
    assert saver._get(store, "a", 1, 60.0) == {"result": [1]} and max(clock.slept) == 0.25
    with pytest.raises(DataError, match="no report within 3 s"):
        saver._get(store, "b", 1, 3.0)
    began = clock.now
    with pytest.raises(DataError, match="no report within 60 s"):
        saver._get(store, "b", 20_000, 60.0)
    assert max(clock.slept) == 2.0 and 60.0 < clock.now - began <= 62.0  # 20,000 ranks ask 10,000 times a second
    ended = threading.Event()
    ended.set()
    with pytest.raises(Abandoned):
        saver._get(store, "b", 1, 60.0, ended)


@pytest.mark.parametrize("count", [0, 1, 255, 256, 257, 600])
def test_words_are_gathered_in_order_at_most_256_in_a_question(count: int, clock: Clock) -> None:
    keys = [f"k{at}" for at in range(count)]
    store: Any = Words(clock, {key: json.dumps({"result": at}) for at, key in enumerate(keys)})
    assert list(saver._gather(store, keys, 5.0)) == [{"result": at} for at in range(count)]
    assert [key for asked in store.asked for key in asked] == keys and clock.slept == []
    assert [len(asked) for asked in store.asked] == [256] * (count // 256) + [count % 256] * (count % 256 > 0)


def test_those_that_do_not_come_are_none_in_their_place_and_one_deadline_is_for_all(clock: Clock) -> None:
    keys = [f"k{at}" for at in range(600)]
    lost = {"k3", "k255", "k256", "k599"}
    store: Any = Words(clock, {key: json.dumps({"result": key}) for key in keys if key not in lost})
    found = list(saver._gather(store, keys, 5.0))
    assert found == [None if key in lost else {"result": key} for key in keys]
    assert 105.0 < clock.now <= 105.5
    ended = threading.Event()
    ended.set()
    with pytest.raises(Abandoned):
        list(saver._gather(store, keys, 5.0, ended))


# ----------------------------------------------------------------------------------------------- words


def raising(error: BaseException) -> Any:
    def call() -> None:
        raise error

    return call


@pytest.mark.parametrize(
    ("error", "told", "raised"),
    [
        (OSError(28, "No space left"), {"error": "[Errno 28] No space left", "overtaken": False}, DataError),
        (RuntimeError("store"), {"error": "store", "overtaken": False}, DataError),
        (DataError("cut off"), {"error": "cut off", "overtaken": False}, DataError),
        (Overtaken("by 2"), {"error": "by 2", "overtaken": True}, Overtaken),
        (TypeError("ours"), {"error": "TypeError: ours"}, DataError),
        (KeyError("x"), {"error": "KeyError: 'x'"}, DataError),
    ],
)
def test_what_goes_wrong_on_a_rank_is_told_and_raised_where_it_is_heard(
    error: Exception, told: dict[str, Any], raised: type[TesseraError]
) -> None:
    assert saver._outcome(raising(error)) == told
    with pytest.raises(raised) as caught:
        saver._result(told)
    assert str(caught.value) == told["error"] and type(caught.value) is raised


def test_what_goes_right_is_told_too_and_silence_is_an_error() -> None:
    assert saver._outcome(lambda: [1, {"a": None}]) == {"result": [1, {"a": None}]}
    assert saver._result({"result": None}) is None and saver._result({"result": [0]}) == [0]
    with pytest.raises(DataError, match="no report in time"):
        saver._result(None)
    for error in (Abandoned("ended"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            saver._outcome(raising(error))


def test_what_rank_0_finds_every_rank_returns_and_what_it_raises_too() -> None:
    store = torch.distributed.HashStore()
    ranks = [mesh_of(rank, 3, store) for rank in range(3)]
    assert [from_rank_0(mesh, "a", lambda mesh=mesh: {"of": mesh.rank}) for mesh in ranks] == [{"of": 0}] * 3
    for mesh in ranks:
        with pytest.raises(DataError, match="cut off"):
            from_rank_0(mesh, "b", raising(OSError("cut off") if mesh.rank == 0 else AssertionError()))


def test_an_attempt_is_claimed_once_for_all_ranks_and_says_by_whom(tmp_path: Path) -> None:
    for changes, number in ((None, 4), ({"train.steps": 9}, 5)):
        store = torch.distributed.HashStore()
        assert [start_attempt(tmp_path, mesh_of(rank, 2, store), 4, changes) for rank in range(2)] == [number] * 2
        claim = json.loads((tmp_path / f"attempt-{number:05d}.json").read_text())
        assert abs(claim.pop("time") - saver.time.time()) < 600
        assert claim == {"host": socket.gethostname(), "pid": os.getpid(), "world": 2} | (
            {"changes": changes} if changes else {}
        )
    assert len(list(tmp_path.glob("attempt-*"))) == 2


# ----------------------------------------------------------------------------------------------- a save


def begin(checkpoints: Checkpoints, step: int, model: torch.nn.Module | None = None) -> Save:
    mesh = checkpoints.mesh
    part: Any = Part(model or torch.nn.Linear(3, 5), mesh.rank, mesh.world)
    checkpoints.save(part, step, {"step": step})
    assert checkpoints._save is not None
    return checkpoints._save


def test_before_the_first_save_there_is_nothing_to_wait_for(tmp_path: Path) -> None:
    (checkpoints,) = ranks_of(tmp_path, 1)
    assert checkpoints.finish() is None and checkpoints.newest() is None
    checkpoints.close()
    assert (checkpoints.blocked_s, checkpoints.last_save_s, checkpoints.overtaken) == (0.0, 0.0, "")


def test_what_a_save_costs_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Staging takes 3 s and holds training up; writing takes 10 s more, beside it."""
    clock = Clock()
    fake = SimpleNamespace(monotonic=clock.monotonic, sleep=saver.time.sleep)
    monkeypatch.setattr(saver, "time", fake)
    (checkpoints,) = ranks_of(tmp_path, 1)
    stage, write_shard = checkpoints._staging.copy, saver.write_shard
    monkeypatch.setattr(checkpoints._staging, "copy", lambda shard: (clock.sleep(3.0), stage(shard))[1])
    may_write = threading.Event()
    monkeypatch.setattr(
        saver, "write_shard", lambda *given: (may_write.wait(30), clock.sleep(10.0), write_shard(*given))[2]
    )
    for number, step in enumerate((4, 8), 1):
        may_write.clear()
        begin(checkpoints, step)
        assert checkpoints.blocked_s == 3.0 * number
        may_write.set()
        saved = checkpoints.finish()
        assert saved is not None and saved.step == step and checkpoints.last_save_s == 13.0


def test_a_save_is_named_said_and_holds_this(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ranks = ranks_of(tmp_path, 2, attempt=3)
    threads = [begin(checkpoints, 12) for checkpoints in ranks]
    assert [thread.name for thread in threads] == ["save-12"] * 2 and all(thread.daemon for thread in threads)
    (saved,) = {checkpoints.finish() for checkpoints in ranks}
    assert saved is not None and saved.folder == f"{tmp_path}/step-00000012.attempt-3"
    assert capsys.readouterr().out == f"saved {saved.folder}\n"
    manifest = dict(saved.manifest)
    listed = [entry["name"] for entry in manifest.pop("files")]
    assert manifest == {"version": 3, "step": 12, "attempt": 3, "world": 2}
    assert listed == ["r00000.safetensors", "r00001.safetensors", "index.json", "state.json"]
    assert saved.state == {"step": 12, "means": {}} and not saved.faults()
    assert [thread.heard for thread in threads] == [[0, 1], []]


def test_a_word_of_a_failed_save_is_not_taken_for_one_of_the_next_at_the_same_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks, write_shard = ranks_of(tmp_path, 2), saver.write_shard
    monkeypatch.setattr(saver, "write_shard", raising_with(OSError(5, "broken disk")))
    with pytest.raises(DataError, match=r"was not committed: rank 0: .*broken disk; rank 1: .*broken disk; the check"):
        save(ranks, 4, torch.nn.Linear(3, 5))
    monkeypatch.setattr(saver, "write_shard", write_shard)
    for step in (4, 8):
        save(ranks, step, torch.nn.Linear(3, 5))
    assert [saved.step for saved in committed(tmp_path)] == [4, 8]


def raising_with(error: BaseException) -> Any:
    return lambda *_, **__: raising(error)()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_save_whose_thread_dies_of_a_mistake_is_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (checkpoints,) = ranks_of(tmp_path, 1)
    monkeypatch.setattr(type(checkpoints.mesh), "side_store", raising_with(TypeError("ours")))
    begin(checkpoints, 4)
    with pytest.raises(
        DataError, match="was not committed: it ended without a report; the checkpoints before it are unt"
    ):
        checkpoints.finish()


def test_a_save_that_does_not_end_in_time_is_an_error_of_storage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, write_shard = threading.Event(), saver.write_shard
    monkeypatch.setattr(saver, "write_shard", lambda *given: (release.wait(60), write_shard(*given))[1])
    (checkpoints,) = ranks_of(tmp_path, 1)
    thread = begin(checkpoints, 4)
    monkeypatch.setattr(saver, "COMMIT_TIMEOUT_S", 0.01)
    with pytest.raises(DataError, match="was not committed: not finished within 0 s"):
        checkpoints.finish()
    monkeypatch.setattr(saver, "COMMIT_TIMEOUT_S", 60.0)
    release.set()
    assert thread.ended(60)


def test_a_save_that_a_later_attempt_overtook_says_so_and_not_that_the_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ranks = ranks_of(tmp_path, 2)
    (tmp_path / "attempt-00001.json").write_text("{}")
    for checkpoints in ranks:
        begin(checkpoints, 4)
    for checkpoints in ranks:
        with pytest.raises(Overtaken, match="attempt 1 has taken over the run from attempt 0"):
            checkpoints.finish()
    said = capsys.readouterr().out
    assert "step-00000004.attempt-0 was not committed: attempt 1 has taken over" in said and "goes on" not in said
    assert not list(tmp_path.glob("step-*"))  # what it wrote is removed


@pytest.mark.parametrize("remove_fails", [True, False])
def test_what_a_failed_save_wrote_is_removed_where_that_can_be_done(
    remove_fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(saver, "index_of", raising_with(ValueError("ours")))
    if remove_fails:
        monkeypatch.setattr("data_pipeline.storage.LocalStorage.remove_all", raising_with(OSError("stale handle")))
    (checkpoints,) = ranks_of(tmp_path, 1)
    begin(checkpoints, 4)
    with pytest.raises(DataError, match="ValueError: ours"):
        checkpoints.finish()
    assert (tmp_path / "step-00000004.attempt-0").exists() is remove_fails
    assert "ValueError: ours; the checkpoints before it are untouched, the run goes on\n" in capsys.readouterr().out
    assert checkpoints.last_save_s == 0.0


@pytest.mark.parametrize("error", [OSError("stale handle"), DataError("stale handle")])
def test_old_ones_that_cannot_be_removed_are_said_and_the_new_one_stands(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(saver, "tidy", raising_with(error))
    (checkpoints,) = ranks_of(tmp_path, 1)
    begin(checkpoints, 4)
    assert checkpoints.finish() == committed(tmp_path)[0]
    assert f"{tmp_path}: old checkpoints could not be removed: stale handle\n" in capsys.readouterr().out


def test_an_attempt_that_was_overtaken_after_its_commit_removes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoints,) = ranks_of(tmp_path, 1, retention=Retention(1))
    begin(checkpoints, 4)
    checkpoints.finish()
    put_once = saver.put_once

    def then_overtaken(storage: Any, name: str, data: bytes) -> dict[str, Any]:
        entry = put_once(storage, name, data)
        if name == "MANIFEST.json":
            (tmp_path / "attempt-00001.json").write_text("{}")
        return entry

    monkeypatch.setattr(saver, "put_once", then_overtaken)
    begin(checkpoints, 8)
    assert checkpoints.finish() is not None and [saved.step for saved in committed(tmp_path)] == [4, 8]
    assert "old checkpoints could not be removed: attempt 1 has taken over" in capsys.readouterr().out


def test_what_may_go_is_of_earlier_attempts_or_of_earlier_steps_of_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(saver, "tidy", lambda *given, **named: asked.append((given, named)) or tidy(*given, **named))
    (checkpoints,) = ranks_of(tmp_path, 1, attempt=3)
    begin(checkpoints, 8)
    checkpoints.finish()
    [((root, retention, may_go), named)] = asked
    assert (root, retention, named) == (str(tmp_path), Retention(9), {"new": "step-00000008.attempt-3"})
    places = [(step, attempt) for step in (7, 8, 9) for attempt in (2, 3, 4)]
    assert [place for place in places if may_go(*place)] == [(7, 2), (7, 3), (8, 2), (9, 2)]


@pytest.mark.slow
def test_a_rank_that_is_late_fails_the_save_and_those_in_time_are_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = ranks_of(tmp_path, 3)
    monkeypatch.setattr(saver, "COMMIT_TIMEOUT_S", 1.0)
    monkeypatch.setattr(saver, "READ_S", 0.1)
    threads = [begin(ranks[2], 4)]
    ranks[2].mesh.store.wait([f"{threads[0].key}/2"], timedelta(seconds=60))
    threads.append(begin(ranks[0], 4))
    assert all(thread.ended(60) for thread in threads)
    for rank in (0, 2):
        with pytest.raises(DataError, match=r"^[^:]*(was not|may not be) committed: "):
            ranks[rank].finish()
    assert threads[1].failure == "rank 1: no report within 1 s" and threads[1].heard == [0, 2]
    assert committed(tmp_path) == []


def test_rank_0_waits_only_for_those_that_it_heard_to_read_how_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[list[str], float]] = []
    gather = saver._gather

    def noted(store: Any, keys: list[str], timeout_s: float, *rest: Any) -> Any:
        asked.append((keys, timeout_s))
        return gather(store, keys, timeout_s, *rest)

    monkeypatch.setattr(saver, "_gather", noted)
    ranks = ranks_of(tmp_path, 2)
    threads = [begin(checkpoints, 4) for checkpoints in ranks]
    assert all(thread.ended(60) for thread in threads)
    key = f"save-1 {tmp_path}/step-00000004.attempt-0"
    assert {thread.key for thread in threads} == {key}
    assert asked == [([f"{key}/{rank}" for rank in (0, 1)], 600.0), ([f"{key}/read/{rank}" for rank in (0, 1)], 10.0)]


@pytest.mark.parametrize("ended", [True, False])
def test_a_close_abandons_only_a_save_that_is_still_under_way(
    ended: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, write_shard = threading.Event(), saver.write_shard
    monkeypatch.setattr(saver, "write_shard", lambda *given: (release.wait(60), write_shard(*given))[1])
    (checkpoints,) = ranks_of(tmp_path, 1)
    thread = begin(checkpoints, 4)
    if ended:
        release.set()
        assert thread.ended(60)
    monkeypatch.setattr(saver, "ABANDON_S", 0.01)
    checkpoints.close()
    assert thread.abandoned.is_set() is not ended
    release.set()
    assert thread.ended(60) and thread.failure == ""  # its parts were all there: it is committed all the same


# ------------------------------------------------------------------------------------------- the newest


def test_every_choice_looks_anew(tmp_path: Path) -> None:
    (checkpoints,) = ranks_of(tmp_path / "checkpoints", 1)
    assert checkpoints.newest() is None
    for step in (4, 8):
        write(tmp_path, step)
        found = checkpoints.newest()
        assert found is not None and found.step == step
    flip_a_bit(folder_of(tmp_path, 1) / "r00001.safetensors")
    found = checkpoints.newest()
    assert found is not None and found.step == 4


def test_the_choices_of_two_places_are_not_taken_for_each_other_s(tmp_path: Path) -> None:
    store = torch.distributed.HashStore()
    for place, step in (("a", 4), ("b", 8)):
        write(tmp_path / place, step)
    for place, step in (("a", 4), ("b", 8)):
        found = Checkpoints(tmp_path / place / "checkpoints", mesh_of(0, 1, store), 1, Retention(9)).newest()
        assert found is not None and found.step == step


def test_a_choice_waits_for_the_save_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shard = saver.write_shard
    (checkpoints,) = ranks_of(tmp_path, 1)
    waited: list[float] = []
    ended = Save.ended

    def noted(thread: Save, timeout_s: float) -> bool:
        waited.append(timeout_s)
        release.set()
        return ended(thread, timeout_s)

    release = threading.Event()
    monkeypatch.setattr(saver, "write_shard", lambda *given: (release.wait(60), write_shard(*given))[1])
    begin(checkpoints, 4)
    monkeypatch.setattr(Save, "ended", noted)
    found = checkpoints.newest()
    assert found is not None and found.step == 4 and waited == [600.0]


def test_steps_between_the_regular_ones_are_passed_over_where_that_is_asked(tmp_path: Path) -> None:
    for step in (4, 8, 9, 11):
        write(tmp_path, step)
    (checkpoints,) = ranks_of(tmp_path / "checkpoints", 1)
    found = {every: checkpoints.newest(every) for every in (1, 2, 3, 4, 7)}
    assert {every: saved and saved.step for every, saved in found.items()} == {1: 11, 2: 8, 3: 9, 4: 8, 7: None}
    assert checkpoints.newest() == found[1]
    for index in range(4):
        flip_a_bit(folder_of(tmp_path, index) / "r00001.safetensors")
    with pytest.raises(DataError, match="checkpoints: none of 2 checkpoints is valid; restore one or empty the folder"):
        checkpoints.newest(4)


def test_every_fault_is_told_once_and_in_the_order_of_the_ranks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, 4, world=3)
    folder = folder_of(tmp_path, 0)
    for name in ("r00000.safetensors", "r00001.safetensors", "r00002.safetensors"):
        (folder / name).unlink()
    capsys.readouterr()
    ranks = ranks_of(tmp_path / "checkpoints", 2)
    threads = [threading.Thread(target=lambda mine=mine: refused(mine)) for mine in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    faults = "r00000.safetensors: missing; r00002.safetensors: missing; r00001.safetensors: missing"
    assert capsys.readouterr().out == f"checkpoint step-00000004.attempt-0 is skipped: {faults}\n"
    (folder / "MANIFEST.json").write_text("[]")
    (checkpoints,) = ranks_of(tmp_path / "checkpoints", 1)
    refused(checkpoints)
    assert capsys.readouterr().out.count("MANIFEST.json") == 1


def refused(checkpoints: Checkpoints) -> None:
    with pytest.raises(DataError, match="none of 1 checkpoints is valid"):
        checkpoints.newest()


def test_a_place_that_cannot_be_listed_is_an_error_on_every_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saver, "committed", raising_with(OSError("stale handle")))
    for checkpoints in ranks_of(tmp_path, 2):
        with pytest.raises(DataError, match="stale handle"):
            checkpoints.newest()


def test_a_store_that_is_gone_is_a_fault_of_its_process_and_the_save_may_be_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = ranks_of(tmp_path, 2)
    monkeypatch.setattr(saver, "_get", raising_with(RuntimeError("Connection reset")))
    begin(ranks[1], 4)
    match = (
        r"may not be committed: rank 0, whose process holds the store, is lost \(Connection reset\); the checkpoints"
    )
    with pytest.raises(NodeFault, match=match):
        ranks[1].finish()
    assert open_storage(f"{tmp_path}/step-00000004.attempt-0").list() == ["r00001.safetensors"]
