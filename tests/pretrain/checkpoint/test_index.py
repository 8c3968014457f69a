"""What rank 0 is told of the ranks' files, the index it makes of that, and the pieces that a reader finds by it."""

import copy
import dataclasses
import hashlib
import json
import random
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_pipeline.errors import DataError
from data_pipeline.storage import LocalStorage, open_storage
from pretrain.checkpoint import layout
from pretrain.checkpoint.layout import (
    Even,
    Listed,
    Piece,
    RankShard,
    Share,
    Slices,
    Staging,
    index_of,
    parts_of,
    shard_of,
    told_of,
    write_shard,
)
from pretrain.engine.engine import Owned
from tests.pretrain.checkpoint.simulated import KINDS, mesh_of

SHAPES = {"a": (3, 4), "b": (5,), "c": (), "d": (2, 2, 2)}
FROZEN = {"b"}
VALUES = {
    f"{kind}/{name}": torch.randn(shape, generator=torch.Generator().manual_seed(number)) + at
    for at, kind in enumerate(KINDS)
    for number, (name, shape) in enumerate(SHAPES.items())
}


def split(size: int, rank: int, world: int) -> tuple[int, int]:
    """[lo, hi) of the rank: every rank takes as many as the first, until nothing is left."""
    each = next(n for n in range(size + 1) if n * world >= size)
    taken = [at // each for at in range(size)]
    return taken.index(rank) if rank in taken else size, taken.index(rank) + taken.count(
        rank
    ) if rank in taken else size


def even_shard(rank: int, world: int, buffers: dict[str, torch.Tensor] | None = None) -> RankShard:
    shares = []
    for name, shape in SHAPES.items():
        lo, hi = split(torch.Size(shape).numel(), rank, world)
        kinds = KINDS[:1] if name in FROZEN else KINDS
        if lo < hi or rank == 0:
            shares.append(Share(name, shape, lo, hi, {k: VALUES[f"{k}/{name}"].flatten()[lo:hi] for k in kinds}))
    return RankShard(rank, f"r{rank:05d}.safetensors", shares, buffers or {})


def reports_of(folder: Path, shards: list[RankShard]) -> list[dict[str, Any]]:
    return [write_shard(open_storage(folder), shard) for shard in shards]


def read_all(folder: Path, index: dict[str, Any]) -> Slices:
    open_storage(folder).put_if_absent("index.json", json.dumps(index).encode())
    slices = Slices(str(folder))
    for name, shape in SHAPES.items():
        assert slices.shapes[name] == shape
        assert slices.kinds(name) == (KINDS[:1] if name in FROZEN else KINDS)
        for kind in slices.kinds(name):
            assert torch.equal(slices.whole(kind, name), VALUES[f"{kind}/{name}"])
    return slices


# ------------------------------------------------------------------------------------------- what is written


@pytest.mark.parametrize("buffer", [1, 7, 8 << 20])
def test_a_report_is_what_another_reader_finds_in_the_file(
    buffer: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "BUFFER", buffer)
    flags, counts = torch.tensor([True, False, True]), torch.tensor([[7, 8]])
    shard = even_shard(1, 3, {"flags": flags, "counts": counts})
    report = write_shard(open_storage(tmp_path), shard)
    data = (tmp_path / shard.file).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    begins = {key: 8 + length + entry["data_offsets"][0] for key, entry in header.items() if key != "__metadata__"}
    assert (
        length % 8 == 0
        and data[8 : 8 + length].rstrip(b" ").endswith(b"}")
        and length - 8 < len(data[8 : 8 + length].rstrip(b" "))
    )
    assert report == {
        "name": "r00001.safetensors", "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "rank": 1,
        "head": 8 + length,
        "slices": [
            ["a", [3, 4], 4, 8, begins["param/a"], 3], ["b", [5], 2, 4, begins["param/b"], 1],
            ["d", [2, 2, 2], 3, 6, begins["param/d"], 3],
        ],
        "buffers": {
            "flags": ["BOOL", [3], begins["buffer/flags"], hashlib.sha256(bytes([1, 0, 1])).hexdigest()],
            "counts": ["I64", [1, 2], begins["buffer/counts"], hashlib.sha256(struct.pack("<2q", 7, 8)).hexdigest()],
        },
    }  # fmt: skip
    assert json.loads(header["__metadata__"]["slices"]) == {
        "a": [[3, 4], 4, 8],
        "b": [[5], 2, 4],
        "d": [[2, 2, 2], 3, 6],
    }
    keys = [*(f"{k}/a" for k in KINDS), "param/b", *(f"{k}/d" for k in KINDS), "buffer/flags", "buffer/counts"]
    assert sorted(begins, key=begins.__getitem__) == keys
    tensors = [tensor for share in shard.shares for tensor in share.views.values()]
    body = b"".join(struct.pack(f"<{len(t)}f", *t.tolist()) for t in tensors)
    assert data[8 + length :] == body + bytes([1, 0, 1]) + struct.pack("<2q", 7, 8)


def test_a_file_that_is_there_is_not_written_again(tmp_path: Path) -> None:
    write_shard(open_storage(tmp_path), even_shard(0, 1))
    with pytest.raises(DataError, match=r"r00000.safetensors exists already; another attempt wrote it"):
        write_shard(open_storage(tmp_path), even_shard(0, 1))


class Far(LocalStorage):
    """A folder under the address of a bucket, which may lose the last byte of what is put."""

    def __init__(self, folder: Path, lost: int) -> None:
        super().__init__("s3://bucket/run")
        self.folder, self.lost = folder, lost

    def path(self, name: str) -> Path:
        return self.folder / name

    def put_file_if_absent(self, name: str, path: Path) -> bool:
        data = path.read_bytes()
        (self.folder / name).write_bytes(data[: len(data) - self.lost])
        return True

    def scratch(self) -> Any:
        return LocalStorage(str(self.folder)).scratch()


def test_what_was_uploaded_is_read_back_and_a_difference_is_an_error(tmp_path: Path) -> None:
    assert write_shard(Far(tmp_path, 0), even_shard(0, 2))["bytes"] == (tmp_path / "r00000.safetensors").stat().st_size
    with pytest.raises(DataError, match=r"s3://bucket/run/r00001.safetensors: \d+ bytes, .* after it was uploaded"):
        write_shard(Far(tmp_path, 1), even_shard(1, 2))


def test_every_rank_writes_its_own_part_and_of_what_all_keep_an_even_one() -> None:
    values = torch.arange(30.0)
    whole = {kind: values[:7] + at for at, kind in enumerate(KINDS)}
    owned = [
        Owned("all", (7,), 0, 7, whole, replicated=True),
        Owned("few", (2,), 0, 2, {"param": values[:2]}, replicated=True),
        Owned("mine", (5, 6), 11, 14, {"param": values[11:14]}),
        Owned("none", (9,), 4, 4, {"param": values[:0]}),
    ]
    module = torch.nn.BatchNorm1d(2)
    engine: Any = SimpleNamespace(owned=lambda: owned, deepspeed=SimpleNamespace(module=module))
    found = [shard_of(engine, mesh_of(rank, 3)) for rank in range(3)]
    assert [shard.file for shard in found] == [f"r0000{rank}.safetensors" for rank in range(3)]
    assert [shard.rank for shard in found] == [0, 1, 2]
    parts = [[(share.name, share.shape, share.lo, share.hi) for share in shard.shares] for shard in found]
    mine = ("mine", (5, 6), 11, 14)
    assert parts == [
        [("all", (7,), 0, 3), ("few", (2,), 0, 1), mine],
        [("all", (7,), 3, 6), ("few", (2,), 1, 2), mine],
        [("all", (7,), 6, 7), mine],
    ]
    for share in (share for shard in found for share in shard.shares):
        for at, kind in enumerate(share.views):
            assert share.views[kind].tolist() == [value + at for value in range(share.lo, share.hi)]
        assert list(share.views) == (list(KINDS) if share.name == "all" else ["param"])
    assert list(found[0].buffers) == ["running_mean", "running_var", "num_batches_tracked"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 12), st.integers(1, 3)), max_size=6), st.integers(1, 90))
