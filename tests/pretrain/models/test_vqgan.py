"""VQGAN: published sizes, the codebook against a loop, straight-through gradients, decode(encode(x))."""

import pytest
import torch

from pretrain.models.discriminator import PatchDiscriminator
from pretrain.models.vqgan import Codebook, Norm, Vqgan
from pretrain.schema.vqgan import VqganConfig

SMALL = VqganConfig(
    image_size=16, channels=16, multipliers=(1, 2, 2), res_blocks=1, attention_at=(),
    latent_channels=8, codebook_size=20, code_width=4,
)  # fmt: skip


def test_published_size_has_the_published_number_of_parameters():
    with torch.device("meta"):
        model = Vqgan(VqganConfig())
    counted = [sum(p.numel() for p in part.parameters()) for part in (model, model.encoder, model.decoder)]
    assert counted == [76_073_859, 29_298_176, 42_449_795]
    assert model.quantize.embedding.weight.numel() == 4_194_304
    assert model.config.grid == 16


def test_codes_are_the_nearest_rows_of_the_codebook():
    book, latents = Codebook(9, 4), torch.randn(2, 4, 3, 3)
    torch.nn.init.normal_(book.embedding.weight)
    codes, table = book(latents).codes, book.embedding.weight.detach().double()
    for image in range(2):
        for place in range(9):
            latent = latents[image, :, place // 3, place % 3].double()
            distances = [float((latent - row).square().sum()) for row in table]
            assert int(codes[image, place]) == distances.index(min(distances))


def test_the_output_is_the_codebook_in_value_and_the_latent_in_gradient():
    book, latents = Codebook(9, 4), torch.randn(2, 4, 3, 3, requires_grad=True)
    quantised = book(latents)
    assert torch.allclose(quantised.output, book.look_up(quantised.codes, 3), atol=1e-6)
    weights = torch.randn(2, 4, 3, 3)
    (quantised.output * weights).sum().backward()
    assert torch.equal(latents.grad, weights) and book.embedding.weight.grad is None


def test_codes_do_not_change_under_autocast_of_the_lookup():
    book, latents = Codebook(50, 8), torch.randn(2, 8, 4, 4)
    torch.nn.init.normal_(book.embedding.weight)
    with torch.autocast("cpu", torch.bfloat16):
        codes = book(latents).codes
    assert torch.equal(codes, book(latents).codes)


def test_decoding_the_codes_is_the_reconstruction():
    model, pixels = Vqgan(SMALL).eval(), torch.rand(2, 3, 16, 16) * 2 - 1
    reconstruction, quantised = model(pixels)
    assert reconstruction.shape == pixels.shape and quantised.codes.shape == (2, 16)
    assert torch.equal(model.encode(pixels), quantised.codes)
    assert torch.allclose(model.decode(quantised.codes), reconstruction, atol=1e-5)


def changed_codes(config: VqganConfig) -> torch.Tensor:
    """Which of 4 x 4 latents differ once a patch of noise stands in the picture's lower right corner, bool [4, 4]."""
    torch.manual_seed(0)
    model, pixels = Vqgan(config).eval(), torch.zeros(1, 3, 16, 16)
    torch.nn.init.normal_(model.quantize.embedding.weight)
    other = pixels.clone()
    other[..., 12:, 12:] = torch.rand(3, 4, 4) * 2 - 1
    latents = [model.quant_conv(model.encoder(one)) for one in (pixels, other)]
    return (latents[0] != latents[1]).any(1)[0]


def test_codes_of_a_local_encoder_do_not_see_the_rest_of_the_picture():
    local = changed_codes(SMALL.model_copy(update={"local_encoder": True}))
    assert local[3, 3] and not local[:2].any() and not local[:, :2].any()
    assert changed_codes(SMALL).all()


def test_a_local_encoder_moves_its_codes_with_the_picture():
    model, pixels = Vqgan(SMALL.model_copy(update={"local_encoder": True})).eval(), torch.rand(1, 3, 16, 16) * 2 - 1
    moved = model.encode(pixels.roll(4, -1)).view(4, 4)
    assert torch.equal(moved[1:3, 2:3], model.encode(pixels).view(4, 4)[1:3, 1:2])


@pytest.mark.parametrize(
    ("channels", "groups", "count"),
    [(32, 32, 32), (64, 32, 32), (512, 32, 32), (48, 16, 16)]
    + [(16, "width/4", 4), (64, "width/4", 16), (128, "width/4", 32), (512, "width/4", 32)],
)
def test_norms_have_the_groups_of_the_configuration(channels, groups, count):
    assert Norm(channels, groups).num_groups == count


@pytest.mark.parametrize(("channels", "groups"), [(16, "width/4"), (32, 32), (128, 32)])
def test_norm_is_group_norm(channels, groups):
    norm, x = Norm(channels, groups), torch.randn(2, channels, 4, 4).to(memory_format=torch.channels_last)
    torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    parts = x.reshape(2, norm.num_groups, -1)
    mean, variance = parts.mean(-1, keepdim=True), parts.var(-1, unbiased=False, keepdim=True)
    wanted = ((parts - mean) / (variance + 1e-6).sqrt()).view(x.shape)
    assert torch.allclose(norm(x), wanted * norm.weight[:, None, None] + norm.bias[:, None, None], atol=1e-5)


@pytest.mark.parametrize("channels", [32, 64, 96, 128, 256])
def test_every_norm_of_a_published_layout_has_32_groups(channels):
    with torch.device("meta"):
        model = Vqgan(VqganConfig(channels=channels, image_size=32))
    norms = [module for module in model.modules() if isinstance(module, torch.nn.GroupNorm)]
    assert {norm.num_groups for norm in norms} == {32} and {norm.eps for norm in norms} == {1e-6}


def test_widths_that_do_not_divide_into_groups_are_refused_by_the_schema():
    assert VqganConfig(channels=16).norm_groups == "width/4"
    for given in (
        {"channels": 16, "norm_groups": 32},
        {"channels": 18},
        {"channels": 2},
        {"channels": 64, "norm_groups": 48},
    ):
        with pytest.raises(ValueError, match="channels are not divisible by"):
            VqganConfig(**given)


def test_the_discriminator_judges_patches():
    judge = PatchDiscriminator(channels=8, layers=2)
    assert judge(torch.randn(2, 3, 32, 32)).shape == (2, 1, 6, 6)
    with torch.device("meta"):
        assert sum(p.numel() for p in PatchDiscriminator().parameters()) == 2_765_633
