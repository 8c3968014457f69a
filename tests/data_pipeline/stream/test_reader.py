import itertools
import json

import pytest

from data_pipeline.errors import DataError
from data_pipeline.stream.reader import Stream


def ids(batch):
    return [sample.id for sample in batch]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_the_parts_of_all_ranks_together_are_the_batches_of_one_process(scenes, world):
    stream, size = Stream(scenes, seed=3), 24
    alone = [ids(batch) for batch in itertools.islice(stream.batches(5, size), 4)]
    ranks = [itertools.islice(stream.batches(5, size, (rank, world)), 4) for rank in range(world)]
    assert [sum(map(ids, parts), []) for parts in zip(*ranks, strict=True)] == alone


def test_reading_is_a_function_of_positions(scenes):
    stream = Stream(scenes, seed=3)
    whole = stream.read(0, 60)
    assert [sample.position for sample in whole] == list(range(60))
    assert [sample.epoch for sample in whole] == [position // 25 for position in range(60)]
    for start, stop in ((0, 1), (24, 26), (13, 57), (60, 60)):
        assert Stream(scenes, seed=3).read(start, stop) == whole[start:stop]


def test_an_epoch_is_every_sample_once_in_an_order_of_its_seed(scenes):
    first, second = ids(Stream(scenes, seed=0).read(0, 25)), ids(Stream(scenes, seed=1).read(0, 25))
    assert sorted(first) == sorted(second) == list(range(25)) and first != second


def test_fetch_gives_the_sample_that_read_gives(scenes):
    stream = Stream(scenes, seed=0)
    for sample in stream.read(0, 25):
        found = stream.fetch(sample.id)
        assert (found.key, found.image, found.texts, found.meta) == (
            sample.key, sample.image, sample.texts, sample.meta,
        )  # fmt: skip
        assert (found.epoch, found.position) == (0, -1)


@pytest.mark.parametrize("sample_id", [-1, 25])
def test_an_id_beyond_the_dataset_is_refused(scenes, sample_id):
    with pytest.raises(DataError, match="ids 0 to 24"):
        Stream(scenes, seed=0).fetch(sample_id)


@pytest.mark.parametrize(("size", "shard"), [(10, (0, 3)), (8, (2, 2)), (8, (-1, 2))])
def test_a_batch_that_the_world_does_not_divide_is_refused(scenes, size, shard):
    with pytest.raises(DataError, match=f"batch of {size}"):
        next(Stream(scenes, seed=0).batches(0, size, shard))


def test_a_missing_dataset_is_refused_naming_the_command(tmp_path):
    with pytest.raises(DataError, match="tessera data build"):
        Stream(tmp_path / "nowhere", seed=0)


def test_an_empty_dataset_is_refused(tmp_path):
    (tmp_path / "manifest.json").write_text('{"version": 1, "samples": 0, "shards": []}')
    with pytest.raises(DataError, match="0 samples"):
        Stream(tmp_path, seed=0)


def test_a_shard_of_another_size_is_refused_when_it_is_opened(scenes):
    path = scenes / "00001.tar"
    path.write_bytes(path.read_bytes()[:-1024])
    with pytest.raises(DataError, match="00001.tar: .* bytes, the manifest has"):
        Stream(scenes, seed=0).read(0, 25)


# ---------------------------------------------------------------------------------------------- state


def test_the_state_is_small_json_and_agrees_with_its_own_stream(scenes):
    stream = Stream(scenes, seed=2**63)
    state = json.loads(json.dumps(stream.state(10**15)))
    assert len(json.dumps(state)) < 1024 and state["position"] == 10**15
    Stream(scenes, seed=2**63).check(state)


@pytest.mark.parametrize(
    ("field", "value"),
    [("version", 2), ("order", "feistel"), ("order_version", 2), ("lanes", 8), ("block", 1), ("window", 2),
     ("dataset", "00"), ("samples", 24), ("seed", 1),
     ("codes", "0123456789ab"), ("mixture", [1, 2])],
)  # fmt: skip
def test_a_state_that_differs_is_refused_field_by_field(scenes, field, value):
    stream = Stream(scenes, seed=0)
    with pytest.raises(DataError) as caught:
        stream.check({**stream.state(5), field: value})
    first, *fields = str(caught.value).splitlines()
    assert fields == [f"  {field}: {value!r} saved, {stream.state(0).get(field)!r} now"]


def test_a_state_that_lacks_a_field_is_refused(scenes):
    stream = Stream(scenes, seed=0)
    with pytest.raises(DataError, match="seed: None saved, 0 now"):
        stream.check({name: value for name, value in stream.state(5).items() if name != "seed"})
