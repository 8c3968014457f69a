"""Slices on disk: any interval, any world, only the bytes asked for, and files that the safetensors library reads."""

import itertools
import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from data_pipeline.errors import DataError
from data_pipeline.storage import LocalStorage, open_storage
from pretrain.checkpoint import layout
from pretrain.checkpoint.layout import (
    RankShard,
    Share,
    Slices,
    Staging,
    even_part,
    index_of,
    parse_index,
    parts_of,
    write_shard,
)
from pretrain.checkpoint.trained import load_trained
from tests.pretrain.checkpoint.simulated import KINDS, config_of, folder_of, write


def stored(folder: Path, shards: list[RankShard]) -> Slices:
    storage = open_storage(folder)
    reports = [write_shard(storage, shard) for shard in shards]
    storage.put_if_absent("index.json", json.dumps(index_of(reports)).encode())
    return Slices(str(folder))


def squares(*intervals: tuple[int, int]) -> list[RankShard]:
    """The 23 squares as `param`, one and two more as moments, in one file for each interval."""
    values = torch.arange(23, dtype=torch.float32) ** 2
    return [
        RankShard(
            rank,
            f"r{rank:05d}.safetensors",
            [Share("w", (23,), lo, hi, {kind: values[lo:hi] + i for i, kind in enumerate(KINDS)})],
            {},
        )
        for rank, (lo, hi) in enumerate(intervals)
    ]


@pytest.mark.slow
def test_any_interval_is_what_a_loop_over_the_whole_array_gives(tmp_path: Path) -> None:
    values = np.arange(23, dtype=np.float32) ** 2
    slices = stored(tmp_path, squares((0, 7), (7, 8), (8, 23)))
    for lo in range(23):
        for hi in range(lo + 1, 24):
            for i, kind in enumerate(KINDS):
                expected = [float(values[at]) + i for at in range(lo, hi)]
                assert slices.interval(kind, "w", lo, hi).tolist() == expected


