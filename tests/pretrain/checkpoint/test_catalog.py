"""Names, manifests, claims and retention by tables, on folders that hold the few files which the catalog reads."""

import dataclasses
import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from data_pipeline.errors import DataError, Overtaken
from data_pipeline.storage import LocalStorage, open_storage
from pretrain.checkpoint import catalog
from pretrain.checkpoint.catalog import (
    Retention,
    Saved,
    as_json,
    claim_attempt,
    committed,
    consent_since,
    file_fault,
    folder_name,
    names,
    newest_claim,
    numbers,
    put_once,
    read_json,
    read_manifest,
    refuse_overtaken,
    tidy,
)
from pretrain.config import checkpoint_root

SHA = "0123456789abcdef" * 4


def entry(name: str, data: bytes) -> dict[str, Any]:
    return {"name": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def lay(root: Path, step: int, attempt: int = 0, files: int = 0, **state: Any) -> Saved:
    """A whole checkpoint: index, state, `files` more and the manifest."""
    folder = root / f"step-{step:08d}.attempt-{attempt}"
    folder.mkdir(parents=True)
    held = {"index.json": b"{}", "state.json": json.dumps(state).encode()}
    held |= {f"r{at:05d}.safetensors": bytes([at]) * 9 for at in range(files)}
    for name, data in held.items():
        (folder / name).write_bytes(data)
    listed = [entry(name, data) for name, data in held.items()]
    manifest = {"version": 3, "step": step, "attempt": attempt, "world": 1, "files": listed}
    (folder / "MANIFEST.json").write_text(json.dumps(manifest))
    return Saved(str(folder))


# --------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("step-00000012.attempt-3", (12, 3)),
        ("step-123456789.attempt-10", (123456789, 10)),
        ("step-0.attempt-0", (0, 0)),
        ("step-12xattempt-3", (-1, -1)),
        ("step-12.attempt-3.old", (-1, -1)),
        ("my-step-12.attempt-3", (-1, -1)),
        ("step-.attempt-3", (-1, -1)),
        ("step-12.attempt-", (-1, -1)),
        ("notes", (-1, -1)),
    ],
)
def test_a_folder_is_a_checkpoint_s_by_its_whole_name(name: str, found: tuple[int, int]) -> None:
    assert numbers(name) == found
    saved = Saved(f"s3://bucket/run/{name}")
    assert (saved.name, saved.step, saved.attempt) == (name, *found)


def test_a_folder_is_named_by_step_and_attempt() -> None:
    assert folder_name(12, 3) == "step-00000012.attempt-3"
    assert folder_name(123456789, 0) == "step-123456789.attempt-0"


def test_checkpoints_lie_in_the_run_unless_another_place_is_named() -> None:
    assert checkpoint_root("runs/a", None) == checkpoint_root(Path("runs/a"), "") == "runs/a/checkpoints"
    assert checkpoint_root("runs/a", "s3://bucket/a") == "s3://bucket/a"


def test_committed_ones_come_by_step_and_then_by_attempt_as_numbers(tmp_path: Path) -> None:
    places = [(8, 10), (8, 9), (10**9, 0), (9, 0), (16, 1)]
    for step, attempt in places:
        lay(tmp_path, step, attempt)
    (tmp_path / "step-00000004.attempt-0").mkdir()
    lay(tmp_path / "other", 4)
    (tmp_path / "step-00000005.attempt-0").write_text("a file")
    assert [(saved.step, saved.attempt) for saved in committed(tmp_path)] == sorted(places)
    assert [saved.folder for saved in committed(tmp_path)][0] == f"{tmp_path}/step-00000008.attempt-9"
    assert committed(tmp_path / "nowhere") == []


@pytest.mark.parametrize(
    ("earlier", "later", "passed"),
    [
        ((8, 0), (8, 1), True), ((9, 0), (8, 1), True), ((7, 0), (8, 1), False), ((9, 1), (8, 1), False),
        ((9, 2), (8, 1), False), ((8, 1), (8, 1), False),
    ],
)  # fmt: skip
def test_a_later_attempt_passes_over_what_lies_at_or_behind_its_save(
    earlier: tuple[int, int], later: tuple[int, int], passed: bool
) -> None:
    one, two = (Saved(f"root/{folder_name(*place)}") for place in (earlier, later))
    assert one.passed_over_by(two) is passed


# ----------------------------------------------------------------------------------------------- manifests


