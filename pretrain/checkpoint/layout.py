"""Slices of tensors -> safetensors files per rank, written in one pass; byte ranges of such files -> slices.

In a file the tensors of one slice are adjacent: `param`, `exp_avg`, `exp_avg_sq`, `ema` in this order, float32, little
endian, under the keys KIND/NAME. The index gives the offset of each slice, so that a reader requests nothing else.

Stages 0 and 3 split every parameter evenly over the ranks. An even split follows from names, shapes and world size, so
only rank 0 reports its slices and the index does not list them, which would take ranks x parameters entries.
"""

import bisect
import dataclasses
import hashlib
import itertools
import json
import math
import struct
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Annotated, Any, NotRequired

import numpy as np
import torch
from pydantic import Field, with_config
from torch import Tensor
from typing_extensions import TypedDict

from data_pipeline import gate
from data_pipeline.errors import DataError
from data_pipeline.storage import Storage, open_storage
from pretrain.checkpoint.catalog import BUFFER, DAMAGED, INDEX, file_fault

if TYPE_CHECKING:
    from pretrain.engine.engine import Engine
    from pretrain.runtime.mesh import Mesh

KINDS = ("param", "exp_avg", "exp_avg_sq", "ema")
ITEM = 4  # bytes of a float32
READERS = 4
PART = 1 << 30
"""Maximum bytes of tensors per file: S3 accepts five times as much at once, but a failed upload is repeated whole."""
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8}
DTYPES |= {"U8": torch.uint8, "BOOL": torch.bool}
NAMES_OF_DTYPES = {dtype: name for name, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Share:
    """The part of one parameter that one rank writes: flat float32 views [hi - lo] by kind."""

    name: str
    shape: tuple[int, ...]
    lo: int
    hi: int
    views: dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class RankShard:
    """Contents of one file of a rank before it is written: shares, and buffers by name."""

    rank: int
    file: str
    shares: list[Share]
    buffers: dict[str, Tensor]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (key, tensor) in file order."""
        for share in self.shares:
            yield from ((f"{kind}/{share.name}", share.views[kind]) for kind in KINDS if kind in share.views)
        yield from ((f"buffer/{name}", tensor) for name, tensor in self.buffers.items())


def shard_of(engine: "Engine", mesh: "Mesh") -> RankShard:
    """Return what this rank writes, as views of the engine: its own parts, and an even part of replicated tensors."""
    shares = []
    for owned in engine.owned():
        lo, hi = owned.lo, owned.hi
        if owned.replicated:
            lo, hi = even_part(hi, mesh.rank, mesh.world)
        if lo < hi:
            views = {kind: view[lo - owned.lo : hi - owned.lo] for kind, view in owned.tensors.items()}
            shares.append(Share(owned.name, owned.shape, lo, hi, views))
    return RankShard(mesh.rank, _file(mesh.rank, 0), shares, dict(engine.deepspeed.module.named_buffers()))


def _file(rank: int, part: int) -> str:
    return f"r{rank:05d}.safetensors" if part == 0 else f"r{rank:05d}.part-{part:05d}.safetensors"


def parts_of(shard: RankShard, limit: int) -> Iterator[RankShard]:
    """Split the shard into files with at most `limit` bytes of slices each; the first one takes the buffers."""
    part, held, buffers = list[Share](), 0, shard.buffers
    number = 0
    for share in (piece for whole in shard.shares for piece in _cut_share(whole, limit)):
        size = (share.hi - share.lo) * ITEM * len(share.views)
        if part and held + size > limit:
            yield RankShard(shard.rank, _file(shard.rank, number), part, buffers)
            part, held, buffers, number = [], 0, {}, number + 1
        part.append(share)
        held += size
    yield RankShard(shard.rank, _file(shard.rank, number), part, buffers)


def _cut_share(whole: Share, limit: int) -> Iterator[Share]:
    step = max(1, limit // (ITEM * len(whole.views)))
    for lo in range(whole.lo, whole.hi, step):
        hi = min(lo + step, whole.hi)
        views = {kind: view[lo - whole.lo : hi - whole.lo] for kind, view in whole.views.items()}
        yield Share(whole.name, whole.shape, lo, hi, views)


class Staging:
    """Host memory for one rank's shard, allocated once and reused for every save."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    @torch.no_grad()
    def copy(self, shard: RankShard) -> RankShard:
        """Copy the shard to host memory. When this returns, the device tensors may be changed again."""
        sizes = [_padded(tensor) for _, tensor in shard.tensors()]
        on_cuda = any(tensor.is_cuda for _, tensor in shard.tensors())
        if self._memory.numel() < sum(sizes):
            self._memory = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=on_cuda)
        blocks = self._memory[: sum(sizes)].split(sizes)
        staged = {key: _staged(tensor, block) for (key, tensor), block in zip(shard.tensors(), blocks, strict=True)}
        shares = [
            dataclasses.replace(share, views={kind: staged[f"{kind}/{share.name}"] for kind in share.views})
            for share in shard.shares
        ]
        buffers = {name: staged[f"buffer/{name}"] for name in shard.buffers}
        if on_cuda:
            torch.cuda.synchronize()
        return RankShard(shard.rank, shard.file, shares, buffers)


