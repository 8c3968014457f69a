"""The order is pinned, every epoch is every sample once whatever the geometry, and a batch is drawn from afar."""

import dataclasses
import hashlib
import pickle
import time
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import DataError
from data_pipeline.stream import order as module
from data_pipeline.stream.order import (
    DEFAULT,
    ORDER,
    ORDER_VERSION,
    Geometry,
    Windows,
    lanes_of,
    order,
    sample_generator,
    share,
)

GOLDEN = [  # samples, seed, first position, sample ids: changing one is a new order, not a repair
    (10, 0, 0, [5, 8, 4, 2, 0, 1, 9, 3, 7, 6]),
    (1000, 1, 1000, [786, 242, 168, 569, 854]),
    (5000, 3, 4998, [2577, 4561, 2200, 4345]),
    (400_000, 1, 399_998, [382139, 343089, 126490, 111520]),
    (10**9, 7, 5 * 10**8, [917088492, 973451680, 610451305]),
    (2**40, 2**63, 10**12, [472378756050, 422097333245]),
]
GEOMETRIES = [Geometry(), Geometry(3, 2, 2), Geometry(1, 1, 1), Geometry(4, 5, 1), Geometry(2, 1, 7), Geometry(7, 3, 2)]


def ids(start, stop, samples, seed, geometry=DEFAULT):
    return order(np.arange(start, stop), samples, seed, geometry)[1].tolist()


@pytest.mark.parametrize(("samples", "seed", "start", "expected"), GOLDEN)
def test_the_order_is_pinned_by_golden_values(samples, seed, start, expected):
    assert (ORDER, ORDER_VERSION) == ("lanes", 1)
    assert ids(start, start + len(expected), samples, seed) == expected


def test_the_order_of_another_geometry_is_pinned_too():
    assert ids(0, 10, 10, 0, Geometry(2, 2, 2)) == [1, 3, 2, 5, 0, 8, 7, 9, 6, 4]


@pytest.mark.parametrize(
    ("geometry", "expected"),
    zip(GEOMETRIES, ["7d9510e1", "1a157b8f", "f6972beb", "2b3e30ac", "23dd4a1e", "85c9a306"], strict=True),
)
def test_orders_of_many_sizes_are_pinned_by_a_digest_for_each_geometry(geometry, expected):
    digest = hashlib.sha256()
    for samples in [*range(1, 301, 7), 4099, 70_001]:
        found = order(np.arange(2 * samples)[-3000:], samples, samples, geometry)[1]
        digest.update(found.astype("<i8").tobytes())
    assert digest.hexdigest()[:8] == expected


def test_a_seed_counts_modulo_2_to_the_64():
    assert ids(0, 50, 50, -1) == ids(0, 50, 50, 2**64 - 1) == ids(0, 50, 50, 2**65 - 1) != ids(0, 50, 50, 2**63 - 1)
    drawn = [sample_generator(seed, 5, 6, "mask").integers(10**6, size=3).tolist() for seed in (-1, 2**64 - 1)]
    assert drawn == [[240719, 879105, 802213]] * 2


@pytest.mark.parametrize(
    ("samples", "geometry", "lanes"),
    [
        (1, DEFAULT, 1), (2047, DEFAULT, 1), (2048, DEFAULT, 2), (65_535, DEFAULT, 63), (65_536, DEFAULT, 64),
        (10**9, DEFAULT, 64), (11, Geometry(3, 2, 2), 2), (12, Geometry(3, 2, 2), 3),
    ],
)  # fmt: skip
def test_a_dataset_has_as_many_lanes_as_it_fills_with_a_window_each(samples, geometry, lanes):
    assert geometry.lanes_for(samples) == lanes
    assert lanes_of(np.arange(5 * samples, 5 * samples + 70), samples, geometry).tolist() == [
        place % samples % lanes for place in range(70)
    ]


def test_a_geometry_does_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        DEFAULT.lanes = 3
    assert (DEFAULT.lanes, DEFAULT.block, DEFAULT.window) == (64, 64, 16)


