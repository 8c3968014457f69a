"""Slices of tensors -> safetensors files of each rank, written in one pass; byte ranges of such files -> slices.

In a file the tensors of one slice stand together, `param`, `exp_avg`, `exp_avg_sq` in this order, float32, little
endian, under the keys KIND/NAME; the index says where each slice begins, so that a reader asks for nothing else.
"""

import dataclasses
import hashlib
import itertools
import json
import struct
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from data_pipeline.errors import DataError
from data_pipeline.storage import Storage, open_storage
from pretrain.checkpoint.catalog import BUFFER, INDEX, file_fault, read_json

if TYPE_CHECKING:
    from pretrain.engine import Engine
    from pretrain.mesh import Mesh

KINDS = ("param", "exp_avg", "exp_avg_sq")
ITEM = 4  # bytes of a float32
READERS = 4
PART = 1 << 30
"""Bytes of tensors in a file, at most: S3 takes five times as much at once, and what fails is sent again whole."""
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8}
DTYPES |= {"U8": torch.uint8, "BOOL": torch.bool}
NAMES_OF_DTYPES = {dtype: name for name, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Share:
    """What one rank writes of one parameter: flat float32 views [hi - lo] by kind."""

    name: str
    shape: tuple[int, ...]
    lo: int
    hi: int
    views: dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Shard:
    """One rank's file before it is written: shares, and buffers by name."""

    rank: int
    file: str
    shares: list[Share]
    buffers: dict[str, Tensor]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Key in the file -> tensor, in the order of the file."""
        for share in self.shares:
            yield from ((f"{kind}/{share.name}", share.views[kind]) for kind in KINDS if kind in share.views)
        yield from ((f"buffer/{name}", tensor) for name, tensor in self.buffers.items())


def shard_of(engine: "Engine", mesh: "Mesh") -> Shard:
    """What this rank writes, as views of the engine: its own parts; of what every rank keeps whole, an even part."""
    shares = []
    for owned in engine.owned():
        lo, hi = owned.lo, owned.hi
        if owned.replicated:
            part = -(-hi // mesh.world)
            lo, hi = min(mesh.rank * part, owned.hi), min((mesh.rank + 1) * part, owned.hi)
        if lo < hi:
            views = {kind: view[lo - owned.lo : hi - owned.lo] for kind, view in owned.tensors.items()}
            shares.append(Share(owned.name, owned.shape, lo, hi, views))
    return Shard(mesh.rank, _file(mesh.rank, 0), shares, dict(engine.deepspeed.module.named_buffers()))


def _file(rank: int, part: int) -> str:
    return f"r{rank:05d}.safetensors" if part == 0 else f"r{rank:05d}.part-{part:05d}.safetensors"


def parts_of(shard: Shard, limit: int = PART) -> Iterator[Shard]:
    """The shard as files of at most `limit` bytes of slices each; the buffers go with the first."""
    part, held, buffers = list[Share](), 0, shard.buffers
    number = 0
    for share in (piece for whole in shard.shares for piece in _cut_share(whole, limit)):
        size = (share.hi - share.lo) * ITEM * len(share.views)
        if part and held + size > limit:
            yield Shard(shard.rank, _file(shard.rank, number), part, buffers)
            part, held, buffers, number = [], 0, {}, number + 1
        part.append(share)
        held += size
    yield Shard(shard.rank, _file(shard.rank, number), part, buffers)


def _cut_share(whole: Share, limit: int) -> Iterator[Share]:
    step = max(1, limit // (ITEM * len(whole.views)))
    for lo in range(whole.lo, whole.hi, step):
        hi = min(lo + step, whole.hi)
        views = {kind: view[lo - whole.lo : hi - whole.lo] for kind, view in whole.views.items()}
        yield Share(whole.name, whole.shape, lo, hi, views)


class Staging:
    """Host memory of one rank's shard: taken once, used again for every save."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    @torch.no_grad()
    def copy(self, shard: Shard) -> Shard:
        """The same shard in host memory. Returns when the device may change its tensors again."""
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
        return Shard(shard.rank, shard.file, shares, buffers)


def _padded(tensor: Tensor) -> int:
    """Bytes of a tensor, up to whole 8: views of any dtype need their alignment."""
    return -(-tensor.numel() * tensor.element_size() // 8) * 8


def _staged(tensor: Tensor, block: Tensor) -> Tensor:
    size = tensor.numel() * tensor.element_size()
    place = block[:size].view(tensor.dtype).view(tensor.shape)
    return place.copy_(tensor, non_blocking=True)


# ------------------------------------------------------------------------------------------------ writing


def write_shard(storage: Storage, shard: Shard) -> dict[str, Any]:
    """Write and hash in one pass -> {name, bytes, sha256, rank, slices, buffers}: what manifest and index need.

    slices: [name, shape, lo, hi, begin, kinds] each, begin counted in the file; buffers: name -> [dtype, shape,
    begin, digest of its bytes].
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
    return entry | {"rank": shard.rank, "slices": slices, "buffers": buffers}


def _header(shard: Shard) -> tuple[bytes, dict[str, int]]:
    """-> (length and JSON as safetensors has them, key -> where its bytes begin in the file)."""
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


def index_of(reports: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The index over all ranks' files: names and shapes once, of each file [number of name, lo, hi, begin, kinds].

    buffers: name -> where rank 0 wrote it; own_buffers: the same by rank, of those alone whose bytes differ from rank
    0's (batch norm's statistics are of a rank's own samples).
    """
    shapes: dict[str, list[int]] = {}
    files: dict[str, list[list[int]]] = {}
    first: dict[str, Any] = {}
    own: dict[str, dict[str, Any]] = {}
    for report in reports:
        shapes |= {name: shape for name, shape, *_ in report["slices"]}
        for name, (dtype, shape, begin, digest) in report["buffers"].items():
            place = [report["name"], dtype, shape, begin]
            if first.setdefault(name, (digest, place))[0] != digest:
                own.setdefault(str(report["rank"]), {})[name] = place
    numbers = {name: number for number, name in enumerate(shapes)}
    for report in reports:
        files[report["name"]] = [[numbers[name], *where] for name, _, *where in report["slices"]]
    buffers = {name: place for name, (_, place) in first.items()}
    shared = {"names": list(shapes), "shapes": list(shapes.values()), "files": files}
    return shared | {"buffers": buffers, "own_buffers": own}


# ------------------------------------------------------------------------------------------------ reading


@dataclasses.dataclass(frozen=True)
class Range:
    """Bytes [start, stop) of a file, and the flat tensor that they fill."""

    file: str
    start: int
    stop: int
    into: Tensor


class Slices:
    """Reads any interval of any tensor of a checkpoint, whatever ranks and stage wrote it."""

    def __init__(self, folder: str) -> None:
        self.folder = str(folder)
        self._thread = threading.local()  # a storage keeps open files, which threads must not share
        index = read_json(self._storage(), INDEX)
        self.shapes = {name: tuple(shape) for name, shape in zip(index["names"], index["shapes"], strict=True)}
        self._buffers: dict[str, Any] = index["buffers"]
        self._own_buffers: dict[str, dict[str, Any]] = index["own_buffers"]
        self._parts: dict[str, list[tuple[int, int, str, int, int]]] = {name: [] for name in self.shapes}
        for file, slices in index["files"].items():
            for number, lo, hi, begin, kinds in slices:
                self._parts[index["names"][number]].append((lo, hi, file, begin, kinds))
        for parts in self._parts.values():
            parts.sort()

    @property
    def buffers(self) -> list[str]:
        """Names of the buffers."""
        return list(self._buffers)

    def kinds(self, name: str) -> tuple[str, ...]:
        """Which tensors there are of a parameter: a frozen one has no moments."""
        return KINDS[: min(part[4] for part in self._parts[name])]

    def fill(self, wanted: Iterable[tuple[str, str, int, Tensor]]) -> None:
        """Read (kind, name, lo, flat float32 tensor [n]) each: the tensor becomes elements [lo, lo + n).

        Ranges that touch in a file are read at once, at most BUFFER bytes; READERS at a time. Raises DataError where
        a part is missing.
        """
        ranges = sorted(
            (piece for kind, name, lo, into in wanted for piece in self._ranges(kind, name, lo, into)),
            key=lambda piece: (piece.file, piece.start),
        )
        with ThreadPoolExecutor(READERS, thread_name_prefix="slices") as pool:
            for done in pool.map(self._read, _runs(ranges)):
                assert done is None

    def interval(self, kind: str, name: str, lo: int, hi: int) -> Tensor:
        """-> float32 [hi - lo] of "param", "exp_avg" or "exp_avg_sq"."""
        tensor = torch.empty(hi - lo)
        self.fill([(kind, name, lo, tensor)])
        return tensor

    def whole(self, kind: str, name: str) -> Tensor:
        """-> float32 in the parameter's own shape."""
        shape = torch.Size(self.shapes[name])
        return self.interval(kind, name, 0, shape.numel()).view(shape)

    def buffer(self, name: str, rank: int = 0) -> Tensor:
        """A buffer in its own dtype and shape, as this rank had it."""
        file, dtype, shape, begin = self._own_buffers.get(str(rank), {}).get(name) or self._buffers[name]
        tensor = torch.empty(shape, dtype=DTYPES[dtype])
        size = tensor.numel() * tensor.element_size()
        if size:
            data = self._storage().get_range(file, begin, begin + size)
            tensor.view(-1).copy_(torch.frombuffer(bytearray(data), dtype=tensor.dtype))
        return tensor

    def _ranges(self, kind: str, name: str, lo: int, into: Tensor) -> Iterator[Range]:
        at, hi, place = lo, lo + into.numel(), KINDS.index(kind)
        for begin, end, file, offset, kinds in self._parts.get(name, []):
            if begin <= at < min(end, hi) and place < kinds:
                stop = min(end, hi)
                first = offset + (place * (end - begin) + at - begin) * ITEM
                yield Range(file, first, first + (stop - at) * ITEM, into[at - lo : stop - lo])
                at = stop
        if at < hi:
            raise DataError(
                f"{self.folder} has {kind} of {name} only up to element {at} of {hi}; it belongs to another model"
            )

    @torch.no_grad()  # of its own: gradients are switched off by thread
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
    """Sorted ranges -> runs of touching ones in one file, each of at most BUFFER bytes."""
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
    """A range in parts of at most BUFFER bytes."""
    for start in range(whole.start, whole.stop, BUFFER):
        stop = min(start + BUFFER, whole.stop)
        at, end = (start - whole.start) // ITEM, (stop - whole.start) // ITEM
        yield Range(whole.file, start, stop, whole.into[at:end])