def _padded(tensor: Tensor) -> int:
    """Return the bytes of a tensor, rounded up to a multiple of 8 so that views of any dtype are aligned."""
    return -(-tensor.numel() * tensor.element_size() // 8) * 8


def _staged(tensor: Tensor, block: Tensor) -> Tensor:
    size = tensor.numel() * tensor.element_size()
    place = block[:size].view(tensor.dtype).view(tensor.shape)
    return place.copy_(tensor, non_blocking=True)


# ------------------------------------------------------------------------------------------------ writing


def write_shard(storage: Storage, shard: RankShard) -> dict[str, Any]:
    """Write and hash a file in one pass -> its report for manifest and index.

    The report is {name, bytes, sha256, rank, head, slices, buffers}. head: bytes before the first tensor. slices: a
    list of [name, shape, lo, hi, begin, kinds]. buffers: name -> [dtype, shape, begin, digest of its bytes]. begin is
    an offset in the file.
    """
    head, starts = _header(shard)
    digest, size = hashlib.sha256(), 0
    with storage.scratch() as folder:
        path = folder / shard.file
        with path.open("wb") as file:
            for piece in itertools.chain([memoryview(head)], (_bytes(tensor) for _, tensor in shard.tensors())):
                for at in range(0, len(piece), BUFFER):
                    block = piece[at : at + BUFFER]
                    file.write(block)
                    digest.update(block)
                    size += len(block)
        if not storage.put_file_if_absent(shard.file, path):
            raise DataError(f"{storage.root}/{shard.file} exists already; another attempt wrote it")
    entry: dict[str, Any] = {"name": shard.file, "bytes": size, "sha256": digest.hexdigest()}
    if storage.root.startswith("s3://") and (fault := file_fault(storage, entry)):
        raise DataError(f"{storage.root}/{fault} after it was uploaded")
    slices = [
        [share.name, list(share.shape), share.lo, share.hi, starts[f"param/{share.name}"], len(share.views)]
        for share in shard.shares
    ]
    buffers = {
        name: [
            NAMES_OF_DTYPES[tensor.dtype], list(tensor.shape), starts[f"buffer/{name}"],
            hashlib.sha256(_bytes(tensor)).hexdigest(),
        ]
        for name, tensor in shard.buffers.items()
    }  # fmt: skip
    return entry | {"rank": shard.rank, "head": len(head), "slices": slices, "buffers": buffers}


def told_of(reports: list[dict[str, Any]], world: int) -> list[dict[str, Any]]:
    """Return what a rank reports of its files to rank 0; without slices if its one file is its part of an even split.

    Rank 0 reports its own slices in full: they supply the names for all ranks.
    """
    if len(reports) > 1 or reports[0]["rank"] == 0 or not _is_even(reports[0], world):
        return reports
    return [{key: value for key, value in reports[0].items() if key != "slices"}]


def _is_even(report: dict[str, Any], world: int) -> bool:
    """Return whether the slices are the rank's part of an even split of the same parameters, without gaps."""
    at = report["head"]
    for _, shape, lo, hi, begin, kinds in report["slices"]:
        if (lo, hi, begin) != (*even_part(math.prod(shape), report["rank"], world), at):
            return False
        at += kinds * (hi - lo) * ITEM
    return True


def even_part(size: int, rank: int, world: int) -> tuple[int, int]:
    """Return the interval [lo, hi) of a parameter of `size` elements that the rank keeps in an even split."""
    part = -(-size // world)
    return min(rank * part, size), min((rank + 1) * part, size)


def _header(shard: RankShard) -> tuple[bytes, dict[str, int]]:
    """Return (safetensors header with its length prefix, key -> offset of its bytes in the file)."""
    entries: dict[str, Any] = {}
    at = 0
    for key, tensor in shard.tensors():
        size = tensor.numel() * tensor.element_size()
        dtype, shape = NAMES_OF_DTYPES[tensor.dtype], list(tensor.shape)
        entries[key] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    slices = {share.name: [share.shape, share.lo, share.hi] for share in shard.shares}
    text = json.dumps({"__metadata__": {"slices": json.dumps(slices)}} | entries).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    return head, {key: len(head) + entry["data_offsets"][0] for key, entry in entries.items()}


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)


def index_of(reports: list[dict[str, Any]], storage: Storage | None = None) -> dict[str, Any]:
    """Build the index of all ranks' files from their reports.

    An even split is stored as names, shapes, kinds and the offset of each file's tensors. Any other is stored as names
    and shapes once, and for each file [index of name, lo, hi, begin, kinds]; slices that were not reported are then
    read from the file's header.

    buffers: name -> location in rank 0's file. own_buffers: the same by rank, only for buffers whose bytes differ from
    rank 0's (batch norm's statistics come from a rank's own samples).
    """
    first: dict[str, Any] = {}
    own: dict[str, dict[str, Any]] = {}
    for report in reports:
        for name, (dtype, shape, begin, digest) in report["buffers"].items():
            place = [report["name"], dtype, shape, begin]
            if first.setdefault(name, (digest, place))[0] != digest:
                own.setdefault(str(report["rank"]), {})[name] = place
    split = _even_index(reports) or _listed_index(reports, storage)
    return split | {"buffers": {name: place for name, (_, place) in first.items()}, "own_buffers": own}


def _listed_index(reports: list[dict[str, Any]], storage: Storage | None) -> dict[str, Any]:
    listed = [report["slices"] if "slices" in report else _slices_in(storage, report) for report in reports]
    shapes: dict[str, list[int]] = {name: shape for slices in listed for name, shape, *_ in slices}
    numbers = {name: number for number, name in enumerate(shapes)}
    files = {
        report["name"]: [[numbers[name], *where] for name, _, *where in slices]
        for report, slices in zip(reports, listed, strict=True)
    }
    return {"names": list(shapes), "shapes": list(shapes.values()), "files": files}


def _even_index(reports: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the short index of an even split, or None.

    It needs one file per rank, an even split on rank 0, no slices reported by other ranks, and file sizes that fit.
    """
    first, world = reports[0], len(reports)
    alone = all(report["rank"] == rank for rank, report in enumerate(reports))
    if not alone or any("slices" in report for report in reports[1:]) or not _is_even(first, world):
        return None
    names, shapes, *_, kinds = zip(*first["slices"], strict=True) if first["slices"] else ((), (), ())
    even = Even(
        [math.prod(shape) for shape in shapes], list(kinds), [report["name"] for report in reports],
        [report["head"] for report in reports],
    )  # fmt: skip
    if any(_slices_end(report) != even.begins(report["rank"])[-1] for report in reports):
        return None
    told = {"names": names, "shapes": shapes, "kinds": kinds}
    return {name: list(row) for name, row in told.items()} | {"heads": even.heads, "parts": even.files}


def _slices_end(report: dict[str, Any]) -> int:
    """Return the offset at which the slices of a file end; buffers follow them."""
    return min((where[2] for where in report["buffers"].values()), default=report["bytes"])


def _slices_in(storage: Storage | None, report: dict[str, Any]) -> list[Any]:
    """Return [name, shape, lo, hi, begin, kinds] of every slice, read from the header of a rank's file."""
    assert storage is not None
    header = json.loads(storage.get_range(report["name"], 8, report["head"]))
    slices = json.loads(header["__metadata__"]["slices"])
    return [
        [name, shape, lo, hi, report["head"] + header[f"param/{name}"]["data_offsets"][0],
         sum(f"{kind}/{name}" in header for kind in KINDS)]
        for name, (shape, lo, hi) in slices.items()
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------ reading


@dataclasses.dataclass(frozen=True)
class Range:
    """Bytes [start, stop) of a file, and the flat tensor to fill with them."""

    file: str
    start: int
    stop: int
    into: Tensor


@dataclasses.dataclass(frozen=True)
class Piece:
    """Elements [lo, hi) of a parameter: their file, the offset of the first kind, and the number of kinds."""

    lo: int
    hi: int
    file: str
    begin: int
    kinds: int


class Even:
    """An even split: `sizes` and number of `kinds` by parameter; `files` and their header sizes `heads` by rank."""

    def __init__(self, sizes: list[int], kinds: list[int], files: list[str], heads: list[int]) -> None:
        self.files, self.heads = files, heads
        self._sizes, self._kinds = np.array(sizes, dtype=np.int64), np.array(kinds, dtype=np.int64)
        self._parts = -(-self._sizes // len(files))
        self._begins: dict[int, np.ndarray] = {}

    def begins(self, rank: int) -> np.ndarray:
        """Return the offset of each parameter in the rank's file, and the end of the last: int64 [parameters + 1]."""
        mine = np.clip(self._sizes - rank * self._parts, 0, self._parts) * self._kinds * ITEM
        return self.heads[rank] + np.concatenate([[0], np.cumsum(mine)])

    def pieces(self, number: int, lo: int, hi: int) -> Iterator[Piece]:
        """Yield the pieces that hold [lo, hi) of a parameter, in order."""
        size, part, kinds = int(self._sizes[number]), int(self._parts[number]), int(self._kinds[number])
        for rank in range(lo // part, -(-min(hi, size) // part)):
            if rank not in self._begins:
                self._begins[rank] = self.begins(rank)
            begin = int(self._begins[rank][number])
            yield Piece(rank * part, min((rank + 1) * part, size), self.files[rank], begin, kinds)

    def kinds(self, number: int) -> int:
        """Return the number of kinds stored for a parameter."""
        return int(self._kinds[number])


class Listed:
    """A split listed in the index: the sorted pieces of each parameter."""

    def __init__(self, count: int, files: Mapping[str, Sequence[Sequence[int]]]) -> None:
        self._pieces: list[list[Piece]] = [[] for _ in range(count)]
        for file, slices in files.items():
            for number, lo, hi, begin, kinds in slices:
                self._pieces[number].append(Piece(lo, hi, file, begin, kinds))
        for pieces in self._pieces:
            pieces.sort(key=lambda piece: piece.lo)

    def pieces(self, number: int, lo: int, hi: int) -> Iterator[Piece]:
        """Yield the pieces that hold [lo, hi) of a parameter, in order."""
        found = self._pieces[number]
        first = max(0, bisect.bisect_right(found, lo, key=lambda piece: piece.lo) - 1)
        yield from itertools.takewhile(lambda piece: piece.lo < hi, itertools.islice(found, first, None))

    def kinds(self, number: int) -> int:
        """Return the number of kinds stored for a parameter."""
        return min((piece.kinds for piece in self._pieces[number]), default=0)


BufferPlace = tuple[gate.FileName, str, list[gate.Count], gate.Count]
"""Location of a buffer: file, dtype, shape, offset of its first byte."""
Kinds = Annotated[int, Field(ge=1, le=len(KINDS))]


@with_config(gate.OPEN)
class _Index(TypedDict):
    """Contents of index.json: `files` for a listed split; `kinds`, `heads` and `parts` for an even one."""

    names: list[gate.ParameterName]
    shapes: list[list[gate.Count]]
    files: NotRequired[dict[gate.FileName, list[tuple[gate.Count, gate.Count, gate.Count, gate.Count, Kinds]]]]
    kinds: NotRequired[list[Kinds]]
    heads: NotRequired[list[gate.Count]]
    parts: NotRequired[list[gate.FileName]]
    buffers: dict[gate.ParameterName, BufferPlace]
    own_buffers: dict[str, dict[gate.ParameterName, BufferPlace]]


def parse_index(data: bytes, where: str) -> _Index:
    """Parse the bytes of an index.json. Raises DataError if they are not an index or contradict themselves."""
    index: _Index = gate.parse(_Index, data, where, DAMAGED)
    names, sizes = index["names"], [math.prod(shape) for shape in index["shapes"]]
    places = [*index["buffers"].values(), *(place for own in index["own_buffers"].values() for place in own.values())]
    fits = len(set(names)) == len(names) == len(sizes) and max(sizes, default=0) <= gate.LARGEST
    fits = fits and all(dtype in DTYPES and math.prod(shape) <= gate.LARGEST for _, dtype, shape, _ in places)
    if "files" in index:
        slices = (piece for pieces in index["files"].values() for piece in pieces)
        fits = fits and all(number < len(sizes) and lo < hi <= sizes[number] for number, lo, hi, *_ in slices)
    else:
        kinds, heads, parts = index.get("kinds", []), index.get("heads", []), index.get("parts", [])
        fits = fits and len(kinds) == len(names) and len(heads) == len(parts) > 0
    if not fits:
        raise DataError(f"{where}: its names, shapes and slices are inconsistent; {DAMAGED}")
    return index


class Slices:
    """Reads any interval of any tensor of a checkpoint, independent of the world size and stage that wrote it."""

    def __init__(self, folder: str) -> None:
        self.folder = str(folder)
        self._thread = threading.local()  # a storage keeps open files, which threads must not share
        index = parse_index(self._storage().get(INDEX), f"{self.folder}/{INDEX}")
        self.shapes = {name: tuple(shape) for name, shape in zip(index["names"], index["shapes"], strict=True)}
        self._buffers, self._own_buffers = index["buffers"], index["own_buffers"]
        self._numbers = {name: number for number, name in enumerate(self.shapes)}
        self._split: Even | Listed
        if "files" in index:
            self._split = Listed(len(self.shapes), index["files"])
        else:
            sizes = [math.prod(shape) for shape in index["shapes"]]
            self._split = Even(sizes, index["kinds"], index["parts"], index["heads"])

    @property
    def buffers(self) -> list[str]:
        """Names of the buffers."""
        return list(self._buffers)

    def kinds(self, name: str) -> tuple[str, ...]:
        """Return the kinds of tensors stored for a parameter: a frozen one has no moments."""
        return KINDS[: self._split.kinds(self._numbers[name])]

    def pieces(self, name: str) -> list[Piece]:
        """Return all pieces of a parameter, in order."""
        return list(self._split.pieces(self._numbers[name], 0, math.prod(self.shapes[name])))

    def fill(self, wanted: Iterable[tuple[str, str, int, Tensor]]) -> None:
        """For each (kind, name, lo, flat float32 tensor [n]), read elements [lo, lo + n) into the tensor.

        Adjacent ranges of a file are read in one request of at most BUFFER bytes, with READERS threads. Raises
        DataError if a part is missing.
        """
        ranges = sorted(
            (piece for kind, name, lo, into in wanted for piece in self._ranges(kind, name, lo, into)),
            key=lambda piece: (piece.file, piece.start),
        )
        with ThreadPoolExecutor(READERS, thread_name_prefix="slices") as pool:
            for done in pool.map(self._read, _runs(ranges)):
                assert done is None

    def interval(self, kind: str, name: str, lo: int, hi: int) -> Tensor:
        """Return elements [lo, hi) of one of KINDS as float32 [hi - lo]."""
        tensor = self._empty(name, (hi - lo,), torch.float32)
        self.fill([(kind, name, lo, tensor)])
        return tensor

    def whole(self, kind: str, name: str) -> Tensor:
        """Return the whole tensor as float32 in the parameter's shape."""
        shape = torch.Size(self.shapes[name])
        return self.interval(kind, name, 0, shape.numel()).view(shape)

    def buffer(self, name: str, rank: int = 0) -> Tensor:
        """Return a buffer in its own dtype and shape, with the values that this rank saved."""
        file, dtype, shape, begin = self._own_buffers.get(str(rank), {}).get(name) or self._buffers[name]
        tensor = self._empty(name, shape, DTYPES[dtype])
        size = tensor.numel() * tensor.element_size()
        if size:
            data = self._storage().get_range(file, begin, begin + size)
            tensor.view(-1).copy_(torch.frombuffer(bytearray(data), dtype=tensor.dtype))
        return tensor

    def _empty(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        try:
            return torch.empty(tuple(shape), dtype=dtype)
        except RuntimeError:
            raise DataError(
                f"{self.folder}: {name} of shape {list(shape)} does not fit into memory; {DAMAGED}"
            ) from None

    def _ranges(self, kind: str, name: str, lo: int, into: Tensor) -> Iterator[Range]:
        at, hi, place = lo, lo + into.numel(), KINDS.index(kind)
        for piece in self._split.pieces(self._numbers[name], lo, hi) if name in self._numbers else ():
            if piece.lo <= at < min(piece.hi, hi) and place < piece.kinds:
                stop = min(piece.hi, hi)
                first = piece.begin + (place * (piece.hi - piece.lo) + at - piece.lo) * ITEM
                yield Range(piece.file, first, first + (stop - at) * ITEM, into[at - lo : stop - lo])
                at = stop
        if at < hi:
            raise DataError(
                f"{self.folder} has {kind} of {name} only up to element {at} of {hi}; it belongs to another model"
            )

    @torch.no_grad()  # needed here: grad mode is per thread
    def _read(self, run: list[Range]) -> None:
        start = run[0].start
        data = memoryview(bytearray(self._storage().get_range(run[0].file, start, run[-1].stop)))
        for piece in run:
            part = data[piece.start - start : piece.stop - start]
            piece.into.copy_(torch.frombuffer(part, dtype=torch.float32))

    def _storage(self) -> Storage:
        if not hasattr(self._thread, "storage"):
            self._thread.storage = open_storage(self.folder)
        storage: Storage = self._thread.storage
        return storage


def _runs(ranges: Iterable[Range]) -> Iterator[list[Range]]:
    """Group sorted ranges into runs of adjacent ones in one file, each of at most BUFFER bytes."""
    run: list[Range] = []
    for piece in (part for whole in ranges for part in _cut(whole)):
        touches = bool(run) and run[-1].file == piece.file and run[-1].stop == piece.start
        if run and not (touches and piece.stop - run[0].start <= BUFFER):
            yield run
            run = []
        run.append(piece)
    if run:
        yield run


def _cut(whole: Range) -> Iterator[Range]:
    """Split a range into parts of at most BUFFER bytes."""
    for start in range(whole.start, whole.stop, BUFFER):
        stop = min(start + BUFFER, whole.stop)
        at, end = (start - whole.start) // ITEM, (stop - whole.start) // ITEM
        yield Range(whole.file, start, stop, whole.into[at:end])
