"""Image codes of a sample -> ids. Letters: I image tokens."""

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.schema import Sample
from data_pipeline.stream.order import sample_generator
from pretrain.schema.common import CodesRead


def codes_of(sample: Sample, reads: CodesRead, seed: int) -> np.ndarray:
    """Return int64 [I]; of several crops, the one the sample draws. Raises DataError if they do not fit `reads`."""
    if sample.codes is None:
        raise DataError(f"sample {sample.key!r} has no image codes; run `tessera data encode` on the dataset")
    codes = np.asarray(sample.codes).astype(np.int64)
    if codes.ndim == 2:
        codes = codes[sample_generator(seed, sample.epoch, sample.id, "crop").integers(len(codes))]
    if len(codes) != reads.count:
        raise DataError(
            f"sample {sample.key!r} has {len(codes)} codes, model.{reads.count_field}={reads.count}; "
            f"set it to {len(codes)} or encode with another tokenizer"
        )
    if codes.max() >= reads.codebook:
        raise DataError(
            f"sample {sample.key!r} has code {codes.max()}, beyond model.{reads.codebook_field}={reads.codebook}; "
            "set it to the codebook size of the tokenizer"
        )
    return codes
