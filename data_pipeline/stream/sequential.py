"""Read tars sequentially, for servers without range requests and tars without an index.

A compatibility reader: in file order, once, not shuffled, and not resumable. A broken connection resumes only if the
server supports ranges after all. Prefer `tessera data index` and `Stream` where they work.
"""

from collections import Counter
from collections.abc import Iterator

from data_pipeline.errors import BadSample
from data_pipeline.patterns import expand_braces
from data_pipeline.schema import Sample
from data_pipeline.shards.tar import samples_of
from data_pipeline.storage import open_storage
from data_pipeline.stream.reader import parse_sample, sample_of


def read_tars(pattern: str, shard: tuple[int, int] = (0, 1), rejected: Counter[str] | None = None) -> Iterator[Sample]:
    """Yield the samples of `http://host/{00000..00099}.tar::...`, or of local or s3:// tars; ids count within a tar.

    shard: (rank, world); each rank reads every world-th tar. Memory: see `samples_of`. Raises DataError for a tar that
    is missing, cut off, even between files, or damaged in its headers; BadSample for a sample that cannot be used,
    unless `rejected` is given, which then counts it by reason.
    """
    rank, world = shard
    paths = [path for part in pattern.split("::") for path in expand_braces(part)]
    for path in paths[rank::world]:
        folder, _, name = path.rpartition("/")
        pieces = open_storage(folder or ".").stream(name)
        for row, (_, data) in enumerate(samples_of(pieces, path)):
            try:
                sample = sample_of(row, parse_sample(data, f"{path} sample {row}"))
            except BadSample as fault:
                if rejected is None:
                    raise
                rejected[fault.reason] += 1
                continue
            yield sample
