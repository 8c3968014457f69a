"""Opens a run's data: one dataset or a mixture, with the text and image tokenizers that its configuration names."""

from data_pipeline.errors import ConfigError
from data_pipeline.shards.codes import find_meta
from data_pipeline.shards.manifest import open_dataset
from data_pipeline.stream.mixture import Mixture, Schedule, Source, seed_of_source
from data_pipeline.stream.order import Geometry
from data_pipeline.stream.reader import Stream
from data_pipeline.text.kinds import open_tokenizer
from data_pipeline.text.tokenizer import ABSENT, TextTokenizer
from pretrain.config import DataConfig, RunConfig
from pretrain.inputs.image_tokenizer import load_tokenizer_of
from pretrain.interchange.folder import load_config
from pretrain.schema.common import CodesRead, TextRead


def open_data(
    config: RunConfig, dataset: str | None = None, with_codes: bool = True
) -> tuple[Source, TextTokenizer | None]:
    """Open the run's datasets (or `dataset`, read the same way) and its text tokenizer; check that they fit the model.

    with_codes: also open the image codes, if the model reads them.
    """
    reads, data = config.model.reads, config.data
    tokenizer = open_tokenizer(data.text_tokenizer) if data.text_tokenizer else None
    if tokenizer and reads.text:
        _check_fit(tokenizer, reads.text, config)
    codes = codes_id(config, reads.codes, dataset) if with_codes and reads.codes else None
    chosen = data.model_copy(update={"dataset": dataset, "datasets": ()}) if dataset else data
    return open_stream(chosen, config.seed, codes), tokenizer


def open_all(config: RunConfig) -> None:
    """Open all data of a run as it will: its training data and, if it evaluates in training, its held-out data."""
    open_data(config)
    for name in config.evaluated:
        open_data(config, config.data.evaluations[name])


def open_stream(data: DataConfig, seed: int, codes: str | None = None) -> Source:
    """Open the dataset or mixture. Raises ConfigError for unusable weights, DataError for a missing dataset."""
    geometry = Geometry(**data.shuffle.model_dump())
    if data.dataset is not None:
        return Stream(data.dataset, seed, codes, geometry)
    schedule = Schedule(data.changes)
    streams = [
        Stream(source.path, seed_of_source(seed, number), codes, geometry)
        for number, source in enumerate(data.datasets)
    ]
    return Mixture(streams, schedule, seed)


def _check_fit(tokenizer: TextTokenizer, text: TextRead, config: RunConfig) -> None:
    """Raise ConfigError if the tokenizer lacks an id that the task needs, or has more ids than the model embeds."""
    path, task = config.data.text_tokenizer, config.task
    if lacking := [name for name in task.specials if getattr(tokenizer, name) == ABSENT]:
        raise ConfigError(
            f"the text tokenizer {path} has no {' and no '.join(lacking)} token, which {task.kind!r} needs; use "
            "another data.text_tokenizer"
        )
    if tokenizer.size > text.vocab_size:
        raise ConfigError(
            f"the text tokenizer {path} has {tokenizer.size} pieces, the model has {text.vocab_size}; raise "
            f"model.{text.vocab_field} or train a smaller tokenizer"
        )


def codes_id(config: RunConfig, reads: CodesRead, dataset: str | None = None) -> str:
    """Return the id of the run's image tokenizer, in the precision in which the data were encoded.

    Raises ConfigError when its codes do not fit the model.
    """
    folder, data = str(config.data.image_tokenizer), config.data
    made = load_config(folder).makes
    if made is not None and made != reads:
        raise ConfigError(
            f"{folder} has {made.count} codes of {made.codebook}, the model reads {reads.count} of {reads.codebook}; "
            f"set model.{reads.count_field} and model.{reads.codebook_field}"
        )
    read = [dataset] if dataset else [data.dataset, *(source.path for source in data.datasets)]
    datasets = [open_dataset(path) for path in read if path is not None]
    return load_tokenizer_of(folder, lambda name: all(find_meta(*one, name) for one in datasets)).id
