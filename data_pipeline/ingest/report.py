"""Dataset report as one self-contained HTML page: counts, examples, sizes, captions, duplicates, codes.

Statistics are accumulated shard by shard. Examples are evenly spaced, so the same dataset gives the same page. Rejected
images are not in the shards: they are shown if the build's configuration is given, from its cache of fetched bytes or
by reading its source again; nothing is fetched. Every image is decoded in the sandbox.
"""

import base64
import contextlib
import html
import re
from collections import Counter as Tally
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline import sandbox
from data_pipeline.config import BuildConfig, ImageRules
from data_pipeline.errors import BadSample, DataError, TesseraError
from data_pipeline.images import Reject, encode
from data_pipeline.ingest.cache import RawCache
from data_pipeline.ingest.captions import language_of
from data_pipeline.ingest.sources import open_source
from data_pipeline.outputs import write_whole
from data_pipeline.schema import Pair, Sample
from data_pipeline.shards.codes import CENTRE, ImageTokenizer, open_codes, tokenizers_of
from data_pipeline.shards.manifest import (
    STATS,
    Manifest,
    open_dataset,
    read_manifest,
    read_rows,
    read_totals,
    side_name,
)
from data_pipeline.storage import Storage
from data_pipeline.stream.reader import Stream

PAGE = "report.html"
EXAMPLES = 24
REJECTS_SHOWN = 6
CAPTIONS_ASKED = 2000  # captions sampled for language detection
THUMBNAIL = ImageRules(mode="fit", size=128, format="jpeg", quality=80)

SIZES = (0, 32, 64, 128, 256, 512, 1024, 2048, 4096)
ASPECTS = (1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0)
LENGTHS = (0, 5, 10, 20, 40, 80, 160, 320, 640)

DUPLICATES = ("duplicate_image", "near_duplicate")

