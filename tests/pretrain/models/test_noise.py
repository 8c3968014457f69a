"""Dropout by sample: a row has its noise in whatever batch it stands, and the noise is as good as torch's."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.models.layers import TextEncoder, attend, own_segment
from pretrain.models.noise import Dropout, DropPath, name_noise, noise_of, path_rates

RATE = 0.3


def dropped(rate: float, shape: tuple[int, ...], keys: Tensor, site: int = 0) -> Tensor:
    """bool of `shape`, True where nothing is left."""
    layer = Dropout(rate).train()
    layer.site = site
    with noise_of(keys):
        return layer(torch.ones(shape)) == 0


def hashed(key: int, place: int, site: int, lane: int) -> int:
    """The hash by Python's integers: SplitMix64 of key and place, MurmurHash3's finaliser with the lane."""

    def mix(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    token = mix((key + mix(place + (site << 20))) % 2**64)
    x = ((token >> 32) + lane * 0x9E3779B9) % 2**32
    x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
    x = (x ^ (x >> 13) ^ token % 2**32) * 0xC2B2AE35 % 2**32
    return x ^ (x >> 16)


def test_the_noise_is_pinned() -> None:
    """Another noise is another training: a run must not meet it on the way."""
    keys, site = [2**62 + 12345, 7], 2**32 - 1
    found = dropped(RATE, (2, 3, 20), torch.tensor(keys)[:, None], site)
    for row, key in enumerate(keys):
        for place in range(3):
            values = [hashed(key, place, site, lane) for lane in range(20)]
            least = round(RATE * 2**32)
            assert found[row, place].tolist() == [(value + 2**31) % 2**32 < least for value in values]


def test_what_is_left_is_scaled_and_nothing_is_dropped_outside_training() -> None:
    layer, x = Dropout(RATE).train(), torch.randn(8, 16, 32)
    with noise_of(torch.arange(8)[:, None]):
        y = layer(x)
        assert torch.equal(layer.eval()(x), x)
    assert torch.equal(y[y != 0], (x / (1 - RATE))[y != 0])
    assert Dropout(0.0).train()(x) is x


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
def test_the_share_that_is_dropped_is_the_rate(rate: float) -> None:
    count = 64 * 64 * 64
    share = dropped(rate, (64, 64, 64), torch.arange(64)[:, None]).double().mean().item()
    assert abs(share - rate) < 4 * math.sqrt(rate * (1 - rate) / count)


@pytest.mark.parametrize("dimension", [0, 1, 2])
def test_no_two_rows_places_or_lanes_are_alike(dimension: int) -> None:
    noise = dropped(0.5, (48, 64, 80), torch.arange(48)[:, None]).float().sub(0.5)
    table = noise.movedim(dimension, 0).flatten(1) * 2
    correlation = (table @ table.T / table.shape[1]).fill_diagonal_(0).abs().max().item()
    assert correlation < 5.5 / math.sqrt(table.shape[1])


def test_modules_and_samples_have_noise_of_their_own() -> None:
    keys = torch.full((1, 1), 5)
    first = dropped(0.5, (1, 64, 64), keys, site=1)
    for other in (dropped(0.5, (1, 64, 64), keys, site=2), dropped(0.5, (1, 64, 64), keys + 1, site=1)):
        assert abs((first == other).float().mean().item() - 0.5) < 4 * 0.5 / 64


def test_without_keys_torch_s_generator_decides() -> None:
    layer, x = Dropout(0.5).train(), torch.ones(4, 8, 8)
    torch.manual_seed(0)
    first, second = layer(x), layer(x)
    torch.manual_seed(0)
    assert torch.equal(layer(x), first) and not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])


# ----------------------------------------------------------------------------------------------- drop path


def test_a_path_is_dropped_for_a_whole_sample_or_scaled() -> None:
    layer, keys, x = DropPath(RATE).train(), torch.arange(4000)[:, None], torch.randn(4000, 3, 2)
    layer.site = 7
    with noise_of(keys):
        y = layer(x)
        assert torch.equal(layer.eval()(x), x)
    least = round(RATE * 2**32)
    kept = torch.tensor([(hashed(key, 0, 7, 0) + 2**31) % 2**32 >= least for key in range(4000)])
    assert torch.equal(y, torch.where(kept[:, None, None], x / (1 - RATE), 0))
    assert abs(kept.double().mean().item() - (1 - RATE)) < 4 * math.sqrt(RATE * (1 - RATE) / 4000)


def test_rates_of_paths_rise_evenly_to_the_last_block_as_timm_s_do() -> None:
    for layers in (2, 5, 12):
        assert path_rates(RATE, layers) == pytest.approx(torch.linspace(0, RATE, layers).tolist())
    assert path_rates(RATE, 1) == [0.0]


# ------------------------------------------------------------------------------------------------ attention


def test_attention_drops_weights_as_a_loop_in_float64_does() -> None:
    q, k, v = torch.randn(3, 2, 3, 5, 4, dtype=torch.float64).unbind()
    layer, keys = Dropout(RATE).train(), torch.tensor([[11], [12]])
    with noise_of(keys):
        kept = layer.pairs(torch.ones(2, 3, 5, 5), layer.noise(q))
        found = attend(q, k, v, causal=True, dropout=layer)
    for row in range(2):
        for head in range(3):
            for query in range(5):
                scores = torch.stack([q[row, head, query] @ k[row, head, key] / 2 for key in range(query + 1)])
                weights = scores.softmax(0) * kept[row, head, query, : query + 1]
                expected = sum(w * v[row, head, key] for key, w in enumerate(weights))
                torch.testing.assert_close(found[row, head, query], expected, rtol=1e-5, atol=1e-6)


def test_with_next_to_nothing_dropped_it_is_torch_s_attention_with_its_gradients() -> None:
    inputs = [torch.randn(2, 3, 6, 8, requires_grad=True) for _ in range(3)]
    mask = torch.ones(2, 1, 1, 6, dtype=torch.bool)
    mask[1, :, :, 4:] = False
    gradients = []
    for layer in (Dropout(1e-9).train(), None):
        mixed = attend(*inputs, mask=mask, dropout=layer)
        gradients.append([mixed, *torch.autograd.grad(mixed.square().sum(), inputs)])
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    reference = F.scaled_dot_product_attention(*inputs, attn_mask=mask)
    torch.testing.assert_close(gradients[0][0], reference, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------- the same in any batch


def encoder() -> TextEncoder:
    torch.manual_seed(0)
    model = TextEncoder(16, 16, layers=2, heads=2, dropout=RATE, drop_path=RATE).train()
    name_noise(model)
    return model


def encoded(model: TextEncoder, x: Tensor, keys: Tensor) -> list[Tensor]:
    """-> output and the gradient of its square with respect to the input."""
    x = x.clone().requires_grad_()
    with noise_of(keys):
        y = model(x, torch.ones(x.shape[:2], dtype=torch.bool))
    return [y, torch.autograd.grad(y.square().sum(), x)[0]]


def test_a_row_does_not_depend_on_the_rows_around_it() -> None:
    model, x, keys = encoder(), torch.randn(6, 10, 16), torch.arange(6)[:, None]
    whole = encoded(model, x, keys)
    order = torch.tensor([3, 0, 5])
    for one, mine in zip(whole, encoded(model, x[order], keys[order]), strict=True):
        torch.testing.assert_close(mine, one[order], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(whole[0], encoded(model, x, keys + 6)[0], atol=0.1)


def test_a_sample_in_a_packed_row_has_the_noise_of_a_row_of_its_own() -> None:
    model, lengths = encoder(), [4, 5, 3]
    samples = [torch.randn(1, length, 16) for length in lengths]
    keys = torch.tensor([[21], [22], [23]])
    segments = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    places = torch.cat([torch.arange(length) for length in lengths])[None]
    with noise_of(keys[:, 0][segments[0]][None], places):
        packed = model(torch.cat(samples, 1), own_segment(torch.ones(1, 12, dtype=torch.bool), segments))
    alone = [encoded(model, sample, keys[number : number + 1])[0] for number, sample in enumerate(samples)]
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=1e-4, atol=1e-5)
