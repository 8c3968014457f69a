"""The bytes of a manifest are its canonical JSON, whose hash names the dataset."""

from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import DataError
from data_pipeline.shards.manifest import Index, Manifest, Shard, canonical_json, pack_index, unpack_index

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
SHARDS = st.builds(Shard, TEXT, st.integers(0, 2**40), st.integers(0, 2**60), st.text("0123456789abcdef"))


@settings(deadline=None)
@given(st.lists(SHARDS, max_size=5))
def test_the_bytes_are_canonical_json(shards: list[Shard]) -> None:
    manifest = Manifest(tuple(shards))
    tree = {"version": 1, "samples": sum(shard.n for shard in shards), "shards": [asdict(shard) for shard in shards]}
    assert manifest.to_json() == canonical_json(tree)


@pytest.mark.parametrize("sums", [None, [7, 2**32 - 1]])
def test_an_index_is_read_back_as_it_was_written_up_to_the_last_block_of_its_tar(sums):
    kept = None if sums is None else np.array(sums, np.uint32)
    index = Index(5 * 512, 2**64 - 1, np.array([0, 2, 5], np.uint32), kept)
    data = pack_index(index)
    found = unpack_index(data, "x")
    assert (found.tar_bytes, found.xxh3, found.offsets.tolist()) == (5 * 512, 2**64 - 1, [0, 2, 5])
    assert (None if found.sums is None else found.sums.tolist()) == sums
    for wrong in (data[:-4], data + bytes(4), data[:-1], data[:39], b"x" + data[1:]):
        with pytest.raises(DataError, match="damaged|not an index"):
            unpack_index(wrong, "x")
    for offsets in ([0, 2, 6], [0, 2, 2], [3, 2, 5]):
        with pytest.raises(DataError, match="do not lie one after another"):
            unpack_index(pack_index(Index(5 * 512, 0, np.array(offsets, np.uint32), index.sums)), "x")
