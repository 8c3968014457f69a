import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import DataError
from data_pipeline.stream.order import ORDER, ORDER_VERSION, order, sample_generator

GOLDEN = [  # samples, seed, first position, sample ids: changing one is a new order, not a repair
    (10, 0, 0, [7, 5, 0, 9, 1, 8, 2, 4, 6, 3]),
    (1000, 1, 1000, [645, 694, 307, 397, 544]),
    (10**9, 7, 5 * 10**8, [769550676, 238629638, 642795810]),
    (2**40, 2**63, 10**12, [786719697862, 324727702899]),
]


def ids(start, stop, samples, seed):
    return order(np.arange(start, stop), samples, seed)[1].tolist()


@pytest.mark.parametrize(("samples", "seed", "start", "expected"), GOLDEN)
def test_the_order_is_pinned_by_golden_values(samples, seed, start, expected):
    assert (ORDER, ORDER_VERSION) == ("feistel", 1)
    assert ids(start, start + len(expected), samples, seed) == expected


@pytest.mark.parametrize("seed", [0, 12345])
def test_every_epoch_is_every_sample_once_for_all_small_datasets(seed):
    for samples in range(1, 301):
        epochs, found = order(np.arange(2 * samples), samples, seed)
        assert epochs.tolist() == [0] * samples + [1] * samples
        assert sorted(found[:samples]) == sorted(found[samples:]) == list(range(samples))


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


def test_places_are_uniform_over_epochs():
    counts = np.bincount(order(np.arange(0, 20 * 4000, 20), 20, 5)[1], minlength=20)
    assert ((counts - 200) ** 2 / 200).sum() < 50  # chi squared, 19 degrees: beyond 50 once in 10,000


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