@example([(0, 5, 1), (0, 5, 1), (0, 1, 1)], 43)  # a byte more would hold all, in the first file and in the second
@example([(0, 10, 1), (0, 5, 1), (0, 5, 1), (0, 1, 1)], 43)
@example([(0, 5, 1)] * 4, 40)  # two fill a file
def test_files_are_filled_in_order_as_far_as_the_limit_lets_them(rows: list[tuple[int, int, int]], limit: int) -> None:
    shares = []
    for i, (lo, n, k) in enumerate(rows):
        views = {kind: torch.arange(lo, lo + n) + 100.0 * at for at, kind in enumerate(KINDS[:k])}
        shares.append(Share(f"t{i}", (50,), lo, lo + n, views))
    expected: list[list[tuple[str, int, int]]] = [[]]
    room = limit
    for i, (lo, n, k) in enumerate(rows):
        each = max(1, limit // (4 * k))
        for first in range(lo, lo + n, each):
            size = 4 * k * min(each, lo + n - first)
            if expected[-1] and size > room:
                expected.append([])
                room = limit
            expected[-1].append((f"t{i}", first, min(first + each, lo + n)))
            room -= size
    parts = list(parts_of(RankShard(12, "r00012.safetensors", shares, {"b": torch.ones(1)}), limit))
    assert [[(share.name, share.lo, share.hi) for share in part.shares] for part in parts] == expected
    assert [list(part.buffers) for part in parts] == [["b"]] + [[]] * (len(parts) - 1)
    more = [f"r00012.part-{number:05d}.safetensors" for number in range(1, len(parts))]
    assert [part.file for part in parts] == ["r00012.safetensors", *more] and {part.rank for part in parts} == {12}
    for share in (share for part in parts for share in part.shares):
        assert share.shape == (50,) and list(share.views) == list(KINDS[: rows[int(share.name[1:])][2]])
        for at, view in enumerate(share.views.values()):
            assert view.tolist() == [value + 100.0 * at for value in range(share.lo, share.hi)]


def test_a_file_holds_at_most_a_gibibyte_of_tensors() -> None:
    size = (1 << 28) + 1
    share = Share("w", (size,), 0, size, {"param": torch.empty(size, device="meta")})
    parts = list(parts_of(RankShard(0, "r00000.safetensors", [share], {}), layout.PART))
    assert [[(share.lo, share.hi) for share in part.shares] for part in parts] == [[(0, size - 1)], [(size - 1, size)]]


@pytest.mark.parametrize(
    "value",
    [
        Share("w", (1,), 0, 1, {}),
        RankShard(0, "f", [], {}),
        layout.Range("f", 0, 4, torch.zeros(1)),
        Piece(0, 1, "f", 8, 3),
    ],
)
def test_what_stands_for_a_part_does_not_change(value: Any) -> None:
    for field in dataclasses.fields(value):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, field.name, None)