def manifest_of(tmp_path: Path, **changes: Any) -> Any:
    files = [{"name": name, "bytes": 9, "sha256": SHA} for name in ("index.json", "state.json", "r.safetensors")]
    tree = {"version": 3, "step": 4, "attempt": 0, "world": 1, "files": files} | changes
    (tmp_path / "MANIFEST.json").write_text(json.dumps(tree))
    assert read_manifest(open_storage(tmp_path)) == tree
    return tree


def test_a_manifest_may_hold_keys_of_later_programs_but_its_files_may_not(tmp_path: Path) -> None:
    tree = manifest_of(tmp_path, later={"a": 1})
    with pytest.raises(DataError, match=r"files.0.size.*it is damaged"):
        manifest_of(tmp_path, files=[tree["files"][0] | {"size": 9}, *tree["files"][1:]])


@pytest.mark.parametrize(("world", "fits"), [(0, False), (1, True), (2**24, True), (2**24 + 1, False)])
def test_a_manifest_is_of_1_to_16_million_ranks(world: int, fits: bool, tmp_path: Path) -> None:
    if fits:
        manifest_of(tmp_path, world=world)
    else:
        with pytest.raises(DataError, match="world"):
            manifest_of(tmp_path, world=world)


@pytest.mark.parametrize("left", [[1, 2], [0, 2], [2], [0, 0, 1], [0, 1, 2, 2]])
def test_a_manifest_lists_index_and_state_and_no_file_twice(left: list[int], tmp_path: Path) -> None:
    files = manifest_of(tmp_path)["files"]
    manifest_of(tmp_path, files=files[:2])
    with pytest.raises(DataError, match=r"lists a file twice, or lacks index.json or state.json; it is damaged"):
        manifest_of(tmp_path, files=[files[at] for at in left])


@pytest.mark.parametrize("version", [2, 4])
def test_a_manifest_of_an_older_or_newer_format_is_refused_by_both_numbers(version: int, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"format {version}, supported is 3; use the version of tessera that"):
        manifest_of(tmp_path, version=version)


def test_what_is_missing_or_no_object_cannot_be_read(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    for held, word in ((b"[1]", "holds list"), (b"7", "holds int"), (b"{", "Expecting"), (b"\xff", "decode")):
        (tmp_path / "x.json").write_bytes(held)
        with pytest.raises(DataError, match=f"x.json cannot be read: .*{word}"):
            read_json(storage, "x.json")
    with pytest.raises(DataError, match=r"y.json: not found"):
        read_json(storage, "y.json")
    (tmp_path / "x.json").write_text('{"a": [1]}')
    assert read_json(storage, "x.json") == {"a": [1]}


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("0" * 12, True), ("0123456789ab", True), ("f" * 64, True), ("0" * 11, False), ("f" * 65, False),
        ("g" * 12, False), ("F" * 12, False), ("a" * 12 + "@step 7", True), ("a" * 12 + "@step " + "9" * 15, True),
        ("a" * 12 + "@step " + "9" * 16, False), ("a" * 12 + "@step ", False), ("a" * 12 + "@step 7 ", False),
        ("", False),
    ],
)  # fmt: skip
def test_a_fingerprint_of_a_state_is_checked(text: str, fits: bool, tmp_path: Path) -> None:
    saved = lay(tmp_path, 4, fingerprints={"data": text}, other=[1])
    if fits:
        assert saved.state == {"fingerprints": {"data": text}, "other": [1]}
    else:
        with pytest.raises(DataError, match=r"state.json: fingerprints.data=.*it is damaged"):
            _ = saved.state


@pytest.mark.parametrize("state", [{"stream": {}}, {"stream": {"position": 1.5}}, {"changes": {}}, {"changes": [1]}])
def test_the_parts_of_a_state_that_are_counted_with_are_checked(state: dict[str, Any], tmp_path: Path) -> None:
    good = {"stream": {"position": 7, "more": 1}, "changes": [{"a": 1}], "means": {"loss": 1.5}}
    assert lay(tmp_path, 4, **good).state == good
    with pytest.raises(DataError, match="state.json"):
        _ = lay(tmp_path, 8, **state).state


def test_equal_trees_have_equal_bytes() -> None:
    assert as_json({"b": [1, 2], "a": {"y": None, "x": 0.5}}) == (
        b'{\n "a": {\n  "x": 0.5,\n  "y": null\n },\n "b": [\n  1,\n  2\n ]\n}'
    )


