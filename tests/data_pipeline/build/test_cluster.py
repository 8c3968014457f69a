"""Real Ray: kills of every kind, and an actor that cannot start."""

import os
import time
from pathlib import Path

import pytest

from data_pipeline.errors import DataError
from data_pipeline.shards.codes import encode_dataset
from tests.data_pipeline.build import campaign

pytestmark = [pytest.mark.real, pytest.mark.slow]


def test_a_fetched_build_is_the_same_after_kills_of_every_kind(tmp_path):
    killed = campaign.run(tmp_path, kills=3, workers=[2], seed=5, rows=400, each=3, where=str(tmp_path))
    assert killed.total() == 3


class Here:
    """A tokenizer that this process can load and no worker can."""

    id, image_size, codes_per_image, codebook_size = "0123456789ab", 8, 1, 2


def only_here(directory):
    if Path(directory, "pid").read_text() == str(os.getpid()):
        return Here()
    raise DataError(f"{directory}: the weights are damaged; export the tokenizer again")


def test_an_actor_that_cannot_load_its_tokenizer_ends_as_that_error(scenes, tmp_path):
    (tmp_path / "pid").write_text(str(os.getpid()))
    start = time.monotonic()
    with pytest.raises(DataError, match="the weights are damaged"):
        encode_dataset(scenes, only_here, tmp_path, workers=1, progress=False)
    assert time.monotonic() - start < 60