# ------------------------------------------------------------------------------------------------- staging


@pytest.mark.parametrize("size", range(1, 26))
def test_staged_tensors_begin_at_whole_8_bytes_and_take_no_more(size: int) -> None:
    assert layout._padded(torch.zeros(size, dtype=torch.uint8)) == next(n for n in range(0, 99, 8) if n >= size)
    assert layout._padded(torch.zeros(size)) == next(n for n in range(0, 999, 8) if n >= 4 * size)


def test_staging_takes_new_memory_only_for_a_larger_shard() -> None:
    staging = Staging()
    sizes, addresses = [40, 3, 40, 41, 40], []
    for size in sizes:
        shard = RankShard(3, "file", [Share("w", (99,), 5, 5 + size, {"param": torch.arange(float(size))})], {})
        copied = staging.copy(shard)
        assert (copied.rank, copied.file) == (3, "file")
        (share,) = copied.shares
        assert (share.name, share.shape, share.lo, share.hi) == ("w", (99,), 5, 5 + size)
        assert share.views["param"].tolist() == list(range(size))
        addresses.append(staging._memory.data_ptr())
        assert staging._memory.numel() == 4 * (40 if len(addresses) < 4 else 42)
    assert addresses[0] == addresses[1] == addresses[2] and addresses[3] == addresses[4]