def test_an_object_that_was_put_has_this_entry(tmp_path: Path) -> None:
    assert put_once(open_storage(tmp_path), "a", b"first") == entry("a", b"first")
    with pytest.raises(DataError, match=f"{tmp_path}/a exists already; another attempt committed it"):
        put_once(open_storage(tmp_path), "a", b"first")


@pytest.mark.parametrize("buffer", [1, 4, 9, 10, 8 << 20])
def test_a_file_that_differs_from_its_entry_is_told_how(
    buffer: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog, "BUFFER", buffer)
    storage = open_storage(tmp_path)
    (tmp_path / "a").write_bytes(b"123456789")
    right, other = entry("a", b"123456789"), hashlib.sha256(b"123456789").hexdigest()
    assert file_fault(storage, right) == ""
    assert file_fault(storage, entry("b", b"")) == "b: missing"
    assert file_fault(storage, right | {"bytes": 10}) == "a: 9 bytes, the manifest has 10"
    assert file_fault(storage, right | {"bytes": 8}) == "a: 9 bytes, the manifest has 8"
    assert file_fault(storage, entry("a", b"123456780")) == f"a: sha256 {other[:12]}, the manifest says another"
    assert file_fault(storage, right | {"sha256": "f" * 64}) == f"a: sha256 {other[:12]}, the manifest says another"

    def broken(*_: Any) -> bytes:
        raise DataError("no route to host")

    monkeypatch.setattr(LocalStorage, "get_range", broken)
    assert file_fault(storage, right) == "a: no route to host"


def test_no_more_than_a_buffer_is_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"123456789")
    asked: list[tuple[int, int]] = []
    original = LocalStorage.get_range

    def noted(self: LocalStorage, name: str, start: int, stop: int) -> bytes:
        asked.append((start, stop))
        return original(self, name, start, stop)

    monkeypatch.setattr(catalog, "BUFFER", 4)
    monkeypatch.setattr(LocalStorage, "get_range", noted)
    assert file_fault(open_storage(tmp_path), entry("a", b"123456789")) == ""
    assert asked == [(0, 4), (4, 8), (8, 9)]


def test_a_file_is_hashed_by_8_mib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size, asked = (8 << 20) + 1, list[tuple[int, int]]()
    with (tmp_path / "a").open("wb") as file:
        file.truncate(size)
    monkeypatch.setattr(
        LocalStorage, "get_range", lambda _, name, start, stop: asked.append((start, stop)) or bytes(stop - start)
    )
    assert file_fault(open_storage(tmp_path), entry("a", bytes(size))) == ""
    assert asked == [(0, size - 1), (size - 1, size)]


@pytest.mark.parametrize("value", [Saved("root/a"), Retention(2)])
def test_equal_values_are_one_and_do_not_change(value: Any) -> None:
    assert len({value, dataclasses.replace(value)}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, dataclasses.fields(value)[0].name, "other")


def test_parts_of_the_files_are_every_so_many_th_one(tmp_path: Path) -> None:
    saved = lay(tmp_path, 4, files=5)
    order = ["index.json", "state.json", *(f"r{at:05d}.safetensors" for at in range(5))]
    assert saved.faults() == []
    for name in order:
        (Path(saved.folder) / name).unlink()
    lines = [f"{name}: missing" for name in order]
    assert saved.faults() == lines
    for parts in (1, 2, 3, 9):
        for part in range(parts):
            assert saved.faults(part, parts) == [line for at, line in enumerate(lines) if at % parts == part]
    assert saved.faults(1) == lines[1:]
    (Path(saved.folder) / "MANIFEST.json").write_text("[]")
    (fault,) = Saved(saved.folder).faults(3, 9)
    assert fault.startswith("MANIFEST.json: ") and "it is damaged" in fault


# ------------------------------------------------------------------------------------------------- claims


def test_a_claim_is_the_next_number_and_says_who_made_it(tmp_path: Path) -> None:
    assert newest_claim(tmp_path) == -1
    assert [claim_attempt(tmp_path, at_least, {"pid": 7}) for at_least in (0, 0, 5, 0, 6)] == [0, 1, 5, 6, 7]
    claims = sorted(path.name for path in tmp_path.glob("attempt-*"))
    assert claims == [f"attempt-{number:05d}.json" for number in (0, 1, 5, 6, 7)]
    assert (tmp_path / "attempt-00005.json").read_bytes() == as_json({"pid": 7})


