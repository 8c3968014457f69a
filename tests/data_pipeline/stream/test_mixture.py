"""Proportions hold at every prefix, sources keep their own epochs, and a change of weights is part of the state."""

import hashlib
import itertools
import json
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.stream.mixture import MOST_SOURCES, Mixture, Schedule, reduce_weights, seed_of_source
from data_pipeline.stream.reader import Stream

WEIGHTS = st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any)


def by_counting(schedule, stop):
    """The reference: position after position, the sources' places counted one by one."""
    sources, _ = schedule.assign(np.arange(stop))
    seen = [0] * schedule.sources
    for source in sources.tolist():
        yield source, seen[source], list(seen)
        seen[source] += 1


# ------------------------------------------------------------------------------------------------ schedule


@pytest.mark.parametrize(
    ("weights", "expected"),
    [([7, 3], "0100010010"), ([1, 1], "01"), ([1], "0"), ([2, 1, 1], "0120"), ([0, 2, 1], "121")],
)
def test_the_layout_of_a_period_is_pinned(weights, expected):
    assert "".join(map(str, Schedule([(0, weights)]).assign(np.arange(len(expected)))[0])) == expected


MANY = [
    (1,), (3, 5), (1, 0, 1), (5, 3, 2), (40, 7, 1, 9), (1, 1, 1, 1, 1), (0, 17, 4, 30), (97, 2, 1, 13, 5, 8),
    (25, 24, 1),
]  # fmt: skip


def test_the_layouts_of_many_weights_are_pinned_by_a_digest():
    digest = hashlib.sha256()
    for weights in MANY:
        sources, _ = Schedule([(0, weights)]).assign(np.arange(2 * sum(weights)))
        digest.update("".join(map(str, sources)).encode())
    assert digest.hexdigest()[:16] == "177604d214f1623a"


@settings(max_examples=60, deadline=None)
@given(WEIGHTS)
def test_no_source_is_further_from_its_share_than_tijdeman_s_bound(weights):
    schedule, total, live = Schedule([(0, weights)]), sum(weights), sum(map(bool, weights))
    bound = 1 - Fraction(1, 2 * live - 2) if live > 1 else 0
    for position in range(total + 1):
        counts = schedule.counts(position)
        assert max(abs(Fraction(position * w, total) - n) for w, n in zip(weights, counts, strict=True)) <= bound
        assert sum(counts) == position and all(isinstance(count, int) for count in counts)


@pytest.mark.parametrize(("position", "segment"), [(0, 0), (9, 0), (10, 1), (11, 1), (19, 1), (20, 2), (10**15, 2)])
def test_a_segment_begins_at_its_position(position, segment):
    schedule = Schedule([(0, [1]), (10, [2]), (20, [1])])
    assert schedule.segment(position) == segment


@settings(max_examples=60, deadline=None)
@given(WEIGHTS)
def test_every_source_has_its_share_to_within_a_sample_at_every_prefix(weights):
    schedule, total = Schedule([(0, weights)]), sum(weights)
    for position, (_, _, seen) in enumerate(by_counting(schedule, 2 * total + 3)):
        assert all(abs(Fraction(position * w, total) - count) < 1 for w, count in zip(weights, seen, strict=True))
        assert schedule.counts(position) == seen


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 4), st.integers(1, 4))
def test_shares_hold_within_every_segment_and_no_place_is_left_out_or_taken_twice(data, sources, segments):
    each = st.lists(st.integers(0, 9), min_size=sources, max_size=sources).filter(any)
    starts = [0, *sorted(data.draw(st.sets(st.integers(1, 300), min_size=segments - 1, max_size=segments - 1)))]
    changes = [(start, data.draw(each)) for start in starts]
    schedule = Schedule(changes)
    found, places = schedule.assign(np.arange(400))
    expected = list(by_counting(schedule, 400))
    assert places.tolist() == [place for _, place, _ in expected]
    for (start, weights), stop in zip(changes, [*starts[1:], 400], strict=True):
        base = schedule.counts(start)
        for position in range(start, stop):
            for source, weight in enumerate(weights):
                share = Fraction((position - start) * weight, sum(weights))
                assert abs(expected[position][2][source] - base[source] - share) < 1
    assert len(set(zip(found.tolist(), places.tolist(), strict=True))) == 400


