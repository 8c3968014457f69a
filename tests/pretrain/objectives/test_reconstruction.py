"""Losses of the VQGAN against loops, whose gradient goes where, and codes that come back to life."""

import math

import pytest
import torch
from torch import Tensor, nn

from pretrain.config import ReconstructionConfig, VqganConfig
from pretrain.models.vqgan import Vqgan
from pretrain.objectives.collectives import ONE_DEVICE, Collectives
from pretrain.objectives.reconstruction import EdgePyramid, Reconstruction, codebook_loss, hinge_loss, psnr

MODEL = VqganConfig(
    image_size=16, channels=16, multipliers=(1, 2), res_blocks=1, attention_at=(), latent_channels=8,
    codebook_size=20, code_width=4, discriminator_channels=8, discriminator_layers=1,
)  # fmt: skip
GAN = ReconstructionConfig(discriminator_start_step=5)


def objective(config: ReconstructionConfig = GAN, collectives: Collectives = ONE_DEVICE) -> Reconstruction:
    torch.manual_seed(0)
    return Reconstruction(Vqgan(MODEL), config, collectives)


def batch(step: int, turn: int = 0) -> dict[str, Tensor]:
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return {"pixels": pixels, "step": torch.tensor(step), "turn": torch.tensor(turn)}


def gradients(module: nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in module.parameters()]


# ------------------------------------------------------------------------------------------- pure losses


@pytest.mark.parametrize(("legacy", "of_codes", "of_latents"), [(False, 1.0, 0.25), (True, 0.25, 1.0)])
def test_the_commitment_weighs_the_latents_and_in_legacy_the_codes(legacy, of_codes, of_latents):
    latents, nearest = (torch.randn(6, 3, requires_grad=True) for _ in range(2))
    loss = codebook_loss(latents, nearest, 0.25, legacy)
    loss.backward()
    wanted = sum((z - e) ** 2 for z, e in zip(latents.flatten().tolist(), nearest.flatten().tolist(), strict=True)) / 18
    assert float(loss) == pytest.approx(1.25 * wanted, rel=1e-5)
    slope = 2 * (latents - nearest).detach() / 18
    assert torch.allclose(latents.grad, of_latents * slope) and torch.allclose(nearest.grad, -of_codes * slope)


def test_hinge_loss_equals_a_loop():
    real, fake = torch.randn(7), torch.randn(7)
    wanted = sum(max(0.0, 1 - float(r)) + max(0.0, 1 + float(f)) for r, f in zip(real, fake, strict=True)) / 14
    assert float(hinge_loss(real, fake)) == pytest.approx(wanted, rel=1e-5)


def test_psnr_is_that_of_pixels_between_0_and_255():
    ours, theirs = torch.rand(3, 3, 4, 4) * 2 - 1, torch.rand(3, 3, 4, 4) * 2 - 1
    errors = [((a - b) * 127.5).square().mean().sqrt() for a, b in zip(ours, theirs, strict=True)]
    wanted = sum(20 * math.log10(255 / error) for error in errors) / 3
    assert float(psnr(ours, theirs)) == pytest.approx(wanted, rel=1e-5)


def test_edge_pyramid_is_zero_for_equal_images_and_grows_with_blur():
    image = torch.zeros(1, 3, 16, 16)
    image[..., 8:] = 1
    blurs = [nn.functional.avg_pool2d(image, k, 1, k // 2, count_include_pad=False) for k in (1, 3, 5, 7)]
    distances = [float(EdgePyramid()(image, blurred)) for blurred in blurs]
    assert distances[0] == 0 and distances == sorted(distances) and len(set(distances)) == 4


# ------------------------------------------------------------------------------------------- the whole loss


def test_the_discriminator_has_its_turn_from_the_start_step_on():
    one = objective()
    assert one.turns(4) == ("main",) and one.turns(5) == ("main", "discriminator")
    one(batch(4))["loss"].backward()
    assert all(grad is None for grad in gradients(one.discriminator))
    roles = {one.role_of(name) for name, _ in one.discriminator.named_parameters(prefix="discriminator")}
    assert roles == {"discriminator"} and one.role_of("model.decoder.conv_out.weight") == "main"


def test_the_turn_of_the_discriminator_is_the_hinge_and_moves_nothing_of_the_model():
    one = objective()
    one(batch(5, 1))["loss"].backward()
    assert all(grad is None for grad in gradients(one.model)) and not one.last_used.any()
    found = gradients(one.discriminator)
    one.discriminator.zero_grad()
    pixels = batch(5)["pixels"]
    hinge_loss(one.discriminator(pixels), one.discriminator(one.model(pixels)[0].detach())).backward()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, gradients(one.discriminator), strict=True))


def test_the_model_receives_nll_codebook_and_lambda_times_the_generator_gradient():
    one = objective()
    named = one(batch(5))
    named["loss"].backward()
    found = gradients(one.model)
    one.model.zero_grad()
    pixels = batch(5)["pixels"]
    output, quantised = one.model(pixels)
    nll = (pixels - output).abs().mean() + EdgePyramid()(pixels, output)
    generator, last = -one.discriminator(output).mean(), one.model.decoder.conv_out.weight
    of_nll, of_generator = (torch.autograd.grad(x, last, retain_graph=True)[0].norm() for x in (nll, generator))
    weight = 0.8 * of_nll / (of_generator + 1e-4)
    (nll + weight.detach() * generator + codebook_loss(quantised.latents, quantised.nearest, 0.25)).backward()
    assert float(named["adversarial_weight"]) == pytest.approx(float(weight), rel=1e-4)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, gradients(one.model), strict=True))