@pytest.mark.parametrize("buffer", [4, 8, 20, 1 << 20])
def test_many_tensors_are_read_alike_whatever_the_buffer(
    buffer: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "BUFFER", buffer)
    draw = random.Random(3)
    whole = {f"t{i}": torch.randn(draw.randint(1, 40)) for i in range(12)}
    shards = []
    for rank in range(3):
        bounds = {name: (len(t) * rank // 3, len(t) * (rank + 1) // 3) for name, t in whole.items()}
        shares = [
            Share(name, (len(whole[name]),), lo, hi, {k: whole[name][lo:hi] * i for i, k in enumerate(KINDS, 1)})
            for name, (lo, hi) in bounds.items()
            if lo < hi
        ]
        shards.append(RankShard(rank, f"r{rank:05d}.safetensors", shares, {}))
    slices = stored(tmp_path, shards)
    wanted = [(kind, name, lo, torch.empty(hi - lo)) for kind in KINDS for name, t in whole.items()
              for lo, hi in itertools.pairwise(sorted({0, len(t) // 2, len(t)}))]  # fmt: skip
    slices.fill(wanted)
    for kind, name, lo, tensor in wanted:
        assert torch.equal(tensor, whole[name][lo : lo + len(tensor)] * (KINDS.index(kind) + 1))


def test_only_the_bytes_of_the_interval_are_read_and_touching_ones_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slices = stored(tmp_path, squares((0, 10), (10, 23)))
    read: list[tuple[str, int]] = []
    original = LocalStorage.get_range

    def counted(self: LocalStorage, name: str, start: int, stop: int) -> bytes:
        read.append((name, stop - start))
        return original(self, name, start, stop)

    monkeypatch.setattr(LocalStorage, "get_range", counted)
    slices.interval("param", "w", 8, 13)
    assert sorted(read) == [("r00000.safetensors", 2 * 4), ("r00001.safetensors", 3 * 4)]
    read.clear()
    slices.fill([(kind, "w", 0, torch.empty(10)) for kind in KINDS])  # they stand together in the file
    assert read == [("r00000.safetensors", 3 * 10 * 4)]


def test_what_is_written_is_what_the_safetensors_library_reads(tmp_path: Path) -> None:
    buffers = {
        "count": torch.tensor(7), "mask": torch.tensor([True, False]), "half": torch.ones(3, dtype=torch.bfloat16),
        "empty": torch.empty(0, 4), "matrix": torch.randn(2, 3),
    }  # fmt: skip
    share = Share("w", (2, 3), 1, 4, {kind: torch.randn(3) for kind in KINDS})
    shard = Staging().copy(RankShard(0, "r00000.safetensors", [share], buffers))
    slices = stored(tmp_path, [shard])
    theirs = load_file(tmp_path / "r00000.safetensors")
    assert theirs.keys() == {f"buffer/{name}" for name in buffers} | {f"{kind}/w" for kind in KINDS}
    for name, buffer in buffers.items():
        for found in (slices.buffer(name), theirs[f"buffer/{name}"]):
            assert found.dtype == buffer.dtype and torch.equal(found, buffer)
    for kind in KINDS:
        assert torch.equal(theirs[f"{kind}/w"], share.views[kind])
        assert torch.equal(slices.interval(kind, "w", 1, 4), share.views[kind])


def test_what_reading_holds_in_memory_is_a_few_buffers_whatever_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the tensors that are filled: no file, no whole shard, however it was cut."""
    values = torch.randn(2_000_000)
    shares = [Share("w", (2_000_000,), 0, 2_000_000, {kind: values for kind in KINDS})]
    slices, into = stored(tmp_path, [RankShard(0, "r00000.safetensors", shares, {})]), torch.empty(1_000_000)
    monkeypatch.setattr(layout, "BUFFER", 1 << 16)
    tracemalloc.start()
    slices.fill([("exp_avg", "w", 500_000, into)])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert torch.equal(into, values[500_000:1_500_000])
    assert peak < 4 * layout.READERS * (1 << 16) < into.nbytes / 3


def test_staged_tensors_do_not_follow_the_originals_and_memory_is_taken_once() -> None:
    tensor = torch.arange(5.0)
    staging = Staging()
    shard = RankShard(0, "f", [Share("w", (5,), 0, 5, {"param": tensor})], {"b": torch.tensor([1, 2])})
    copy = staging.copy(shard)
    tensor += 1
    assert copy.shares[0].views["param"].tolist() == [0, 1, 2, 3, 4]
    assert copy.buffers["b"].tolist() == [1, 2]
    address = copy.shares[0].views["param"].data_ptr()
    assert staging.copy(shard).shares[0].views["param"].data_ptr() == address


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_the_weights_are_the_same_whatever_world_wrote_them(world: int, tmp_path: Path) -> None:
    model = write(tmp_path, 3, world=world)
    loaded, config, _ = load_trained(tmp_path)
    assert config == config_of(tmp_path)
    assert not loaded.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_a_missing_part_is_named_and_not_filled_in(tmp_path: Path) -> None:
    slices = stored(tmp_path, squares((0, 7), (8, 23)))
    with pytest.raises(DataError, match="param of w only up to element 7 of 23"):
        slices.whole("param", "w")
    assert slices.interval("param", "w", 9, 11).tolist() == [81, 100]


def test_a_frozen_parameter_has_no_moments_to_read(tmp_path: Path) -> None:
    frozen = Share("w", (4,), 0, 4, {"param": torch.ones(4)})
    slices = stored(tmp_path, [RankShard(0, "r00000.safetensors", [frozen], {})])
    assert slices.kinds("w") == ("param",)
    with pytest.raises(DataError, match="exp_avg of w"):
        slices.interval("exp_avg", "w", 0, 4)


@pytest.mark.parametrize("limit", [4, 100, 1000, 10**9])
def test_a_shard_in_files_of_any_size_reads_as_one(limit: int, tmp_path: Path) -> None:
    """S3 takes no more than 5 GiB at once: a rank's part of a big model is several objects."""
    sizes = {"a": 30, "b": 7, "c": 1, "d": 60}
    tensors = {f"{kind}/{name}": torch.randn(size) for name, size in sizes.items() for kind in KINDS}
    shares = [
        Share(name, (size,), 0, size, {kind: tensors[f"{kind}/{name}"] for kind in KINDS})
        for name, size in sizes.items()
    ]
    parts = list(parts_of(RankShard(3, "r00003.safetensors", shares, {"steps": torch.tensor([7])}), limit))
    files = [part.file for part in parts]
    assert files[0] == "r00003.safetensors" and len(set(files)) == len(files) and (len(files) == 1) == (limit == 10**9)
    slices = stored(tmp_path, parts)
    for name in sizes:
        for kind in KINDS:
            assert torch.equal(slices.whole(kind, name), tensors[f"{kind}/{name}"])
    assert slices.buffer("steps").tolist() == [7]
    for path in tmp_path.glob("r*"):
        data = path.read_bytes()
        assert len(data) - 8 - int.from_bytes(data[:8], "little") <= max(limit, 3 * 4) + 8  # and the buffer


def test_each_rank_has_its_own_buffers_back_and_only_those_that_differ_are_listed(tmp_path: Path) -> None:
    shards = [
        RankShard(
            rank, f"r{rank:05d}.safetensors", [], {"mean": torch.tensor([float(rank % 2)]), "count": torch.tensor(5)}
        )
        for rank in range(3)
    ]
    slices = stored(tmp_path, shards)
    assert [slices.buffer("mean", rank).item() for rank in range(4)] == [0, 1, 0, 0]
    assert {slices.buffer("count", rank).item() for rank in range(3)} == {5}
    index = json.loads((tmp_path / "index.json").read_text())
    assert {rank: list(named) for rank, named in index["own_buffers"].items()} == {"1": ["mean"]}


def test_an_index_of_a_thousand_ranks_stays_small(tmp_path: Path) -> None:
    names = [f"model.encoder.blocks.{i}.attention.qkv.weight" for i in range(60)]
    report: dict[str, Any] = {"rank": 0, "buffers": {}}
    reports = [
        report | {"name": f"r{rank:05d}", "slices": [[name, [768, 768], 0, 590, 12345678, 3] for name in names]}
        for rank in range(1000)
    ]
    text = json.dumps(index_of(reports), separators=(",", ":"))
    assert len(text) < 30 * len(names) * len(reports)


def test_a_rank_file_is_read_back_from_the_folder_that_a_run_wrote(tmp_path: Path) -> None:
    model = write(tmp_path, 3, world=3)
    whole = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    found = {name: torch.zeros_like(tensor).flatten() for name, tensor in whole.items()}
    for path in sorted(folder_of(tmp_path, 0).glob("r*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        tensors = load_file(path)
        for name, (shape, lo, hi) in json.loads(header["__metadata__"]["slices"]).items():
            assert tuple(shape) == whole[name].shape
            found[name][lo:hi] = tensors[f"param/{name}"]
    assert all(torch.equal(found[name].view_as(tensor), tensor) for name, tensor in whole.items())


def share_of(name: str, lo: int, hi: int) -> Share:
    return Share(name, (99,), lo, hi, {"param": torch.arange(lo, hi, dtype=torch.float32)})


def test_a_file_is_filled_to_its_limit_and_no_further() -> None:
    """40 bytes are ten elements: two shares fill one file exactly, and a larger share is cut where a file ends."""
    shares = [share_of("x", 0, 5), share_of("y", 7, 12), share_of("z", 3, 4), share_of("w", 30, 55)]
    parts = list(parts_of(RankShard(3, "r00003.safetensors", shares, {"steps": torch.tensor([7])}), 40))
    assert [[(share.name, share.lo, share.hi) for share in part.shares] for part in parts] == [
        [("x", 0, 5), ("y", 7, 12)], [("z", 3, 4)], [("w", 30, 40)], [("w", 40, 50)], [("w", 50, 55)],
    ]  # fmt: skip
    assert [part.file for part in parts] == [
        "r00003.safetensors", *(f"r00003.part-{number:05d}.safetensors" for number in (1, 2, 3, 4)),
    ]  # fmt: skip
    assert [list(part.buffers) for part in parts] == [["steps"], [], [], [], []]
    assert all(share.views["param"].tolist() == list(range(share.lo, share.hi)) for p in parts for share in p.shares)


@pytest.mark.parametrize(
    ("size", "world", "parts"),
    [
        (10, 4, [(0, 3), (3, 6), (6, 9), (9, 10)]),
        (4, 3, [(0, 2), (2, 4), (4, 4)]),
        (6, 3, [(0, 2), (2, 4), (4, 6)]),
        (1, 2, [(0, 1), (1, 1)]),
        (0, 2, [(0, 0), (0, 0)]),
    ],
)
def test_an_even_split_is_this(size: int, world: int, parts: list[tuple[int, int]]) -> None:
    assert [even_part(size, rank, world) for rank in range(world)] == parts


LISTED: dict[str, Any] = {
    "names": ["a", "b"], "shapes": [[2, 3], [4]], "files": {"r.safetensors": [[0, 0, 6, 8, 3], [1, 1, 4, 80, 1]]},
    "buffers": {"n": ["r.safetensors", "I64", [1], 120]}, "own_buffers": {},
}  # fmt: skip
EVEN = {key: value for key, value in LISTED.items() if key != "files"} | {
    "kinds": [3, 1], "heads": [8], "parts": ["r.safetensors"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("index", "fits"),
    [
        (LISTED, True),
        (LISTED | {"later": 1}, True),
        (LISTED | {"files": {"r.safetensors": [[0, 0, 7, 8, 3]]}}, False),
        (LISTED | {"files": {"r.safetensors": [[0, 6, 6, 8, 3]]}}, False),
        (LISTED | {"files": {"r.safetensors": [[2, 0, 1, 8, 3]]}}, False),
        (LISTED | {"files": {"r.safetensors": [[0, 0, 6, 8, 5]]}}, False),
        (LISTED | {"names": ["a", "a"]}, False),
        (LISTED | {"names": ["a"]}, False),
        (LISTED | {"shapes": [[2, 3], [2**49]]}, False),
        (LISTED | {"buffers": {"n": ["r.safetensors", "I65", [1], 120]}}, False),
        (LISTED | {"own_buffers": {"1": {"n": ["r.safetensors", "I65", [1], 120]}}}, False),
        (EVEN, True),
        (EVEN | {"kinds": [3]}, False),
        (EVEN | {"heads": [8, 8]}, False),
        (EVEN | {"heads": [], "parts": []}, False),
    ],
)
def test_an_index_that_contradicts_itself_is_refused(index: dict[str, Any], fits: bool) -> None:
    data = json.dumps(index).encode()
    if fits:
        found = parse_index(data, "there")
        assert found.keys() == index.keys() and found["names"] == ["a", "b"]
    else:
        with pytest.raises(DataError, match="there"):
            parse_index(data, "there")
