"""The order is pinned, every epoch is every sample once whatever the geometry, and a batch is drawn from afar."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import DataError
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


@pytest.mark.parametrize(("positions", "samples"), [([0], 0), ([-1], 10)])
def test_an_empty_dataset_and_negative_positions_are_refused(positions, samples):
    with pytest.raises(DataError):
        order(np.array(positions), samples, 0)


def test_a_samples_randomness_depends_on_its_four_names_only():
    names = [(0, 0, 0, "crop"), (1, 0, 0, "crop"), (0, 1, 0, "crop"), (0, 0, 1, "crop"), (0, 0, 0, "mask")]
    drawn = [sample_generator(*name).integers(2**62) for name in names]
    assert len(set(drawn)) == len(names)
    assert drawn == [sample_generator(*name).integers(2**62) for name in names]
    assert sample_generator(1, 2, 3, "crop").integers(10**6, size=3).tolist() == [250884, 891746, 451439]


@pytest.mark.parametrize("geometry", [*GEOMETRIES, Geometry(64, 1024, 64)])  # the last too large to keep windows
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