@pytest.mark.slow
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("seed", [0, 12345])
def test_every_epoch_is_every_sample_once_for_all_small_datasets(seed, geometry):
    for samples in range(1, 301):
        epochs, found = order(np.arange(2 * samples), samples, seed, geometry)
        assert epochs.tolist() == [0] * samples + [1] * samples
        assert sorted(found[:samples]) == sorted(found[samples:]) == list(range(samples))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 20_000), st.integers(0, 2**64 - 1), st.integers(0, 2**20),
    st.builds(Geometry, st.integers(1, 70), st.integers(1, 70), st.integers(1, 20)),
)  # fmt: skip
def test_any_epoch_of_any_geometry_is_a_permutation(samples, seed, epoch, geometry):
    found = order(np.arange(epoch * samples, (epoch + 1) * samples), samples, seed, geometry)[1]
    assert np.array_equal(np.sort(found), np.arange(samples))


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 2**48), st.integers(0, 2**64 - 1), st.integers(0, 2**14), st.data())
def test_positions_of_one_epoch_never_meet_in_large_datasets(samples, seed, epoch, data):
    first = data.draw(st.integers(0, samples - 1))
    count = min(200, samples - first)
    found = ids(epoch * samples + first, epoch * samples + first + count, samples, seed)
    assert len(set(found)) == count
    assert min(found) >= 0 and max(found) < samples


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 10**6), st.integers(0, 10**9), st.integers(1, 64))
def test_a_position_alone_gives_what_it_gives_among_others(samples, start, count):
    assert ids(start, start + count, samples, 3) == [ids(p, p + 1, samples, 3)[0] for p in range(start, start + count)]


def test_epochs_and_seeds_differ():
    orders = {tuple(ids(start, start + 100, 100, seed)) for seed in (0, 1) for start in (0, 100, 200)}
    assert len(orders) == 6


@pytest.mark.parametrize("geometry", [Geometry(), Geometry(2, 3, 2), Geometry(1, 1, 1)])
def test_places_are_uniform_over_epochs(geometry):
    counts = np.bincount(order(np.arange(0, 20 * 4000, 20), 20, 5, geometry)[1], minlength=20)
    assert ((counts - 200) ** 2 / 200).sum() < 50  # chi squared, 19 degrees: beyond 50 once in 10,000


# ---------------------------------------------------------------------------------- blocks, lanes, distance


def test_a_window_of_a_lane_is_whole_blocks_and_no_two_windows_share_one():
    geometry, samples, seed = Geometry(4, 8, 3), 4 * 8 * 3 * 5 + 13, 9
    places = np.arange(samples)
    lanes, found = lanes_of(places, samples, geometry), order(places, samples, seed, geometry)[1]
    starts = []
    for lane in range(4):
        rows = found[lanes == lane]
        for window in rows[: 4 * 24].reshape(4, 24):  # the fifth takes the short block as well
            ordered = np.sort(window)
            first = next(k for k in range(24) if (ordered[k] - 1) % samples not in window)  # may go round the end
            runs = np.roll(ordered, -first).reshape(3, 8)
            assert (np.diff(runs, axis=1) % samples == 1).all()
            starts += runs[:, 0].tolist()
    assert len(set(starts)) == 4 * 4 * 3
    assert len({(start - starts[0]) % samples % 8 for start in starts}) <= 2  # one raster, cut once at the end