def test_a_claim_that_another_made_first_is_not_taken_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (3, 4, 5):
        (tmp_path / f"attempt-{number:05d}.json").write_text("theirs")
    monkeypatch.setattr(catalog, "newest_claim", lambda _: 2)  # as it was looked up before they came
    assert claim_attempt(tmp_path, 0, {}) == 6
    assert (tmp_path / "attempt-00003.json").read_text() == "theirs"


@pytest.mark.parametrize("name", ["attempt-9.json.bak", "attempt-x.json", "my-attempt-9.json", "attempt-9xjson"])
def test_other_files_are_no_claims(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text('{"changes": {"a": 1}}')
    (tmp_path / "attempt-00002.json").write_text("{}")
    assert newest_claim(tmp_path) == 2 and consent_since(tmp_path, 0) == {}


def test_an_attempt_is_overtaken_by_a_later_one_alone(tmp_path: Path) -> None:
    refuse_overtaken(tmp_path, 0)
    (tmp_path / "attempt-00002.json").write_text("{}")
    refuse_overtaken(tmp_path, 2)
    refuse_overtaken(tmp_path, 3)
    with pytest.raises(
        Overtaken, match="attempt 2 has taken over the run from attempt 1, which stops; for a second run"
    ):
        refuse_overtaken(tmp_path, 1)


def test_of_what_later_attempts_were_told_the_newest_word_counts(tmp_path: Path) -> None:
    told: dict[int, Any] = {
        1: {"a": 1, "e": 1},
        2: {"a": 2, "b": 2},
        3: None,
        9: {"a": 9, "c": 9},
        10: {"a": 10},
        4: [1],
    }
    for number, changes in told.items():
        tree = {} if changes is None else {"changes": changes}
        (tmp_path / f"attempt-{number}.json").write_text(json.dumps(tree))
    assert consent_since(tmp_path, 0) == {"a": 10, "b": 2, "c": 9, "e": 1}
    assert consent_since(tmp_path, 1) == {"a": 10, "b": 2, "c": 9}
    assert consent_since(tmp_path, 9) == {"a": 10}
    assert consent_since(tmp_path, 10) == {}


# ---------------------------------------------------------------------------------------------- retention


def reasons(root: Path, retention: Retention, new: str = "") -> dict[tuple[int, int], list[str]]:
    return {numbers(name): why for name, why in retention.reasons(root, committed(root), new).items()}


def test_a_run_s_retention_is_that_of_its_configuration() -> None:
    train: Any = SimpleNamespace(
        keep_checkpoints=3, keep_every_steps=40, keep_best="max:psnr", checkpoint_every_steps=8
    )
    assert Retention.of(train) == Retention(last=3, every_steps=40, best="max:psnr", regular=8)
    assert Retention(1) == Retention(last=1, every_steps=0, best="", regular=1)


def test_every_reason_to_stay_is_told_in_this_order(tmp_path: Path) -> None:
    for step, loss in ((4, 2.0), (8, 0.123456789), (12, 3.0), (13, 4.0)):
        lay(tmp_path, step, means={"loss": loss})
    (tmp_path / "name-a.b_c-1.json").write_text('{"checkpoint": "step-00000008.attempt-0"}')
    (tmp_path / "name-gone.json").write_text('{"checkpoint": "step-00000099.attempt-0"}')
    assert reasons(tmp_path, Retention(2, every_steps=8, best="loss", regular=4)) == {
        (4, 0): [], (8, 0): ["last", "every 8", "best loss=0.123457", "named a.b_c-1"], (12, 0): ["last"],
        (13, 0): ["newest"],
    }  # fmt: skip
    assert reasons(tmp_path, Retention(1)) == {(4, 0): [], (8, 0): ["named a.b_c-1"], (12, 0): [], (13, 0): ["last"]}
    found = reasons(tmp_path, Retention(1), new="step-00000004.attempt-0")
    assert found[4, 0] == ["newest"] and found[12, 0] == []
    assert reasons(tmp_path / "empty", Retention(1)) == {}


def test_what_a_later_attempt_started_behind_is_not_counted_among_the_last(tmp_path: Path) -> None:
    for step, attempt in ((8, 0), (16, 0), (24, 0), (16, 1), (19, 2)):
        lay(tmp_path, step, attempt)
    found = reasons(tmp_path, Retention(2, regular=8))
    assert found == {(8, 0): ["last"], (16, 0): [], (16, 1): ["last"], (19, 2): ["newest"], (24, 0): []}


@pytest.mark.parametrize(
    ("best", "scores", "winner"),
    [
        ("loss", [3.0, 1.0, 2.0], 1),
        ("max:loss", [3.0, 1.0, 2.0], 0),
        ("min:loss", [-3.0, 1.0, 2.0], 0),
        ("mlm_accuracy", [0.0, -1.0, 0.5], 2),
        ("min:mlm_accuracy", [0.0, -1.0, 0.5], 1),
        ("unheard_of", [3.0, 1.0, 2.0], 1),
        ("loss", [2.0, 2.0, 2.0], 0),
        ("max:loss", [2.0, 2.0, 2.0], 0),
        ("loss", [2.0, float("-inf"), float("nan")], 0),
        ("loss", [None, None, 5.0], 2),
        ("loss", [None, 0.0, 5.0], 1),
        ("loss", [None, None, None], None),
        ("", [1.0, 2.0, 3.0], None),
    ],
)
def test_the_best_has_the_best_finite_mean_and_of_equal_ones_the_first(
    best: str, scores: list[float | None], winner: int | None, tmp_path: Path
) -> None:
    metric = best.rpartition(":")[2]
    for at, score in enumerate(scores):
        lay(tmp_path, 4 * at, **({"means": {metric: score}} if score is not None else {}))
    lay(tmp_path, 12, means={"other": 0.0})
    found = reasons(tmp_path, Retention(1, best=best))
    told = [step // 4 for (step, _), why in found.items() if any(word.startswith("best") for word in why)]
    assert told == ([] if winner is None else [winner])


def test_a_checkpoint_whose_state_cannot_be_read_is_not_the_best(tmp_path: Path) -> None:
    (Path(lay(tmp_path, 4, means={"loss": 0.0}).folder) / "state.json").write_text("[]")
    lay(tmp_path, 8, means={"loss": 7.0})
    assert reasons(tmp_path, Retention(1, best="loss")) == {(4, 0): [], (8, 0): ["last", "best loss=7"]}


def test_labels_are_files_of_this_name_and_hold_a_folder_alone(tmp_path: Path) -> None:
    lay(tmp_path, 4)
    for name in ("name-a.json", "name-B.9_-.json", "name-.json", "name-a b.json", "name-a.json.bak", "xname-a.json"):
        (tmp_path / name).write_text('{"checkpoint": "step-00000004.attempt-0"}')
    assert sorted(names(tmp_path)) == [("step-00000004.attempt-0", label) for label in ("B.9_-", "a")]
    (tmp_path / "name-a.json").write_text('{"checkpoint": "step-00000004.attempt-0", "more": 1}')
    with pytest.raises(DataError, match=r"name-a.json: more.*name the checkpoint again"):
        list(names(tmp_path))


def test_what_nothing_keeps_is_removed_and_of_the_unfinished_what_may_go(tmp_path: Path) -> None:
    for step in (4, 8, 12):
        lay(tmp_path, step)
    for step, attempt in ((2, 0), (6, 0), (6, 1), (20, 0)):
        (tmp_path / folder_name(step, attempt)).mkdir()
        (tmp_path / folder_name(step, attempt) / "r00000.safetensors").write_text("half")
    (tmp_path / "notes").mkdir()
    asked: list[tuple[int, int]] = []

    def may_go(step: int, attempt: int) -> bool:
        asked.append((step, attempt))
        return step == 6

    gone = tidy(tmp_path, Retention(1), may_go, new="step-00000004.attempt-0")
    assert gone == ["step-00000006.attempt-0", "step-00000006.attempt-1", "step-00000008.attempt-0"]
    assert asked == [(2, 0), (6, 0), (6, 1), (20, 0)]
    left = ["notes", *(folder_name(step, 0) for step in (2, 4, 12, 20))]
    assert sorted(path.name for path in tmp_path.iterdir()) == left
    assert not Saved(str(tmp_path / "step-00000004.attempt-0")).faults()


def test_the_manifest_of_each_goes_before_its_other_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (4, 8, 12):
        lay(tmp_path, step)
    seen: list[tuple[str, list[str]]] = []
    original = LocalStorage.remove_all

    def noted(self: LocalStorage) -> None:
        seen.append((Path(self.root).name, self.list()))
        original(self)

    monkeypatch.setattr(LocalStorage, "remove_all", noted)
    assert tidy(tmp_path, Retention(1), lambda *_: True) == [folder_name(4, 0), folder_name(8, 0)]
    assert seen == [(folder_name(step, 0), ["index.json", "state.json"]) for step in (4, 8)]
