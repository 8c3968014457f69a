"""What a run reads: one dataset, or several mixed, as its configuration says."""

from data_pipeline.stream.mixture import Mixture, Schedule, Source, seed_of_source
from data_pipeline.stream.order import Geometry
from data_pipeline.stream.reader import Stream
from pretrain.config import DataConfig


def open_stream(data: DataConfig, seed: int, codes: str | None = None) -> Source:
    """Raises ConfigError for weights that cannot be laid out, DataError for a dataset that is not there."""
    geometry = Geometry(**data.shuffle.model_dump())
    if data.dataset is not None:
        return Stream(data.dataset, seed, codes, geometry)
    schedule = Schedule(data.changes)
    streams = [
        Stream(source.path, seed_of_source(seed, number), codes, geometry)
        for number, source in enumerate(data.datasets)
    ]
    return Mixture(streams, schedule, seed)