def test_a_position_far_away_is_as_its_period_says():
    schedule = Schedule([(0, [5, 3, 2]), (10**12, [1, 1, 2])])
    assert schedule.counts(10**12) == [5 * 10**11, 3 * 10**11, 2 * 10**11]
    sources, places = schedule.assign(np.array([10**12 + 4 * 10**9]))
    near, _ = schedule.assign(np.array([10**12]))
    assert sources[0] == near[0] and places[0] == schedule.counts(10**12 + 4 * 10**9)[sources[0]]


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([0.7, 0.3], (7, 3)), (["1/3", "2/3"], (1, 2)), ([4, 2], (2, 1)), ([0.1, 0.2, "0.7"], (1, 2, 7)),
        ([Fraction(1, 6), 0.5], (1, 3)), ([0, 5], (0, 1)),
    ],
)  # fmt: skip
def test_weights_are_reduced_to_whole_numbers(weights, expected):
    assert reduce_weights(weights) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([], "ascending positions from 0"),
        ([(5, [1])], "ascending positions from 0"),
        ([(0, [1]), (9, [1]), (9, [1])], "ascending"),
        ([(0, [1, 1]), (9, [1])], "1 weights from position 9 for 2"),
        ([(0, [0, 0])], "one above 0"),
        ([(0, [2, -1])], "0 or more"),
        ([(0, [1, 1e-9])], "round them"),
    ],
)
def test_weights_that_cannot_be_laid_out_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        Schedule(changes)


# ----------------------------------------------------------------------------------------------- samples


@pytest.fixture(scope="module")
def folders(in_this_process, tmp_path_factory):
    """Three datasets of scenes: 25, 10 and 7 samples."""
    root = tmp_path_factory.mktemp("datasets")
    with pytest.MonkeyPatch.context() as patch:
        build = in_this_process(patch)
        for number, count in enumerate((25, 10, 7)):
            source = {"kind": "scenes", "count": count, "seed": number}
            build(source=source, output=str(root / f"d{number}"), shard_size=10)
    return [root / f"d{number}" for number in range(3)]


def mixture(folders, changes, seed=3):
    streams = [Stream(folder, seed_of_source(seed, number)) for number, folder in enumerate(folders)]
    return Mixture(streams, Schedule(changes), seed)


def test_a_mixture_is_its_sources_in_their_own_order_and_epochs(folders):
    mixed = mixture(folders, [(0, [5, 3, 2])])
    samples = mixed.read(0, 100)
    firsts = [0, 25, 35, 42]
    assert [sample.position for sample in samples] == list(range(100))
    for number, folder in enumerate(folders):
        mine = [sample for sample in samples if firsts[number] <= sample.id < firsts[number + 1]]
        alone = Stream(folder, seed_of_source(3, number)).read(0, len(mine))
        assert [(s.id - firsts[number], s.epoch, s.key) for s in mine] == [(s.id, s.epoch, s.key) for s in alone]
    assert [max(s.epoch for s in samples if firsts[n] <= s.id < firsts[n + 1]) for n in range(3)] == [1, 2, 2]


def test_reading_a_mixture_is_a_function_of_positions(folders):
    changes = [(0, [5, 3, 2]), (33, [1, 0, 1]), (70, [0, 1, 0])]
    whole = mixture(folders, changes).read(0, 120)
    for start, stop in ((0, 1), (32, 34), (13, 97), (70, 71), (120, 120)):
        assert mixture(folders, changes).read(start, stop) == whole[start:stop]
    mixed = mixture(folders, changes)
    for sample in whole[::7]:
        assert mixed.locate(sample.position)[:2] == (sample.epoch, sample.id)
        assert mixed.fetch(sample.id).key == sample.key


@pytest.mark.parametrize("world", [2, 3, 4])
def test_the_shares_of_all_ranks_are_the_batches_of_one(folders, world):
    mixed = mixture(folders, [(0, [5, 3, 2]), (20, [1, 1, 1])])
    alone = [[s.id for s in batch] for batch in itertools.islice(mixed.batches(7, 12), 4)]
    ranks = [itertools.islice(mixed.batches(7, 12, (rank, world)), 4) for rank in range(world)]
    assert [[s.id for part in parts for s in part] for parts in zip(*ranks, strict=True)] == alone
    assert [sorted(batch) for batch in alone] == [
        sorted(s.id for s in mixed.read(start, start + 12)) for start in range(7, 55, 12)
    ]


