"""`tessera data ...` and `tessera vocab ...`: thin wrappers over data_pipeline; `encode` passes it the model."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from data_pipeline.errors import ConfigError
from launchers.arguments import AsJson, Overrides, Seed, as_dict, emit

if TYPE_CHECKING:
    from data_pipeline.config import BuildConfig
    from data_pipeline.shards.codes import ImageTokenizer
    from data_pipeline.stream.mixture import Source

Config = Annotated[Path, typer.Argument(help="YAML of the build, such as configs/data/emoji.yaml.")]
Dataset = Annotated[
    str, typer.Argument(help="Folder, s3:// or http(s):// address of a dataset; @FINGERPRINT selects an older version.")
]


def build(config: Config, overrides: Overrides = None, json: AsJson = False) -> None:
    """Build shards from raw pairs, and image codes if the configuration names a tokenizer."""
    from data_pipeline.config import BuildConfig
    from data_pipeline.settings import load_settings
    from data_pipeline.workers import in_driver

    emit(as_dict(in_driver(_build, load_settings(BuildConfig, config, overrides or []), not json)), json)


def _build(settings: "BuildConfig", progress: bool) -> dict[str, Any]:
    from data_pipeline.ingest.run import build as run_build

    if settings.image_tokenizer is None:
        return run_build(settings, progress)
    from data_pipeline.shards.codes import encode_dataset
    from pretrain.inputs.image_tokenizer import load_tokenizer

    load_tokenizer(settings.image_tokenizer)  # report a wrong folder before the build
    built = run_build(settings, progress)
    where = (load_tokenizer, settings.image_tokenizer, settings.workers, progress, settings.ray_address)
    return {**built, "codes": encode_dataset(settings.output, *where)["tokenizer"]}


def retry(config: Config, overrides: Overrides = None, json: AsJson = False) -> None:
    """Retry the rejected rows of a finished build into new shards; existing shards stay unchanged."""
    from data_pipeline.config import BuildConfig
    from data_pipeline.settings import load_settings
    from data_pipeline.workers import in_driver

    emit(as_dict(in_driver(_retry, load_settings(BuildConfig, config, overrides or []), not json)), json)


def _retry(settings: "BuildConfig", progress: bool) -> dict[str, Any]:
    from data_pipeline.ingest.run import retry as run_retry

    return run_retry(settings, progress)


def report(
    dataset: Dataset,
    output: Annotated[Path | None, typer.Option(help="HTML file to write; default DATASET/report.html.")] = None,
    image_tokenizer: Annotated[Path | None, typer.Option(help="Image tokenizer to show reconstructions of.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML of the build; shows rejected images too.")] = None,
    overrides: Overrides = None,
    json: AsJson = False,
) -> None:
    """Write an HTML report of a dataset: row counts, examples, sizes, captions, codes."""
    from data_pipeline.config import BuildConfig
    from data_pipeline.ingest.report import write_report
    from data_pipeline.settings import load_settings

    built = None if config is None else load_settings(BuildConfig, config, overrides or [])
    model = None if image_tokenizer is None else _tokenizer_of(dataset, image_tokenizer)
    emit({"report": write_report(dataset, output, model, built)}, json)


def encode(
    dataset: Dataset,
    image_tokenizer: Annotated[Path, typer.Option(help="Folder of an exported image tokenizer.")],
    workers: Annotated[int, typer.Option(min=1, help="Encoding processes.")] = 1,
    crops: Annotated[
        int, typer.Option(min=1, max=10, help="1: the centre; 10: corners, centre and their mirror images.")
    ] = 1,
    precision: Annotated[
        Literal["fp32", "bf16"], typer.Option(help="Precision of the network; part of the codes' name.")
    ] = "fp32",
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="cpu, or cuda for one GPU per process.")] = "cpu",
    ray_address: Annotated[str | None, typer.Option(help="Ray cluster to join; default: start one here.")] = None,
    json: AsJson = False,
) -> None:
    """Add image codes beside the shards of a dataset."""
    from data_pipeline.workers import in_driver

    words = (str(image_tokenizer), precision, device, workers, not json, ray_address, crops)
    emit(as_dict(in_driver(_encode, dataset, *words)), json)


def _encode(
    dataset: str,
    tokenizer: str,
    precision: Literal["fp32", "bf16"],
    device: str,
    workers: int,
    progress: bool,
    ray_address: str | None,
    crops: int,
) -> dict[str, Any]:
    from functools import partial

    from data_pipeline.shards.codes import encode_dataset
    from pretrain.inputs.image_tokenizer import load_tokenizer

    factory, gpus = partial(load_tokenizer, precision=precision, device=device), int(device == "cuda")
    return encode_dataset(dataset, factory, tokenizer, workers, progress, ray_address, crops, gpus)


def index(
    tars: Annotated[list[str], typer.Argument(help="Local or s3:// folder, or tars such as '{00000..00099}.tar'.")],
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; default one per CPU.")] = None,
    json: AsJson = False,
) -> None:
    """Index existing tars without changing them."""
    from data_pipeline.shards.verify import index as run_index

    emit(as_dict(run_index(tars, workers)), json)


def verify(
    dataset: Dataset,
    image_tokenizer: Annotated[Path | None, typer.Option(help="Re-encode samples of each shard with it.")] = None,
    sample: Annotated[int, typer.Option(min=1, help="Images per shard to re-encode.")] = 16,
    min_agreement: Annotated[
        float, typer.Option(min=0, max=1, help="Minimum share of equal codes in each shard.")
    ] = 0.95,
    seed: Seed = 0,
    json: AsJson = False,
) -> None:
    """Check digests, row counts and codes; exit with 74 on a fault."""
    from data_pipeline.shards.verify import verify as run_verify

    model = None if image_tokenizer is None else _tokenizer_of(dataset, image_tokenizer)
    emit(as_dict(run_verify(dataset, model, sample, min_agreement, seed)), json)


def _tokenizer_of(dataset: str, directory: Path) -> "ImageTokenizer":
    """Load the tokenizer in the precision in which the dataset was encoded."""
    from data_pipeline.shards.codes import find_meta
    from data_pipeline.shards.manifest import open_dataset
    from pretrain.inputs.image_tokenizer import load_tokenizer_of

    storage, manifest = open_dataset(dataset)
    return load_tokenizer_of(directory, lambda name: find_meta(storage, manifest, name))


def order(
    dataset: Annotated[str, typer.Argument(help="Folder or address of a dataset, or a run's YAML or config.json.")],
    overrides: Overrides = None,
    seed: Seed = 0,
    start: Annotated[int, typer.Option(min=0, help="First position.")] = 0,
    count: Annotated[int, typer.Option(min=0, help="Number of positions.")] = 10,
    json: AsJson = False,
) -> None:
    """Print sample keys by position, one per line: of a dataset, or of a run's data including its mixture."""
    from data_pipeline.stream.reader import Stream

    if dataset.endswith((".yaml", ".json")):
        stream = _stream_of_run(Path(dataset), overrides or [])
    elif overrides:
        raise ConfigError(f"override {overrides[0]!r}: {dataset} is a dataset; overrides belong to a run's YAML")
    else:
        stream = Stream(dataset, seed)
    samples = stream.read(start, start + count)
    keys = [sample.key for sample in samples]
    if json:
        epochs, ids = [sample.epoch for sample in samples], [sample.id for sample in samples]
        emit({"start": start, "keys": keys, "ids": ids, "epochs": epochs}, json)
    else:
        typer.echo("\n".join(keys))


def _stream_of_run(path: Path, overrides: list[str]) -> "Source":
    from pretrain.config import load_run
    from pretrain.inputs.source import open_stream

    config = load_run(path, overrides)
    return open_stream(config.data, config.seed)


def vocab_train(config: Config, overrides: Overrides = None, json: AsJson = False) -> None:
    """Train a SentencePiece vocabulary on the captions of a dataset."""
    from data_pipeline.settings import load_settings
    from data_pipeline.text.config import VocabConfig
    from data_pipeline.text.training import train_vocabulary

    rejected = Counter[str]()
    path = train_vocabulary(load_settings(VocabConfig, config, overrides or []), rejected)
    emit({"vocabulary": str(path), "rejected": dict(sorted(rejected.items()))}, json)
