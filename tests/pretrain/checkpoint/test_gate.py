"""What a checkpoint's files say is checked as they are read: nothing is read or written outside its folder."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import DataError
from data_pipeline.storage import open_storage
from pretrain.checkpoint.catalog import Saved, committed, names, read_manifest
from pretrain.checkpoint.layout import Slices, parse_index
from pretrain.checkpoint.universal import export_universal
from tests.pretrain.checkpoint.simulated import write

HOSTILE: list[Any] = [
    "../../planted",
    "..",
    ".",
    "",
    "/etc/passwd",
    "a/b",
    "a\\b",
    "..\\x",
    ".x",
    "a\0b",
    "a\nb",
    "x" * 300,
    None,
    7,
]
NOT_COUNTS = [-1, 1.5, True, "1", None, 2**63, 2**4000, []]
SHA = "0123456789abcdef" * 4
LISTED: dict[str, Any] = {
    "names": ["model.w", "model.b"], "shapes": [[2, 3], [3]], "files": {"r00000.safetensors": [[0, 0, 6, 64, 3]]},
    "buffers": {"model.mean": ["r00000.safetensors", "F32", [3], 8]}, "own_buffers": {},
}  # fmt: skip
EVEN = {key: value for key, value in LISTED.items() if key != "files"}
EVEN |= {"kinds": [3, 3], "heads": [64], "parts": ["r00000.safetensors"]}
MANIFEST: dict[str, Any] = {
    "version": 3, "step": 4, "attempt": 0, "world": 1,
    "files": [{"name": name, "bytes": 9, "sha256": SHA} for name in ("index.json", "state.json", "r00000.safetensors")],
}  # fmt: skip


def changed(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    tree = copy.deepcopy(tree)
    inner = tree
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    return tree


WRONG = [
    *((MANIFEST, ("files", 2, "name"), value) for value in [*HOSTILE, "index.json"]),
    *((MANIFEST, ("files", 2, "bytes"), value) for value in NOT_COUNTS),
    *((MANIFEST, ("files", 2, "sha256"), value) for value in ["", SHA[1:], SHA.upper(), "../" * 20, None]),
    *((MANIFEST, (field,), value) for field in ("version", "step", "attempt", "world") for value in NOT_COUNTS),
    *((MANIFEST, ("files",), value) for value in [None, [], {}, [None], [[]], MANIFEST["files"][2:]]),
    (MANIFEST, ("world",), 0),
    (MANIFEST, ("version",), 2),
    *((LISTED, ("names", 0), value) for value in [*HOSTILE, "model..w", "a b", "model.b"]),
    *((LISTED, ("shapes", 0, 0), value) for value in [*NOT_COUNTS, 2**47]),
    *((LISTED, ("files",), {value: [[0, 0, 6, 64, 3]]}) for value in HOSTILE if isinstance(value, str)),
    *((LISTED, ("files", "r00000.safetensors", 0, at), value) for at in range(5) for value in NOT_COUNTS),
    *((LISTED, ("files", "r00000.safetensors", 0, 0), value) for value in [2, 1]),
    *((LISTED, ("files", "r00000.safetensors", 0, 1), value) for value in [6, 7]),
    *((LISTED, ("files", "r00000.safetensors", 0, 2), value) for value in [0, 7]),
    *((LISTED, ("files", "r00000.safetensors", 0, 4), value) for value in [0, 5]),
    *((LISTED, ("buffers", "model.mean", 0), value) for value in HOSTILE),
    *((LISTED, ("buffers", "model.mean", 1), value) for value in ["F31", "", None, 4]),
    *((LISTED, ("buffers", "model.mean", 2, 0), value) for value in NOT_COUNTS),
    *((LISTED, ("buffers", "model.mean", 3), value) for value in NOT_COUNTS),
    *((LISTED, ("own_buffers",), {"1": {name: LISTED["buffers"]["model.mean"]}}) for name in ("../x", "", "a/b")),
    *((EVEN, ("parts", 0), value) for value in HOSTILE),
    *((EVEN, ("heads", 0), value) for value in NOT_COUNTS),
    *((EVEN, ("kinds", 0), value) for value in [0, 5, *NOT_COUNTS]),
    *((EVEN, (key,), []) for key in ("parts", "heads", "kinds", "names")),
]  # fmt: skip


def read(kind: Any, tree: Any, folder: Path) -> Any:
    data = json.dumps(tree).encode()
    if kind is MANIFEST:
        (folder / "MANIFEST.json").write_bytes(data)
        return read_manifest(open_storage(folder))
    return parse_index(data, str(folder))


@pytest.mark.parametrize("kind", [MANIFEST, LISTED, EVEN], ids=["manifest", "listed", "even"])
def test_a_name_digest_size_or_count_that_is_none_is_refused_where_it_is_read(kind: Any, tmp_path: Path) -> None:
    read(kind, kind, tmp_path)
    for _, path, value in (row for row in WRONG if row[0] is kind):
        with pytest.raises(DataError, match=str(tmp_path)):
            read(kind, changed(kind, path, value), tmp_path)
            pytest.fail(f"{path} = {value!r} was taken")


VALUES = st.one_of(
    st.sampled_from([*HOSTILE, *NOT_COUNTS]),
    st.text(max_size=60),
    st.integers(),
    st.recursive(st.none() | st.text(max_size=9), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)),
)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_of_any_index_only_names_that_stay_inside_come_through(data: st.DataObject) -> None:
    tree = data.draw(st.sampled_from([LISTED, EVEN]))
    path = data.draw(st.sampled_from([row[1] for row in WRONG if row[0] is tree]))
    try:
        index = parse_index(json.dumps(changed(tree, path, data.draw(VALUES))).encode(), "here")
    except DataError:
        return
    files = [*index.get("files", {}), *index.get("parts", []), *(place[0] for place in index["buffers"].values())]
    for name in [*files, *index["names"], *index["buffers"]]:
        assert name not in ("", ".", "..") and not any(letter in name for letter in "/\\\0\n")


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode) | st.integers(1, 10**5).map(lambda n: b"[" * n))
def test_any_other_bytes_are_no_index(data: bytes) -> None:
    with pytest.raises(DataError):
        parse_index(data, "here")


# ------------------------------------------------------------------------------- a checkpoint that was written


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    write(tmp_path / "run", 4)
    [found] = committed(tmp_path / "run/checkpoints")
    return found


def rewrite(saved: Saved, name: str, path: tuple[Any, ...], value: Any) -> None:
    file = Path(saved.folder) / name
    file.write_text(json.dumps(changed(json.loads(file.read_text()), path, value)))


def test_a_manifest_that_points_outside_is_a_fault_of_the_checkpoint(saved: Saved) -> None:
    assert not saved.faults()
    rewrite(saved, "MANIFEST.json", ("files", 0, "name"), "../../../secret")
    [fault] = Saved(saved.folder).faults()
    assert "files.0.name='../../../secret'" in fault


@pytest.mark.parametrize("name", ["step-00000005.attempt-0", "step-00000004.attempt-1"])
def test_a_checkpoint_in_the_folder_of_another_step_or_attempt_is_refused_by_name(saved: Saved, name: str) -> None:
    folder = Path(saved.folder)
    assert read_manifest(open_storage(folder))["step"] == 4 and folder.name == "step-00000004.attempt-0"
    with pytest.raises(DataError, match="its manifest is of step-00000004.attempt-0"):
        read_manifest(open_storage(folder.rename(folder.with_name(name))))
    assert read_manifest(open_storage(folder.with_name(name).rename(folder.with_name("mine"))))["step"] == 4


def test_a_parameters_name_writes_nothing_outside_an_export(saved: Saved, tmp_path: Path) -> None:
    index = json.loads((Path(saved.folder) / "index.json").read_text())
    rewrite(saved, "index.json", ("names",), ["../../../planted", *index["names"][1:]])
    with pytest.raises(DataError, match="names.0"):
        export_universal(saved, tmp_path / "out/export")
    assert not list(tmp_path.rglob("planted*"))


def test_a_shape_beyond_the_memory_is_told_as_damage(saved: Saved) -> None:
    index = json.loads((Path(saved.folder) / "index.json").read_text())
    rewrite(saved, "index.json", ("shapes", 0), [2**46])
    with pytest.raises(DataError, match="does not fit into memory|cut off"):
        Slices(saved.folder).whole("param", index["names"][0])


def test_a_label_names_a_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    for held in ('{"checkpoint": "../x"}', "{}", "[]", "x", '{"checkpoint": 1}'):
        (tmp_path / "name-best.json").write_text(held)
        with pytest.raises(DataError, match=r"name-best.json.*name the checkpoint again"):
            list(names(tmp_path))


@pytest.mark.parametrize(
    "held", ["[]", "7", "[" * 100_000, '{"stream": {"position": -1}}', '{"means": {"loss": "low"}}']
)
def test_a_state_that_is_none_is_an_error_of_data(held: str, saved: Saved) -> None:
    (Path(saved.folder) / "state.json").write_text(held)
    with pytest.raises(DataError, match=r"state.json"):
        _ = Saved(saved.folder).state
