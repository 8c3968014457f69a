"""The bytes of a manifest are its canonical JSON, whose hash names the dataset."""

from dataclasses import asdict

from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.shards.manifest import Manifest, Shard, canonical_json

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
SHARDS = st.builds(Shard, TEXT, st.integers(0, 2**40), st.integers(0, 2**60), st.text("0123456789abcdef"))


@settings(deadline=None)
@given(st.lists(SHARDS, max_size=5))
def test_the_bytes_are_canonical_json(shards: list[Shard]) -> None:
    manifest = Manifest(tuple(shards))
    tree = {"version": 1, "samples": sum(shard.n for shard in shards), "shards": [asdict(shard) for shard in shards]}
    assert manifest.to_json() == canonical_json(tree)