_KEPT = re.compile(r"row (\d+)$")
_HEAD = '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>'
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 2em auto; padding: 0 1em; color: #222 }
h1 { font-size: 1.5em; overflow-wrap: anywhere }
h2 { font-size: 1.15em; margin-top: 2em; border-bottom: 1px solid #ddd }
section { overflow-x: auto } table { border-collapse: collapse }
td, th { padding: .15em .8em .15em 0; text-align: left; vertical-align: top }
td.n { text-align: right; font-variant-numeric: tabular-nums }
.bar { background: #4a7ebb; height: .8em; min-width: 1px } .bar.none { min-width: 0 }
.grid { display: flex; flex-wrap: wrap; gap: 10px } figure { margin: 0; width: 150px; font-size: 12px }
figure img { max-width: 150px; max-height: 128px; display: block } figcaption { overflow-wrap: anywhere }
.pair { display: flex; gap: 4px; border: 1px solid #ddd; padding: 4px }
.small { color: #666; font-size: 13px; overflow-wrap: anywhere }
"""


@dataclass
class Findings:
    """Statistics accumulated over the shards. Histograms count per interval of their limits above."""

    sides: np.ndarray = field(default_factory=lambda: np.zeros(len(SIZES), np.int64))
    aspects: np.ndarray = field(default_factory=lambda: np.zeros(len(ASPECTS), np.int64))
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(len(LENGTHS), np.int64))
    per_image: Tally[int] = field(default_factory=Tally)
    rejects: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    kept: list[np.ndarray] = field(default_factory=list)
    """Per shard, int64: for every duplicate, the row kept instead."""
    unreadable: Tally[str] = field(default_factory=Tally)
    """For tars from other tools: samples without a readable image and caption, by reason."""


def write_report(
    dataset: str | Path,
    output: Path | None = None,
    tokenizer: ImageTokenizer | None = None,
    build: BuildConfig | None = None,
) -> str:
    """Write the page to `output` (default DATASET/report.html) and return its path.

    tokenizer: shows reconstructions from its codes. build: configuration of the build; shows rejected images.
    Raises DataError if the dataset or its codes are missing, or if `output` exists and is not a report.
    """
    storage, manifest = open_dataset(dataset)
    page = render(storage, manifest, tokenizer, build).encode()
    if output is None:
        storage.replace(PAGE, page)
        return f"{storage.root}/{PAGE}"
    if output.exists() and not _is_report(output):
        raise DataError(f"{output} exists and is not a report; nothing was written, use another --output")
    write_whole(output, page)
    return str(output)


def _is_report(path: Path) -> bool:
    """Return whether the file is an earlier report, which may be replaced."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_HEAD)) == _HEAD.encode()


def render(
    storage: Storage, manifest: Manifest, tokenizer: ImageTokenizer | None = None, build: BuildConfig | None = None
) -> str:
    """Render the page as HTML."""
    address = f"{storage.root}@{manifest.fingerprint}"
    stream, rejected = Stream(address, seed=0), Rejected(build)
    built = storage.exists(STATS)
    findings = _find(storage, manifest) if built else _read_all(stream)
    sections = [
        _account(storage, manifest) if built else _account_of_tars(manifest, findings),
        _rejects(findings, rejected),
        _duplicates(findings, rejected, storage, manifest, stream),
        _examples(stream),
        _bars("Longer side of the images, pixels", _intervals(SIZES), findings.sides),
        _bars("Aspect ratio (longer / shorter side)", _intervals(ASPECTS), findings.aspects),
        _bars("Length of the captions, characters", _intervals(LENGTHS), findings.lengths),
        _bars("Captions per image", *_unzipped(sorted(findings.per_image.items()))),
        _languages(stream),
        *_codes(storage, manifest, address, tokenizer),
    ]
    title = html.escape(f"{storage.root}: {manifest.samples:,} samples")
    return (
        f"{_HEAD}{title}</title><style>{_STYLE}</style></head>"
        f'<body><h1>{title}</h1><p class="small">fingerprint {manifest.fingerprint}, {len(manifest.shards)} shards, '
        f"{sum(shard.bytes for shard in manifest.shards):,} bytes</p>{''.join(sections)}</body></html>\n"
    )


# ----------------------------------------------------------------------------------------------- adding up


def _find(storage: Storage, manifest: Manifest) -> Findings:
    findings = Findings()
    for shard in manifest.shards:
        name = side_name(shard.name, ".parquet")
        if storage.exists(name):
            records = read_rows(storage, name).to_pylist()
            _add(findings, records)
            rows = [_row_kept(record) for record in records]
            findings.kept.append(np.array([row for row in rows if row is not None], np.int64))
    return findings


def _read_all(stream: Stream) -> Findings:
    """Collect findings from the samples themselves, for tars from other tools, whose tables have another format."""
    findings = Findings()
    for sample in stream.readable(findings.unreadable):
        _add_captions(findings, sample.texts)
    return findings


def _row_kept(record: dict[str, Any]) -> int | None:
    """Return the row kept instead of a duplicate; None if the record is no duplicate."""
    match = _KEPT.search(record["detail"]) if record["status"] in DUPLICATES else None
    return int(match[1]) if match else None


def _add(findings: Findings, records: list[dict[str, Any]]) -> None:
    for record in records:
        if record["status"] != "ok":
            examples = findings.rejects.setdefault(record["status"], [])
            if len(examples) < REJECTS_SHOWN:
                examples.append(record)
            continue
        width = record.get("source_width") or record["width"]
        height = record.get("source_height") or record["height"]
        findings.sides[_interval(SIZES, max(width, height))] += 1
        findings.aspects[_interval(ASPECTS, max(width, height) / min(width, height))] += 1
        _add_captions(findings, record["captions"])


def _add_captions(findings: Findings, captions: Sequence[str]) -> None:
    findings.per_image[len(captions)] += 1
    for caption in captions:
        findings.lengths[_interval(LENGTHS, len(caption))] += 1


def _interval(limits: Sequence[float], value: float) -> int:
    return max(0, int(np.searchsorted(limits, value, side="right")) - 1)


def _intervals(limits: Sequence[float]) -> list[str]:
    return [f"{low:g} to {high:g}" for low, high in zip(limits[:-1], limits[1:], strict=True)] + [
        f"from {limits[-1]:g}"
    ]


def _unzipped(items: Iterable[tuple[Any, int]]) -> tuple[list[str], list[int]]:
    pairs = list(items)
    return [str(name) for name, _ in pairs], [count for _, count in pairs]


# ------------------------------------------------------------------------------------------------ sections


def _account(storage: Storage, manifest: Manifest) -> str:
    if read_manifest(storage).fingerprint != manifest.fingerprint:
        return _section("Account", "<p>Older version: rejected rows are known only for the newest version.</p>")
    stats = read_totals(storage)
    duplicates = sum(count for reason, count in stats["rejected"].items() if "duplicate" in reason)
    rejected = sum(stats["rejected"].values())
    text = (
        f"<p>{stats['in']:,} in = {stats['out']:,} out + {rejected:,} rejected, {duplicates:,} of them duplicates.</p>"
    )
    return _section("Account", text + _reasons(stats["out"], stats["rejected"]))


def _account_of_tars(manifest: Manifest, findings: Findings) -> str:
    rejected = findings.unreadable.total()
    out = manifest.samples - rejected
    text = (
        f"<p>Indexed tars: {manifest.samples:,} in = {out:,} out + {rejected:,} rejected; rows rejected "
        "when they were made are unknown.</p>"
    )
    return _section("Account", text + _reasons(out, findings.unreadable))


def _reasons(out: int, rejected: Mapping[str, int]) -> str:
    names, counts = _unzipped(sorted(rejected.items(), key=lambda item: (-item[1], item[0])))
    return _table_of_bars(["out", *names], [out, *counts])


class Rejected:
    """Access to the images of rejected rows, where they are still available."""

    def __init__(self, build: BuildConfig | None) -> None:
        self.known = build is not None
        self._cache = None if build is None or build.fetch.cache is None else RawCache(build.fetch.cache)
        self._source = None if build is None else open_source(build.source)

    def picture(self, record: dict[str, Any]) -> str:
        """Return the thumbnail of one row of a shard's parquet; empty if its bytes are missing or do not decode."""
        with contextlib.suppress(TesseraError, OSError):  # the source may be gone or changed by now
            data = self._cached(record["sha256"]) if record["url"] else self._read_again(record)
            return _thumbnail(data) if data else ""
        return ""

    def _cached(self, digest: str | None) -> bytes | None:
        return self._cache.get(digest) if self._cache is not None and digest else None

    def _read_again(self, record: dict[str, Any]) -> bytes | None:
        if self._source is None or record["row"] >= self._source.count():
            return None
        row = next(iter(self._source.rows(record["row"], record["row"] + 1)))
        same = isinstance(row, Pair) and row.key == record["key"]
        return row.image if same and isinstance(row, Pair) else None


def _rejects(findings: Findings, rejected: Rejected) -> str:
    if not findings.rejects:
        return ""
    rows = [
        _row(
            reason, str(record["key"]), f"{record.get('url') or ''} {record['detail']}"[:300], rejected.picture(record)
        )
        for reason, records in sorted(findings.rejects.items())
        for record in records
    ]
    head = "<tr><th>reason</th><th>key</th><th>rows rejected found</th><th>image</th></tr>"
    note = "Reason of the first rejection; a later retry may have accepted some rows."
    note += (
        "" if rejected.known else " Pass the build's configuration (--config) to see images that are still readable."
    )
    return _section("Examples of rejected rows", f'<p class="small">{note}</p><table>{head}{"".join(rows)}</table>')


def _duplicates(findings: Findings, rejected: Rejected, storage: Storage, manifest: Manifest, stream: Stream) -> str:
    """Render a histogram of occurrences per image, and example duplicates beside the images kept."""
    if not sum(map(len, findings.kept)):
        return ""
    _, copies = np.unique(np.concatenate(findings.kept), return_counts=True)
    occurrences = Tally((copies + 1).tolist())
    bars = _table_of_bars(*_unzipped((f"{n} times", count) for n, count in sorted(occurrences.items())))
    pairs = []
    for record in (record for reason in DUPLICATES for record in findings.rejects.get(reason, [])):
        row = _row_kept(record)
        number = None if row is None else _sample_of_row(storage, manifest, row)
        if number is not None:
            kept = stream.fetch(number)
            left = _figure(_thumbnail(kept.image), f"{kept.key} stays")
            right = _figure(rejected.picture(record), f"{record['key']}: {record['detail']}")
            pairs.append(f'<div class="pair">{left}{right}</div>')
    return _section("Duplicate images", f'{bars}<div class="grid">{"".join(pairs)}</div>')


def _sample_of_row(storage: Storage, manifest: Manifest, row: int) -> int | None:
    """Return the index of the sample made from a source row; None if there is none."""
    before = 0
    for shard in manifest.shards:
        table = read_rows(storage, side_name(shard.name, ".parquet"), ["row", "status"])
        rows = table.column("row").to_numpy()[np.array(table.column("status").to_pylist()) == "ok"]
        if row in rows:
            return before + int(np.flatnonzero(rows == row)[0])
        before += shard.n
    return None


def _examples(stream: Stream) -> str:
    figures = []
    for sample in _fetched(stream, EXAMPLES):
        figures.append(_figure(_thumbnail(sample.image), f"{sample.key}: {' | '.join(sample.texts)}"))
    return _section("Samples", f'<div class="grid">{"".join(figures)}</div>')


def _languages(stream: Stream) -> str:
    captions = [text for sample in _fetched(stream, CAPTIONS_ASKED) for text in sample.texts]
    counts = Tally(language_of(text) for text in captions[:CAPTIONS_ASKED])
    title = f"Languages of {counts.total():,} captions (?: caption too short to detect)"
    return _bars(title, *_unzipped(counts.most_common(12)))


def _codes(storage: Storage, manifest: Manifest, address: str, tokenizer: ImageTokenizer | None) -> Iterator[str]:
    for tokenizer_id in tokenizers_of(storage, manifest):
        codes = open_codes(storage, manifest, tokenizer_id)
        size = codes.codebook_size
        usage = np.zeros(size, np.int64)
        for shard in range(len(manifest.shards)):
            usage += np.bincount(codes.read_shard(shard).ravel(), minlength=size)
        share = usage / max(1, usage.sum())
        entropy = -float((share[share > 0] * np.log2(share[share > 0])).sum())
        text = f"<p>{np.count_nonzero(usage):,} of {size:,} codes used, {entropy:.2f} of {np.log2(size):.2f} bits.</p>"
        ranked = np.sort(usage)[::-1]
        groups = np.array_split(ranked, min(20, size))
        bars = _table_of_bars([f"{len(group)} codes" for group in groups], [int(group.sum()) for group in groups])
        shown = ""
        if tokenizer is not None and tokenizer.id == tokenizer_id:
            shown = _reconstructions(Stream(address, seed=0, codes=tokenizer_id), tokenizer)
        yield _section(f"Codes of tokenizer {tokenizer_id}, most used first", text + bars + shown)


def _reconstructions(stream: Stream, tokenizer: ImageTokenizer) -> str:
    samples = list(_fetched(stream, EXAMPLES // 3))
    codes = np.stack([sample.codes for sample in samples if sample.codes is not None])
    drawn = tokenizer.decode(codes[:, CENTRE] if codes.ndim == 3 else codes)
    pairs = [
        _figure(_thumbnail(sample.image), sample.key) + _figure(_image(pixels), "reconstruction")
        for sample, pixels in zip(samples, drawn, strict=True)
    ]
    return f'<div class="grid">{"".join(pairs)}</div>'


# ------------------------------------------------------------------------------------------------- pieces


def _fetched(stream: Stream, wanted: int) -> Iterator[Sample]:
    """Yield evenly spaced samples, skipping unreadable ones."""
    for number in _evenly(stream.samples, wanted):
        with contextlib.suppress(BadSample):
            yield stream.fetch(number)


def _evenly(count: int, wanted: int) -> list[int]:
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).astype(int)).tolist()


def _section(title: str, body: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>{body}</section>"


def _bars(title: str, names: list[str], counts: Sequence[int] | np.ndarray) -> str:
    return _section(title, _table_of_bars(names, [int(count) for count in counts]))


def _table_of_bars(names: list[str], counts: list[int]) -> str:
    most = max([1, *counts])
    rows = [
        f'<tr><td>{html.escape(name)}</td><td class="n">{count:,}</td>'
        f'<td style="width:60%"><div class="bar{" none" * (not count)}" '
        f'style="width:{100 * count / most:.1f}%"></div></td></tr>'
        for name, count in zip(names, counts, strict=True)
    ]
    return f'<table style="width:100%">{"".join(rows)}</table>'


def _row(reason: str, key: str, found: str, picture: str) -> str:
    cells = "".join(f'<td class="small">{html.escape(cell)}</td>' for cell in (reason, key, found))
    return f"<tr>{cells}<td>{_picture(picture)}</td></tr>"


def _picture(source: str) -> str:
    return f'<img src="{source}" alt="">' if source else ""


def _figure(source: str, caption: str) -> str:
    return f"<figure>{_picture(source)}<figcaption>{html.escape(caption[:160])}</figcaption></figure>"


def _thumbnail(data: bytes | None) -> str:
    if data is None:
        return ""
    try:
        return _address(sandbox.decoder(THUMBNAIL).look(data).prepared.data)
    except Reject:
        return ""


def _image(pixels: np.ndarray) -> str:
    """Encode an image, uint8 [H, W, 3], as a data: URL."""
    return _address(encode(pixels, "jpeg", 80))


def _address(jpeg: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