def test_an_id_beyond_the_mixture_is_refused(folders):
    mixed = mixture(folders, [(0, [1, 1, 1])])
    assert (mixed.samples, mixed.dataset) == (42, " + ".join(map(str, folders)))
    for sample_id in (42, -1):
        with pytest.raises(DataError, match="ids 0 to 41"):
            mixed.fetch(sample_id)


@pytest.mark.parametrize(
    ("streams", "weights"), [(0, 1), (1, 2), (2, 1), (MOST_SOURCES + 1, MOST_SOURCES), (MOST_SOURCES, MOST_SOURCES)]
)
def test_a_mixture_has_a_weight_for_each_dataset(folders, streams, weights):
    given = [Stream(folders[0], 0)] * streams, Schedule([(0, [1] * weights)]), 3
    if streams == weights:
        assert Mixture(*given).samples == 25 * MOST_SOURCES
        return
    with pytest.raises(ConfigError, match=f"^{streams} datasets, {weights} weights; give one each, at most 16"):
        Mixture(*given)


def test_more_datasets_than_a_state_can_name_are_refused(folders):
    schedule = Schedule([(0, [1])])
    for sources in (0, MOST_SOURCES + 1):
        schedule.sources = sources
        with pytest.raises(ConfigError, match=f"^{sources} datasets, {sources} weights"):
            Mixture([Stream(folders[0], 0)] * sources, schedule, 3)


def test_the_samples_of_any_positions_come_in_the_order_given(folders):
    mixed = mixture(folders, [(0, [5, 3, 2]), (33, [1, 0, 1])])
    whole = mixed.read(0, 60)
    positions = np.random.default_rng(0).permutation(60)[:37]
    assert mixed.take(positions) == [whole[position] for position in positions]
    assert mixed.take(np.array([], np.int64)) == mixed.read(9, 9) == []


def test_a_position_is_located_in_its_dataset(folders):
    mixed = mixture(folders, [(0, [5, 3, 2]), (33, [1, 0, 1])])
    ids = [range(25), range(25, 35), range(35, 42)]
    for sample in mixed.read(0, 90):
        its = next(span for span in ids if sample.id in span)
        assert mixed.locate(sample.position) == (sample.epoch, sample.id, its)


def test_a_position_s_lane_is_that_of_its_source(folders):
    mixed = mixture(folders, [(0, [5, 3, 2])])
    for number, stream in enumerate(mixed.streams):
        stream.lanes = lambda places, number=number: 1000 * number + places  # which tells source and place
    positions = np.arange(7, 90)
    expected = [1000 * source + place for source, place, _ in itertools.islice(by_counting(mixed.schedule, 90), 7, 90)]
    assert mixed.lanes(positions).tolist() == expected


def test_a_rank_s_share_of_a_batch_is_sorted_by_lane(folders):
    mixed = mixture(folders, [(0, [5, 3, 2])])
    mixed.lanes = lambda positions: positions % 3  # of 7 to 12: 9, 12 | 7, 10 | 8, 11
    batches = list(itertools.islice(mixed.batches(7, 6, (1, 2)), 2))
    assert [[sample.position for sample in batch] for batch in batches] == [[10, 8, 11], [16, 14, 17]]
    (both,) = itertools.islice(mixed.batches(7, 6), 1)
    assert [sample.position for sample in both] == [9, 12, 7, 10, 8, 11]


def test_seeds_of_the_sources_are_pinned():
    assert [seed_of_source(3, 0), seed_of_source(3, 1), seed_of_source(0, 12)] == [
        11977379827103838736, 7968242426661474818, 1077924279750421385,
    ]  # fmt: skip


def test_the_first_and_the_last_sample_of_each_dataset_are_fetched_by_their_ids_without_a_position(folders):
    mixed = mixture(folders, [(0, [1, 1, 1])])
    found = [mixed.fetch(sample_id) for sample_id in (0, 24, 25, 34, 35, 41)]
    assert [(sample.id, sample.position) for sample in found] == [(n, -1) for n in (0, 24, 25, 34, 35, 41)]
    alone = [Stream(folders[number], 0).fetch(row) for number, row in ((0, 0), (0, 24), (1, 0), (1, 9), (2, 0), (2, 6))]
    assert [sample.image for sample in found] == [sample.image for sample in alone]


def test_a_mixture_of_one_dataset_is_that_dataset(folders):
    alone = Stream(folders[1], seed_of_source(3, 0))
    assert [s.id for s in mixture(folders[1:2], [(0, [1])]).read(0, 25)] == [s.id for s in alone.read(0, 25)]