def test_a_copy_of_a_trained_tensor_carries_no_gradient() -> None:
    weights = torch.ones(4, requires_grad=True)
    copied = Staging().copy(RankShard(0, "f", [Share("w", (4,), 0, 4, {"param": weights})], {"b": weights[:1]}))
    assert not copied.shares[0].views["param"].requires_grad and not copied.buffers["b"].requires_grad


class OnDevice(torch.Tensor):
    """Says of itself that it lies on a GPU."""

    is_cuda = True


@pytest.mark.parametrize("on_device", [True, False])
def test_a_copy_from_the_device_goes_to_pinned_memory_and_is_waited_for(
    on_device: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[Any] = []
    empty = torch.empty

    def noted(*sizes: Any, pin_memory: bool, **rest: Any) -> torch.Tensor:
        said.append(("pinned", pin_memory))
        return empty(*sizes, **rest)

    staging, plain = Staging(), torch.arange(4.0)
    tensor = plain.as_subclass(OnDevice) if on_device else plain
    monkeypatch.setattr(layout.torch, "empty", noted)
    monkeypatch.setattr(layout.torch.cuda, "synchronize", lambda: said.append(staging._memory[:16].clone()))
    copied = staging.copy(RankShard(0, "f", [Share("w", (4,), 0, 4, {"param": tensor})], {"b": torch.ones(1)}))
    assert copied.shares[0].views["param"].tolist() == [0, 1, 2, 3] and copied.buffers["b"].tolist() == [1]
    assert said[0] == ("pinned", on_device)
    assert [held.view(torch.float32).tolist() for held in said[1:]] == [[0, 1, 2, 3]] * on_device


# --------------------------------------------------------------------------------------------- what is told


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_of_an_even_split_only_rank_0_tells_its_slices_and_the_index_lists_none(world: int, tmp_path: Path) -> None:
    shards = [even_shard(rank, world, {"n": torch.tensor([9])}) for rank in range(world)]
    full = reports_of(tmp_path, shards)
    told = [told_of([report], world) for report in full]
    assert told[0] == [full[0]]
    for rank in range(1, world):
        assert told[rank] == [{key: value for key, value in full[rank].items() if key != "slices"}]
    index = index_of([report for reports in told for report in reports], open_storage(tmp_path))
    assert index == {
        "names": list(SHAPES), "shapes": [list(shape) for shape in SHAPES.values()],
        "kinds": [1 if name in FROZEN else 3 for name in SHAPES], "heads": [report["head"] for report in full],
        "parts": [report["name"] for report in full],
        "buffers": {"n": ["r00000.safetensors", "I64", [1], full[0]["buffers"]["n"][2]]}, "own_buffers": {},
    }  # fmt: skip
    assert read_all(tmp_path, index).buffer("n").tolist() == [9]


def moved(report: dict[str, Any], **at: int) -> dict[str, Any]:
    """With the numbers of its last slice a little off."""
    name, shape, lo, hi, begin, kinds = report["slices"][-1]
    last = [name, shape, lo + at.get("lo", 0), hi + at.get("hi", 0), begin + at.get("begin", 0), kinds]
    return report | {"slices": [*report["slices"][:-1], last]}


@pytest.mark.parametrize("at", [{"lo": -1}, {"lo": 1}, {"hi": -1}, {"hi": 1}, {"begin": -4}, {"begin": 4}])
@pytest.mark.parametrize("rank", [0, 1])
def test_slices_that_an_even_split_would_not_give_are_told_and_listed(
    at: dict[str, int], rank: int, tmp_path: Path
) -> None:
    full = reports_of(tmp_path, [even_shard(rank, 2) for rank in range(2)])
    full[rank] = moved(full[rank], **at)
    assert told_of([full[1]], 2) == ([full[1]] if rank else [{k: v for k, v in full[1].items() if k != "slices"}])
    index = index_of([told_of([report], 2)[0] for report in full], open_storage(tmp_path))
    assert list(index["files"]) == ["r00000.safetensors", "r00001.safetensors"]
    for report in full:
        rows = [[list(SHAPES).index(name), *where] for name, _, *where in report["slices"]]
        assert index["files"][report["name"]] == rows


def test_a_rank_with_several_files_tells_of_all_their_slices(tmp_path: Path) -> None:
    parts = [part for rank in range(2) for part in parts_of(even_shard(rank, 2), 50)]
    full = reports_of(tmp_path, parts)
    mine = [[report for report in full if report["rank"] == rank] for rank in range(2)]
    assert all(len(reports) > 1 and told_of(reports, 2) == reports for reports in mine)
    index = index_of(full, open_storage(tmp_path))
    assert list(index["files"]) == [part.file for part in parts]
    read_all(tmp_path, index)


def even_reports(folder: Path, world: int = 3) -> list[dict[str, Any]]:
    """As rank 0 hears them: 1 and 2 tell no slices."""
    full = reports_of(folder, [even_shard(rank, world) for rank in range(world)])
    return [full[0], *({key: value for key, value in report.items() if key != "slices"} for report in full[1:])]


def test_only_where_every_rank_has_one_file_of_an_even_split_the_index_is_short(tmp_path: Path) -> None:
    even = even_reports(tmp_path)
    storage = open_storage(tmp_path)
    assert "parts" in index_of(even, storage)
    told = layout._slices_in(storage, even[2])
    for others in (
        [even[0], even[1], even[2] | {"slices": told}],  # one told its slices
        [even[0], even[2], even[1]],  # out of order
        [even[0], even[1], even[2] | {"rank": 1}],  # two files of rank 1
        [even[0], even[1], even[2] | {"rank": 3}],  # none of rank 2
        [even[0] | {"rank": 1}, even[1], even[2]],
        [even[0], even[1], even[2] | {"bytes": even[2]["bytes"] + 4}],  # more than its part
        [even[0], even[1], even[2] | {"bytes": even[2]["bytes"] - 4}],
        [even[0], even[1] | {"bytes": even[1]["bytes"] - 4}, even[2]],
        [moved(even[0], hi=1), even[1], even[2]],
        even[:2],  # the split is of three
    ):
        index = index_of(copy.deepcopy(others), storage)
        assert "parts" not in index and list(index["files"]) == [report["name"] for report in others]


def test_ranks_count_by_themselves_where_their_parts_are_of_one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has half of four elements: by its size alone a file may be of either."""
    slices = [["a", [4], 0, 2, 100, 3]]
    first = {"name": "x", "rank": 0, "head": 100, "bytes": 124, "buffers": {}, "slices": slices}
    second = {"name": "y", "head": 100, "bytes": 124, "buffers": {}}
    monkeypatch.setattr(layout, "_slices_in", lambda *_: [["a", [4], 2, 4, 100, 3]])
    assert "parts" in index_of([first, second | {"rank": 1}])
    for rank, size in ((0, 124), (2, 124), (2, 100)):
        index = index_of([first, second | {"rank": rank, "bytes": size}])
        assert index["files"] == {"x": [[0, 0, 2, 100, 3]], "y": [[0, 2, 4, 100, 3]]}


def test_who_told_no_slices_and_is_no_part_of_an_even_split_is_asked_by_its_file(tmp_path: Path) -> None:
    full = reports_of(tmp_path, [even_shard(rank, 3) for rank in range(3)])
    silent = [{key: value for key, value in report.items() if key != "slices"} for report in full]
    index = index_of([silent[0], full[1], silent[2]], open_storage(tmp_path))
    assert index == index_of(full) and "files" in index
    read_all(tmp_path, index)


def test_the_slices_of_a_file_end_where_its_first_buffer_or_the_file_does(tmp_path: Path) -> None:
    """So a rank whose buffers stand behind the slices is a part of an even split all the same."""
    buffers = {"z": torch.arange(3), "y": torch.ones(2)}
    full = reports_of(tmp_path, [even_shard(rank, 2, buffers) for rank in range(2)])
    assert [layout._slices_end(report) for report in full] == [report["buffers"]["z"][2] for report in full]
    assert layout._slices_end(full[0] | {"buffers": {}}) == full[0]["bytes"]
    assert "parts" in index_of([told_of([report], 2)[0] for report in full])


def test_ranks_without_parameters_have_an_index_too(tmp_path: Path) -> None:
    shards = [RankShard(rank, f"r{rank:05d}.safetensors", [], {"n": torch.tensor([rank])}) for rank in range(2)]
    index = index_of([told_of([report], 2)[0] for report in reports_of(tmp_path, shards)])
    assert [index[key] for key in ("names", "shapes", "kinds")] == [[], [], []] and len(index["parts"]) == 2
    open_storage(tmp_path).put_if_absent("index.json", json.dumps(index).encode())
    assert [Slices(str(tmp_path)).buffer("n", rank).tolist() for rank in range(2)] == [[0], [1]]


# --------------------------------------------------------------------------------------------- what is read


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 3)), min_size=1, max_size=5),
    st.integers(1, 7),
    st.integers(0, 10**6),
)
def test_the_pieces_of_an_even_split_are_those_of_a_loop(rows: list[tuple[int, int]], world: int, seed: int) -> None:
    draw = random.Random(seed)
    heads, files = [draw.randint(8, 99) for _ in range(world)], [f"f{rank}" for rank in range(world)]
    even = Even([size for size, _ in rows], [kinds for _, kinds in rows], files, heads)
    pieces: list[list[Piece]] = [[] for _ in rows]
    for rank in range(world):
        at, begins = heads[rank], []
        for number, (size, kinds) in enumerate(rows):
            lo, hi = split(size, rank, world)
            begins.append(at)
            if lo < hi:
                pieces[number].append(Piece(lo, hi, f"f{rank}", at, kinds))
            at += 4 * kinds * (hi - lo)
        assert even.begins(rank).tolist() == [*begins, at]
    for number, (size, kinds) in enumerate(rows):
        assert even.kinds(number) == kinds
        lo = draw.randrange(size)
        hi = draw.randint(lo + 1, size + 3)
        wanted = [piece for piece in pieces[number] if piece.lo < hi and piece.hi > lo]
        assert list(even.pieces(number, lo, hi)) == wanted


def test_the_pieces_of_a_listed_split_are_sorted_and_those_that_hold_an_interval() -> None:
    files = {"x": [[0, 8, 12, 100, 3], [1, 0, 5, 200, 1]], "y": [[0, 0, 3, 300, 2], [0, 3, 8, 400, 3]]}
    listed = Listed(3, files)
    pieces = [Piece(0, 3, "y", 300, 2), Piece(3, 8, "y", 400, 3), Piece(8, 12, "x", 100, 3)]
    for lo in range(12):
        for hi in range(lo + 1, 14):
            assert list(listed.pieces(0, lo, hi)) == [piece for piece in pieces if piece.lo < hi and piece.hi > lo]
    assert [listed.kinds(number) for number in range(3)] == [2, 1, 0]
    assert list(listed.pieces(1, 0, 5)) == [Piece(0, 5, "x", 200, 1)] and list(listed.pieces(2, 0, 5)) == []


def test_ranges_are_read_in_runs_that_touch_of_at_most_a_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "BUFFER", 16)
    tensors = {start: torch.zeros(stop - start) for start, stop in ((0, 9), (9, 11), (20, 24), (24, 25))}
    ranges = [layout.Range("x", 4 * start, 4 * (start + len(into)), into) for start, into in tensors.items()]
    ranges.append(layout.Range("y", 100, 104, torch.zeros(1)))  # begins where the last ends, in another file
    runs = [[(part.file, part.start, part.stop, part.into.numel()) for part in run] for run in layout._runs(ranges)]
    assert runs == [
        [("x", 0, 16, 4)], [("x", 16, 32, 4)], [("x", 32, 36, 1), ("x", 36, 44, 2)], [("x", 80, 96, 4)],
        [("x", 96, 100, 1)], [("y", 100, 104, 1)],
    ]  # fmt: skip
    parts = [part for run in layout._runs(ranges) for part in run]
    assert [part.into.data_ptr() for part in parts[:3]] == [tensors[0].data_ptr() + at for at in (0, 16, 32)]
    assert list(layout._runs([])) == []


def test_a_tensor_in_training_is_filled_too(tmp_path: Path) -> None:
    slices = read_all(tmp_path, index_of(even_reports(tmp_path), open_storage(tmp_path)))
    into = torch.zeros(12, requires_grad=True)
    slices.fill([("exp_avg", "a", 0, into)])
    assert torch.equal(into.detach().view(3, 4), VALUES["exp_avg/a"]) and into.is_leaf


def test_what_reading_asks_beyond_the_end_or_of_another_name_is_refused_by_what_there_is(tmp_path: Path) -> None:
    index = index_of(even_reports(tmp_path), open_storage(tmp_path))
    slices = read_all(tmp_path, index)
    with pytest.raises(DataError, match="has param of a only up to element 12 of 13; it belongs to another model"):
        slices.interval("param", "a", 10, 13)
    with pytest.raises(DataError, match="has param of other only up to element 2 of 5"):
        slices.interval("param", "other", 2, 5)
    with pytest.raises(DataError, match="has exp_avg_sq of b only up to element 0 of 5"):
        slices.whole("exp_avg_sq", "b")
    assert [(piece.lo, piece.hi) for piece in slices.pieces("a")] == [(0, 4), (4, 8), (8, 12)]
    assert not any(tensor.requires_grad for tensor in (slices.whole("param", "a"), slices.interval("param", "a", 0, 3)))


def test_a_buffer_is_the_rank_s_own_where_it_has_one_and_an_empty_one_is_not_read(tmp_path: Path) -> None:
    same = {"e": torch.empty(0, 3), "s": torch.tensor(1)}
    shards = [
        RankShard(rank, f"r{rank:05d}.safetensors", [], {"m": torch.tensor([rank, 1])} | same) for rank in range(3)
    ]
    reports = reports_of(tmp_path, shards)
    index = index_of(reports)
    assert index["own_buffers"] == {
        str(rank): {"m": [f"r{rank:05d}.safetensors", "I64", [2], reports[rank]["buffers"]["m"][2]]} for rank in (1, 2)
    }
    open_storage(tmp_path).put_if_absent("index.json", json.dumps(index).encode())
    slices = Slices(str(tmp_path))
    assert slices.buffers == ["m", "e", "s"] and slices.buffer("e", 2).shape == (0, 3)
    assert [slices.buffer("m", rank).tolist() for rank in range(3)] == [[0, 1], [1, 1], [2, 1]]
    assert slices.buffer("m").tolist() == [0, 1] and slices.buffer("s").shape == ()