def test_without_adversarial_weight_there_is_no_discriminator():
    one = objective(ReconstructionConfig(discriminator_weight=0))
    assert one.discriminator is None and "adversarial_weight" not in one(batch(10**9))
    assert one.turns(10**9) == ("main",)


def test_evaluation_needs_no_gradient_and_changes_no_state():
    one = objective().eval()
    with torch.no_grad():
        named = one(batch(6))
    assert torch.isfinite(named["loss"]) and not one.last_used.any() and not len(one._pool)


def test_another_perceptual_network_takes_the_place_of_the_default():
    class Constant(nn.Module):
        def forward(self, pixels: Tensor, reconstruction: Tensor) -> Tensor:
            return pixels.new_tensor(100.0)

    torch.manual_seed(0)
    one = Reconstruction(Vqgan(MODEL), GAN, ONE_DEVICE, perceptual=Constant())
    assert float(one(batch(0))["loss"]) > 100


# ------------------------------------------------------------------------------------------- revival

REVIVE = ReconstructionConfig(discriminator_weight=0, revive_after_steps=3)


def test_codes_unused_for_long_become_latents_of_the_batch():
    one = objective(REVIVE)
    one(batch(3))
    used, before = one.last_used == 3, one.model.quantize.embedding.weight.detach().clone()
    one.after_step(3)
    table = one.model.quantize.embedding.weight.detach()
    assert used.any() and not used.all() and torch.equal(table[used], before[used])
    pool = {tuple(row.tolist()) for row in one._pool}
    assert all(tuple(row.tolist()) in pool for row in table[~used])
    assert (one.last_used == 3).all()


def test_revival_prefers_what_the_codebook_misses():
    one = objective(REVIVE)
    one.last_used[:10], table = 3, one.model.quantize.embedding.weight
    with torch.no_grad():
        table[:10] = 0.0
    one._pool = torch.zeros(1024, 4)
    one._pool[7] = 5.0
    one.after_step(3)
    assert (table[10:] == 5.0).all()


def test_codes_are_left_alone_until_their_time():
    one = objective(REVIVE)
    one(batch(2))
    before = one.model.quantize.embedding.weight.detach().clone()
    one.after_step(2)
    assert torch.equal(one.model.quantize.embedding.weight, before)


def test_revival_keeps_the_parameter_and_the_optimizer_state_in_place():
    one = objective(REVIVE)
    table = one.model.quantize.embedding.weight
    one(batch(3))
    one.after_step(3)
    assert one.model.quantize.embedding.weight is table and table.requires_grad


def test_two_ranks_count_and_revive_as_one_device_with_both_batches():
    whole = {"pixels": torch.cat([batch(3)["pixels"], -batch(3)["pixels"]]), "step": torch.tensor(3)}
    alone = objective(REVIVE)
    metrics = alone(whole)
    alone.after_step(3)
    halves = [objective(REVIVE) for _ in range(2)]
    with torch.no_grad():
        codes = [half.model.encode(part) for half, part in zip(halves, whole["pixels"].split(2), strict=True)]
    counts = sum(torch.bincount(c.flatten(), minlength=20).float() for c in codes)
    for half, part in zip(halves, whole["pixels"].split(2), strict=True):
        half.collectives = Collectives(lambda x: torch.cat([h._pool for h in halves]), lambda x: counts, world=2)
        found = half({"pixels": part, "step": torch.tensor(3)})
        assert found["codes_used"] == metrics["codes_used"] and found["perplexity"] == metrics["perplexity"]
    for half in halves:
        half.after_step(3)
    tables = [one.model.quantize.embedding.weight for one in (*halves, alone)]
    assert torch.equal(tables[0], tables[1]) and torch.allclose(tables[0], tables[2], atol=1e-5)


@pytest.mark.slow
def test_a_codebook_that_collapses_by_itself_is_used_when_revived():
    def codes_used(revive: int) -> float:
        torch.manual_seed(0)
        config = ReconstructionConfig(discriminator_weight=0, revive_after_steps=revive)
        one = Reconstruction(Vqgan(MODEL.model_copy(update={"codebook_size": 256})), config, ONE_DEVICE)
        optimizer = torch.optim.AdamW(one.parameters(), lr=2e-3)
        for step in range(60):
            optimizer.zero_grad()
            generator = torch.Generator().manual_seed(step)
            colours = torch.rand(8, 3, 4, 4, generator=generator) * 2 - 1
            named = one({"pixels": colours.repeat_interleave(4, 2).repeat_interleave(4, 3), "step": torch.tensor(step)})
            named["loss"].backward()
            optimizer.step()
            one.after_step(step)
        return float(named["codes_used"])

    assert codes_used(10) > 1.5 * codes_used(0)