# ------------------------------------------------------------------------------------------------- state


def test_the_state_of_the_largest_mixture_is_below_one_kilobyte(folders):
    weights = [600 + number for number in range(MOST_SOURCES)]
    mixed = mixture([folders[0]] * MOST_SOURCES, [(0, weights), (10**14, weights[::-1])], seed=2**63)
    for stream in mixed.streams:
        stream.samples = 10**10
    state = json.loads(json.dumps(mixed.state(10**15)))
    assert len(json.dumps(state)) < 1024
    mixed.check(state)


@pytest.mark.parametrize(
    ("position", "weights", "first", "read"),
    [
        (0, [5, 3, 2], 0, [0, 0, 0]), (1, [5, 3, 2], 0, None), (10, [5, 3, 2], 0, [5, 3, 2]),
        (20, [5, 3, 2], 0, [10, 6, 4]), (21, [1, 0, 1], 20, None), (30, [1, 0, 1], 20, [15, 6, 9]),
        (31, [0, 1, 0], 30, [15, 7, 9]), (40, [0, 1, 0], 30, [15, 16, 9]),
    ],
)  # fmt: skip
def test_a_state_holds_what_was_read_and_the_weights_of_the_last_sample(folders, position, weights, first, read):
    mixed = mixture(folders, [(0, [5, 3, 2]), (20, [1, 0, 1]), (30, [0, 1, 0])])
    sources, _ = mixed.schedule.assign(np.arange(position))
    alone = mixed.streams[0].state(position)
    del alone["dataset"], alone["samples"]
    assert mixed.state(position) == alone | {
        "position": position, "seed": 3, "weights": weights, "weights_from": first,
        "datasets": [f"{stream.fingerprint[:12]}:{stream.samples}" for stream in mixed.streams],
        "read": read or np.bincount(sources, minlength=3).tolist(),
    }  # fmt: skip
    mixed.check(mixed.state(position))


def test_a_mixture_of_one_dataset_has_a_state(folders):
    mixed = mixture(folders[1:2], [(0, [4])])
    state = mixed.state(12)
    assert (state["read"], state["weights"], len(state["datasets"])) == ([12], [1], 1)
    mixed.check(state)


def test_a_state_of_another_seed_is_refused_naming_it(folders):
    state = mixture(folders, [(0, [1, 1, 1])]).state(12)
    with pytest.raises(DataError, match="seed: 3 saved, 4 now") as caught:
        Mixture(mixture(folders, [(0, [1, 1, 1])]).streams, Schedule([(0, [1, 1, 1])]), 4).check(state)
    assert " + ".join(map(str, folders)) in str(caught.value)
    del state["position"]
    with pytest.raises(DataError, match=r"read\[0\]: 4 saved, 0 now"):  # without a position it is that of the beginning
        mixture(folders, [(0, [1, 1, 1])]).check(state)


def test_weights_may_change_later_and_never_before(folders):
    first = mixture(folders, [(0, [5, 3, 2])])
    state = first.state(40)
    for later in (40, 41):
        mixture(folders, [(0, [5, 3, 2]), (later, [1, 1, 1])]).check(state)
    with pytest.raises(DataError, match="weights_from: 0 saved, 39 now"):
        mixture(folders, [(0, [5, 3, 2]), (39, [5, 3, 2])]).check(state)
    with pytest.raises(DataError) as caught:
        mixture(folders, [(0, [5, 3, 2]), (30, [1, 1, 1])]).check(state)
    assert [line.split(":")[0].strip() for line in str(caught.value).splitlines()[1:]] == [
        "read[0]", "read[2]", "weights[0]", "weights[1]", "weights[2]", "weights_from",
    ]  # fmt: skip


def test_a_mixture_of_other_datasets_is_refused_naming_which(folders):
    state = mixture(folders, [(0, [1, 1, 1])]).state(12)
    with pytest.raises(DataError) as caught:
        mixture([folders[0], folders[2], folders[1]], [(0, [1, 1, 1])]).check(state)
    first, *lines = str(caught.value).splitlines()
    assert [line.split(":")[0].strip() for line in lines] == ["datasets[1]", "datasets[2]"]


def test_a_state_of_one_dataset_is_no_state_of_a_mixture(folders):
    with pytest.raises(DataError, match="dataset: '.*' saved, None now"):
        mixture(folders, [(0, [1, 1, 1])]).check(Stream(folders[0], 3).state(12))
