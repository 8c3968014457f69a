"""A dataset as one HTML page that needs nothing else: counts, examples, sizes, captions, duplicates, codes.

Everything is read shard by shard and added up; what is shown by example is taken at even distances, so that the same
dataset gives the same page.
"""

import base64
import html
import io
import json
from collections import Counter as Tally
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from data_pipeline.build.captions import language_of
from data_pipeline.build.images import Reject, decode_rgb, encode, resize
from data_pipeline.errors import DataError
from data_pipeline.shards.codes import ImageTokenizer, meta_name, open_codes, tokenizers_of
from data_pipeline.shards.manifest import STATS, Manifest, read_manifest
from data_pipeline.storage import Storage, open_storage
from data_pipeline.stream.reader import Stream

PAGE = "report.html"
EXAMPLES = 24
REJECTS_SHOWN = 6
CAPTIONS_ASKED = 2000  # of so many the language is told
THUMBNAIL = 128

SIZES = (0, 32, 64, 128, 256, 512, 1024, 2048, 4096)
ASPECTS = (1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0)
LENGTHS = (0, 5, 10, 20, 40, 80, 160, 320, 640)

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 2em auto; padding: 0 1em; color: #222 }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em; border-bottom: 1px solid #ddd }
table { border-collapse: collapse } td, th { padding: .15em .8em .15em 0; text-align: left; vertical-align: top }
td.n { text-align: right; font-variant-numeric: tabular-nums }
.bar { background: #4a7ebb; height: .8em; min-width: 1px }
.grid { display: flex; flex-wrap: wrap; gap: 10px } figure { margin: 0; width: 150px; font-size: 12px }
figure img { max-width: 150px; max-height: 128px; display: block } figcaption { overflow-wrap: anywhere }
.small { color: #666; font-size: 13px; overflow-wrap: anywhere }
"""


@dataclass
class Findings:
    """What is added up over the shards; the histograms count per interval of their limits above."""

    sides: np.ndarray = field(default_factory=lambda: np.zeros(len(SIZES), np.int64))
    aspects: np.ndarray = field(default_factory=lambda: np.zeros(len(ASPECTS), np.int64))
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(len(LENGTHS), np.int64))
    per_image: Tally[int] = field(default_factory=Tally)
    rejects: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


def write_report(dataset: str | Path, output: Path | None = None, tokenizer: ImageTokenizer | None = None) -> str:
    """Write the page, to DATASET/report.html unless told -> where it is.

    tokenizer: shows reconstructions from its codes. Raises DataError for a dataset or codes that are not there.
    """
    storage = open_storage(dataset)
    page = render(storage, tokenizer).encode()
    if output is None:
        storage.replace(PAGE, page)
        return f"{storage.root}/{PAGE}"
    try:
        output.write_bytes(page)
    except OSError as error:
        raise DataError(f"{output}: {error.strerror}; name another file as --output") from None
    return str(output)


def render(storage: Storage, tokenizer: ImageTokenizer | None = None) -> str:
    """The page as text."""
    manifest = read_manifest(storage)
    findings = _find(storage, manifest)
    stream = Stream(storage.root, seed=0)
    sections = [
        _account(storage, manifest),
        _rejects(findings),
        _examples(stream),
        _bars("Longer side of the images, pixels", _intervals(SIZES), findings.sides),
        _bars("Aspect (longer by shorter side)", _intervals(ASPECTS), findings.aspects),
        _bars("Length of the captions, characters", _intervals(LENGTHS), findings.lengths),
        _bars("Captions of an image", *_unzipped(sorted(findings.per_image.items()))),
        _languages(stream),
        *_codes(storage, manifest, stream, tokenizer),
    ]
    title = html.escape(f"{storage.root}: {manifest.samples:,} samples")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head>"
        f'<body><h1>{title}</h1><p class="small">fingerprint {manifest.fingerprint}, {len(manifest.shards)} shards, '
        f"{sum(shard.bytes for shard in manifest.shards):,} bytes</p>{''.join(sections)}</body></html>\n"
    )


# ----------------------------------------------------------------------------------------------- adding up


def _find(storage: Storage, manifest: Manifest) -> Findings:
    findings = Findings()
    for shard in manifest.shards:
        name = shard.name.replace(".tar", ".parquet")
        if storage.exists(name):
            table = pq.read_table(io.BytesIO(storage.get(name)))
            _add(findings, table.to_pylist())
    return findings


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
        findings.per_image[len(record["captions"])] += 1
        for caption in record["captions"]:
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
    if not storage.exists(STATS):
        return _section("Account", "<p>Tars made elsewhere: what was rejected there is not known.</p>")
    stats = json.loads(storage.get(STATS))
    duplicates = sum(count for reason, count in stats["rejected"].items() if "duplicate" in reason)
    rejected = sum(stats["rejected"].values())
    text = (
        f"<p>{stats['in']:,} in = {stats['out']:,} out + {rejected:,} rejected, {duplicates:,} of them duplicates.</p>"
    )
    names, counts = _unzipped(sorted(stats["rejected"].items(), key=lambda item: (-item[1], item[0])))
    return _section("Account", text + _table_of_bars(["out", *names], [stats["out"], *counts]))


def _rejects(findings: Findings) -> str:
    if not findings.rejects:
        return ""
    rows = [
        _row(reason, str(record["key"]), f"{record.get('url') or ''} {record['detail']}"[:300])
        for reason, records in sorted(findings.rejects.items())
        for record in records
    ]
    head = "<tr><th>reason</th><th>key</th><th>what was found</th></tr>"
    note = '<p class="small">As each row was rejected first; some may have come in by a later retry.</p>'
    return _section("Rejected rows, by example", f"{note}<table>{head}{''.join(rows)}</table>")


def _examples(stream: Stream) -> str:
    figures = []
    for number in _evenly(stream.samples, EXAMPLES):
        sample = stream.fetch(number)
        figures.append(_figure(_thumbnail(sample.image), f"{sample.key}: {' | '.join(sample.captions)}"))
    return _section("Samples", f'<div class="grid">{"".join(figures)}</div>')


def _languages(stream: Stream) -> str:
    captions = [text for number in _evenly(stream.samples, CAPTIONS_ASKED) for text in stream.fetch(number).captions]
    counts = Tally(language_of(text) for text in captions[:CAPTIONS_ASKED])
    title = f"Languages of {counts.total():,} captions (? where a caption is too short to tell)"
    return _bars(title, *_unzipped(counts.most_common(12)))


def _codes(storage: Storage, manifest: Manifest, stream: Stream, tokenizer: ImageTokenizer | None) -> Iterator[str]:
    for tokenizer_id in tokenizers_of(storage):
        codes = open_codes(storage, manifest, tokenizer_id)
        size = json.loads(storage.get(meta_name(tokenizer_id)))["codebook_size"]
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
            shown = _reconstructions(Stream(storage.root, seed=0, codes=tokenizer_id), tokenizer)
        yield _section(f"Codes of tokenizer {tokenizer_id}, most used first", text + bars + shown)


def _reconstructions(stream: Stream, tokenizer: ImageTokenizer) -> str:
    samples = [stream.fetch(number) for number in _evenly(stream.samples, EXAMPLES // 3)]
    drawn = tokenizer.decode(np.stack([sample.codes for sample in samples if sample.codes is not None]))
    pairs = [
        _figure(_thumbnail(sample.image), sample.key) + _figure(_image(pixels), "from its codes")
        for sample, pixels in zip(samples, drawn, strict=True)
    ]
    return f'<div class="grid">{"".join(pairs)}</div>'


# ------------------------------------------------------------------------------------------------- pieces


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
        f'<td style="width:60%"><div class="bar" style="width:{100 * count / most:.1f}%"></div></td></tr>'
        for name, count in zip(names, counts, strict=True)
    ]
    return f'<table style="width:100%">{"".join(rows)}</table>'


def _row(*cells: str) -> str:
    return "<tr>" + "".join(f'<td class="small">{html.escape(cell)}</td>' for cell in cells) + "</tr>"


def _figure(source: str, caption: str) -> str:
    picture = f'<img src="{source}" alt="">' if source else ""
    return f"<figure>{picture}<figcaption>{html.escape(caption[:160])}</figcaption></figure>"


def _thumbnail(data: bytes) -> str:
    try:
        return _image(resize(decode_rgb(data), "fit", THUMBNAIL))
    except Reject:
        return ""


def _image(pixels: np.ndarray) -> str:
    """uint8 [H, W, 3] -> an address that holds the picture itself."""
    return "data:image/jpeg;base64," + base64.b64encode(encode(pixels, "jpeg", 80)).decode()