def test_a_batch_is_drawn_from_nearly_as_many_shards_as_a_perfect_shuffle_gives():
    samples, batch = 400 * 1000, 256
    found = order(np.arange(samples), samples, 1)[1][: samples // batch * batch].reshape(-1, batch)
    distinct = np.array([len(np.unique(row // 1000)) for row in found])
    assert distinct.mean() >= 175 and distinct.min() >= 150  # of the ideal 189.2, to the end of the epoch
    neighbours = (np.diff(np.sort(found, axis=1), axis=1) == 1).sum(1).mean()
    assert neighbours < 1.5  # pairs of neighbours in a batch; a perfect shuffle has 0.16


def test_a_seek_into_a_billion_samples_takes_milliseconds():
    order(np.arange(256), 10**9, 1)
    began = time.thread_time()
    for epoch in range(10):
        order(np.arange(256) + 10**9 * epoch + 5 * 10**8, 10**9, 1)
    assert (time.thread_time() - began) / 10 < 0.1


def test_the_shares_of_all_ranks_in_a_row_are_the_same_for_every_world():
    positions = np.arange(990, 990 + 48)
    lanes = lanes_of(positions, 1000, Geometry(8, 4, 2))
    whole = share(positions, lanes, (0, 1)).tolist()
    assert sorted(whole) == positions.tolist()
    for world in (2, 3, 4, 8, 16, 48):
        assert sum((share(positions, lanes, (rank, world)).tolist() for rank in range(world)), []) == whole


def test_a_rank_keeps_its_lanes_from_batch_to_batch():
    geometry, samples, world = Geometry(8, 4, 2), 10_000, 4
    for start in (0, 64, 640):
        positions = np.arange(start, start + 64)
        lanes = lanes_of(positions, samples, geometry)
        for rank in range(world):
            mine = share(positions, lanes, (rank, world))
            assert set(lanes_of(mine, samples, geometry)) == {2 * rank, 2 * rank + 1}


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=12, max_size=12), st.sampled_from([1, 2, 3, 4, 6, 12]), st.data())
def test_a_share_is_a_part_of_the_batch_sorted_by_lane(lanes, world, data):
    rank = data.draw(st.integers(0, world - 1))
    positions = data.draw(st.permutations(range(100, 112)))
    by_lane = [position for lane in range(6) for position, its in zip(positions, lanes, strict=True) if its == lane]
    part = 12 // world
    found = share(np.array(positions), np.array(lanes), (rank, world)).tolist()
    assert found == by_lane[rank * part : rank * part + part]


def test_positions_of_one_lane_keep_their_order_in_a_large_batch():
    positions, lanes = np.arange(4096)[::-1], np.arange(4096) // 3 % 2
    assert share(positions, lanes, (0, 2)).tolist() == positions[lanes == 0].tolist()[:2048]


@pytest.mark.parametrize(
    ("size", "shard", "fits"),
    [(10, (0, 4), 8), (3, (0, 4), 4), (8, (4, 4), 8), (8, (-1, 4), 8), (1, (0, 2), 2), (7, (1, 3), 6)],
)
def test_a_batch_that_ranks_cannot_share_is_refused_with_a_size_that_fits(size, shard, fits):
    with pytest.raises(
        DataError, match=rf"^batch of {size} for rank {shard[0]} of {shard[1]}: .* use {fits}, a rank <"
    ):
        share(np.arange(size), np.zeros(size, np.int64), shard)


@pytest.mark.parametrize(
    ("positions", "samples", "message"),
    [([0], 0, "^samples=0: "), ([], -1, "^samples=-1: "), ([7, -1], 10, "^position -1 is"), ([-9, 3, -2], 1, "-9")],
)
def test_an_empty_dataset_and_negative_positions_are_refused(positions, samples, message):
    for ask in (lambda given: order(given, samples, 0), lambda given: lanes_of(given, samples)):
        with pytest.raises(DataError, match=message):
            ask(np.array(positions, np.int64))


def test_no_position_has_no_sample():
    epochs, found = order(np.array([], np.int64), 10, 0)
    assert epochs.tolist() == found.tolist() == [] and epochs.dtype == found.dtype == np.int64


def test_a_samples_randomness_depends_on_its_four_names_only():
    names = [(0, 0, 0, "crop"), (1, 0, 0, "crop"), (0, 1, 0, "crop"), (0, 0, 1, "crop"), (0, 0, 0, "mask")]
    drawn = [sample_generator(*name).integers(2**62) for name in names]
    assert len(set(drawn)) == len(names)
    assert drawn == [sample_generator(*name).integers(2**62) for name in names]
    assert sample_generator(1, 2, 3, "crop").integers(10**6, size=3).tolist() == [250884, 891746, 451439]


# ----------------------------------------------------------------------------------- windows that are kept


@pytest.fixture
def computed(monkeypatch) -> list[list[int]]:
    """The positions of each call of `order` that a reader of windows makes."""
    calls: list[list[int]] = []
    original: Callable[..., tuple[np.ndarray, np.ndarray]] = module.order

    def spy(positions, *of):
        calls.append(positions.tolist())
        return original(positions, *of)

    monkeypatch.setattr(module, "order", spy)
    return calls


def windows_of(samples: int, epochs: int, geometry: Geometry) -> list[list[int]]:
    """The positions of every window of every lane, counted one by one; what is left over stays with the last one."""
    lanes, span = geometry.lanes_for(samples), geometry.block * geometry.window
    count = max(1, samples // lanes // geometry.block // geometry.window)
    found: dict[tuple[int, int, int], list[int]] = {}
    for position in range(epochs * samples):
        epoch, place = divmod(position, samples)
        key = epoch, min(place // lanes // span, count - 1), place % lanes
        found.setdefault(key, []).append(position)
    return list(found.values())


@settings(max_examples=80, deadline=None)
@given(st.lists(st.lists(st.integers(0, 19), min_size=1, max_size=5, unique=True), max_size=12))
def test_a_window_is_permuted_once_and_the_oldest_one_makes_room(requests):
    """Two lanes keep four windows; a batch of more is permuted position by position."""
    geometry, samples, calls = Geometry(2, 2, 2), 2 * 4 * 5 + 3, []
    all_windows, original = windows_of(samples, 2, geometry), module.order
    assert len(all_windows) == 20
    windows, kept, expected = Windows(samples, 3, geometry), [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "order", lambda given, *of: calls.append(sorted(given.tolist())) or original(given, *of))
        for request in requests:
            positions = [all_windows[number][0] for number in request]
            assert (
                windows.order(np.array(positions))[1].tolist()
                == original(np.array(positions), samples, 3, geometry)[1].tolist()
            )
            if len(request) > 4:
                expected.append(sorted(positions))
                continue
            missing = sorted(set(request) - set(kept))
            if missing:
                expected.append(sorted(position for number in missing for position in all_windows[number]))
            while len(kept) + len(missing) > 4:
                kept.remove(next(number for number in kept if number not in request))
            kept += missing
    assert calls == expected


def test_a_reader_that_goes_on_computes_every_sample_of_an_epoch_once(computed):
    samples = 3 * 64 * 64 * 16 + 1000
    windows = Windows(samples, 3)
    for start in range(0, samples, 4096):
        windows.order(np.arange(start, min(samples, start + 4096)))
    assert sorted(sum(computed, [])) == list(range(samples))
    assert len(computed) == 3


@pytest.mark.parametrize(
    ("samples", "geometry", "windows"),
    [
        (43, Geometry(2, 2, 2), 4), (5, Geometry(1, 1, 1), 2), (1, DEFAULT, 2), (50_001, Geometry(8, 16, 4), 16),
        (4_194_304, Geometry(4, 1 << 15, 16), 2), (4_194_308, Geometry(4, 1 << 15, 16), 1),
    ],
)  # fmt: skip
def test_two_windows_of_each_lane_are_kept_and_8_megabytes_at_most(samples, geometry, windows):
    lanes, span = geometry.lanes_for(samples), geometry.block * geometry.window
    rows = -(-samples // lanes)
    longest = rows - span * (rows // span - 1) if rows > span else rows
    kept = Windows(samples, 3, geometry)._ids
    assert kept.shape == (windows, longest) and kept.nbytes <= 8 << 20


def test_a_reader_that_was_pickled_goes_on_alike():
    geometry = Geometry(2, 2, 2)
    windows = pickle.loads(pickle.dumps(Windows(43, 3, geometry)))
    assert windows.order(np.arange(99))[1].tolist() == ids(0, 99, 43, 3, geometry)


@pytest.mark.parametrize("geometry", [*GEOMETRIES, Geometry(64, 256, 64)])  # the last too large to keep its windows
@pytest.mark.parametrize("samples", [1, 5, 100, 1023, 4000, 65_536, 100_003, 10**9])
def test_a_reader_that_keeps_windows_has_the_order_of_every_position(samples, geometry):
    chance = np.random.default_rng(samples)
    windows, position = Windows(samples, 3, geometry), 0
    for number in range(60):
        position = int(chance.integers(3 * samples)) if number % 10 == 9 else position
        positions = np.arange(position, position := position + int(chance.choice([1, 7, 256, 1000])))
        if number % 3 == 0:
            positions = chance.permutation(positions)[: -(-len(positions) // 3)]
        epochs, found = windows.order(positions)
        expected_epochs, expected = order(positions, samples, 3, geometry)
        assert (epochs == expected_epochs).all() and (found == expected).all(), positions
