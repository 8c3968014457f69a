"""Losses of the VQGAN against loops, whose gradient goes where, and codes that come back to life."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from pretrain.models.vqgan import Vqgan
from pretrain.schema.tasks import ReconstructionConfig
from pretrain.schema.vqgan import VqganConfig
from pretrain.tasks.collectives import ONE_DEVICE, Collectives
from pretrain.tasks.reconstruction import EdgePyramid, Reconstruction, codebook_loss, hinge_loss, psnr, replacements
from pretrain.tasks.task import PREVIEWED

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


def edges(error: Tensor) -> float:
    """Mean size of the differences between neighbours, down and across, by loops in float64."""
    total = 0.0
    for image in error.double().reshape(-1, *error.shape[-2:]).tolist():
        down = [abs(b - a) for above, below in itertools.pairwise(image) for a, b in zip(above, below, strict=True)]
        across = [abs(b - a) for row in image for a, b in itertools.pairwise(row)]
        total += sum(down) / len(down) + sum(across) / len(across)
    return total / (error.shape[0] * error.shape[1])


def pyramid(ours: Tensor, theirs: Tensor) -> float:
    """The square, and a 24th of the edges of the error at three sides, each half as long as the one before."""
    error = ours.double() - theirs.double()
    total = sum(value**2 for value in error.flatten().tolist()) / error.numel()
    for _ in range(3):
        total += edges(error) / 24
        error = (error[..., ::2, ::2] + error[..., 1::2, ::2] + error[..., ::2, 1::2] + error[..., 1::2, 1::2]) / 4
    return total


def test_edge_pyramid_equals_a_loop() -> None:
    ours, theirs = (torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(n)) * 2 - 1 for n in (1, 2))
    ours = ours + torch.linspace(0, 3, 16)  # the edges across are not those down
    assert float(EdgePyramid()(ours, theirs)) == pytest.approx(pyramid(ours, theirs), rel=1e-5)


def test_psnr_is_of_the_clamped_reconstruction_and_at_most_100() -> None:
    pixels = torch.stack([torch.ones(3, 4, 4), -torch.ones(3, 4, 4), torch.zeros(3, 4, 4)])
    beyond = torch.stack([torch.full((3, 4, 4), 7.0), torch.full((3, 4, 4), -7.0), torch.full((3, 4, 4), 0.2)])
    assert float(psnr(pixels[:2], beyond[:2])) == pytest.approx(100.0)
    assert float(psnr(pixels[2:], beyond[2:])) == pytest.approx(20.0)  # 0.2 of 2
    assert float(psnr(pixels, beyond)) == pytest.approx(220 / 3)


def test_the_commitment_weighs_the_latents_where_nothing_else_is_said() -> None:
    latents, nearest = torch.ones(2, 3, requires_grad=True), torch.zeros(2, 3)
    codebook_loss(latents, nearest, 0.25).backward()
    assert latents.grad is not None and torch.allclose(latents.grad, torch.full((2, 3), 0.25 * 2 / 6))


def test_hinges_are_flat_beyond_one() -> None:
    real, fake = torch.tensor([2.0, 1.0, 0.5, -1.0]), torch.tensor([-2.0, -1.0, -0.5, 1.0])
    assert float(hinge_loss(real, fake)) == pytest.approx(0.5 * (0 + 0 + 0.5 + 2) / 4 * 2)
    assert float(hinge_loss(real, fake[:1])) == pytest.approx(0.5 * 2.5 / 4)


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


WEIGHTS = ReconstructionConfig(
    codebook_weight=3.0, commitment=0.5, perceptual_weight=0.25, discriminator_weight=0.6, discriminator_start_step=5
)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("step", [4, 5])
def test_the_loss_and_metrics_of_the_model_are_put_together_by_hand(step: int, legacy: bool) -> None:
    one = objective(WEIGHTS.model_copy(update={"legacy_commitment": legacy}))
    found = one(batch(step))
    assert [name for name, value in found.items() if value.requires_grad] == ["loss"]
    pixels = batch(step)["pixels"]
    output, quantised = one.model(pixels)
    error = (pixels - output).detach().abs().flatten().tolist()
    squares = (quantised.latents - quantised.nearest).detach().square().flatten().tolist()
    counts = [quantised.codes.flatten().tolist().count(code) for code in range(20)]
    shares = [count / sum(counts) for count in counts if count]
    wanted = {
        "absolute_error": sum(error) / len(error), "codebook_loss": 1.5 * sum(squares) / len(squares),
        "psnr": float(psnr(pixels, output)), "codes_used": len(shares),
        "perplexity": math.exp(-sum(share * math.log(share) for share in shares)),
    }  # fmt: skip
    wanted["loss"] = wanted["absolute_error"] + 0.25 * pyramid(pixels, output.detach()) + 3.0 * wanted["codebook_loss"]
    if step == 5:
        wanted["adversarial_weight"] = float(found["adversarial_weight"])
        wanted["loss"] -= wanted["adversarial_weight"] * float(one.discriminator(output).mean())
    assert {name: float(value) for name, value in found.items()} == pytest.approx(wanted, rel=1e-4)
    latents = torch.autograd.grad(found["loss"], one.model.quantize.embedding.weight)[0]
    pull = torch.zeros(20, 4)
    slope = 2 * (quantised.nearest - quantised.latents).detach() / len(squares) * 3.0 * (0.5 if legacy else 1.0)
    assert torch.allclose(latents, pull.index_add(0, quantised.codes.flatten(), slope), atol=1e-6)


def test_in_evaluation_the_generator_is_added_as_it_is() -> None:
    one = objective(WEIGHTS).eval()
    with torch.no_grad():
        found = one(batch(5))
        output, _ = one.model(batch(5)["pixels"])
        generator = -one.discriminator(output).mean()
    wanted = found["absolute_error"] + 0.25 * pyramid(batch(5)["pixels"], output) + 3.0 * found["codebook_loss"]
    assert float(found["loss"]) == pytest.approx(float(wanted + generator), rel=1e-4)
    assert "adversarial_weight" not in found


def test_the_metrics_of_the_discriminator_are_the_means_of_its_logits() -> None:
    one = objective()
    found = one(batch(5, 1))
    assert [name for name, value in found.items() if value.requires_grad] == ["loss"]
    pixels = batch(5)["pixels"]
    real, fake = (one.discriminator(images).detach() for images in (pixels, one.model(pixels)[0]))
    assert real.shape == fake.shape and real.ndim == 4
    wanted = {"logits_real": float(real.mean()), "logits_fake": float(fake.mean())}
    wanted["loss"] = float(hinge_loss(real, fake))
    assert {name: float(value) for name, value in found.items()} == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    ("of_nll", "of_generator", "weight"),
    [
        (3.0, 2.0, 0.8 * 3 / 2.0001),
        (0.5, 0.0, 0.8 * 5000),
        (0.0, 1.0, 0.0),
        (2.0, 0.0, 0.8 * 1e4),
        (1e-3, 1e-4, 0.8 * 5),
    ],
)
@pytest.mark.parametrize("world", [1, 2])
def test_lambda_is_the_ratio_of_the_norms_of_the_mean_gradients(
    world: int, of_nll: float, of_generator: float, weight: float
) -> None:
    """The gradient of the second rank is at right angles; the norm is of the mean, and no mean of norms."""
    other = torch.zeros(2, 3, 4, 3, 3)
    other[:, 1, 1, 1, 1] = torch.tensor([of_nll, of_generator]) * (world - 1)
    one = objective(collectives=Collectives(lambda x: x, lambda x: x + other, world))
    mine = torch.zeros(2, 3, 4, 3, 3)
    mine[:, 0, 0, 0, 0] = torch.tensor([of_nll, of_generator])
    shrunk = 2**-0.5 if world == 2 else 1.0
    wanted = 0.8 * min(of_nll * shrunk / (of_generator * shrunk + 1e-4), 1e4)
    assert world == 2 or wanted == pytest.approx(weight)
    assert float(one._adaptive_weight(mine)) == pytest.approx(wanted, rel=1e-5)


def test_what_slopes_returns_is_lambda_of_all_micro_batches_and_forward_takes_it() -> None:
    one = objective()
    both = [batch(5), batch(5) | {"pixels": -batch(5)["pixels"].flip(3)}]
    with torch.no_grad():
        rows = [one(part | {"embed": torch.tensor(1)}) for part in both]
    last, gradients_of = one.model.decoder.conv_out.weight, []
    for part in both:
        output, _ = one.model(part["pixels"])
        nll = (part["pixels"] - output).abs().mean() + EdgePyramid()(part["pixels"], output)
        terms = (nll, -one.discriminator(output).mean())
        gradients_of.append([torch.autograd.grad(term, last, retain_graph=True)[0] for term in terms])
    of_nll, of_generator = ((gradients_of[0][i] + gradients_of[1][i]) / 2 for i in (0, 1))
    wanted = 0.8 * float(of_nll.norm()) / (float(of_generator.norm()) + 1e-4)
    slopes = one.slopes(rows)
    assert [float(slope["adversarial_weight"]) for slope in slopes] == pytest.approx([wanted] * 2, rel=1e-4)
    assert not any(value.requires_grad for row in [*rows, *slopes] for value in row.values())
    weight = torch.tensor(7.0)
    found, zero = one(both[1] | {"adversarial_weight": weight}), one(both[1] | {"adversarial_weight": 0 * weight})
    assert float(found["adversarial_weight"]) == 7.0 and float(zero["adversarial_weight"]) == 0.0
    generator = -float(one.discriminator(one.model(both[1]["pixels"])[0]).mean())
    assert float(found["loss"] - zero["loss"]) == pytest.approx(7 * generator, rel=1e-3)


def test_no_slopes_are_needed_before_the_start_and_in_the_turn_of_the_discriminator() -> None:
    one, asked = objective(), {"embed": torch.tensor(1)}
    assert one(batch(4) | asked) == {} == one(batch(5, 1) | asked)
    assert one(batch(5) | asked).keys() == {"at_last_layer"}
    assert one.slopes([{}, {}, {}]) == [{}, {}, {}] and one.slopes([{}]) == [{}]


def test_a_batch_that_names_no_turn_is_of_the_model_and_the_declared_keys_are_enough() -> None:
    one = objective()
    found = one({key: batch(5)[key] for key in one.keys})
    assert "psnr" in found and float(found["loss"]) == float(one(batch(5))["loss"])
    for key in one.keys:
        with pytest.raises(KeyError, match=key):
            one({name: tensor for name, tensor in batch(5).items() if name != key})


def test_a_preview_is_the_originals_and_behind_them_their_reconstructions() -> None:
    one = objective()
    pixels, asked = batch(0)["pixels"], []
    found = one.preview(lambda samples: asked.append(samples) or batch(0))
    assert asked == [PREVIEWED]
    assert found.shape == (4, 3, 16, 16) and not found.requires_grad and found.dtype == torch.float32
    assert torch.equal(found[:2], pixels) and torch.allclose(found[2:], one.model(pixels)[0], atol=1e-6)


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


def test_the_pool_holds_the_latents_of_the_last_step_alone() -> None:
    """Four micro-batches of 320 latents each, after one of the step before."""
    one = objective(REVIVE)
    draw = torch.Generator().manual_seed(4)
    parts = [torch.rand(5, 3, 16, 16, generator=draw) * 2 - 1 for _ in range(5)]
    for step, pixels in zip((1, 2, 2, 2, 2), parts, strict=True):
        one({"pixels": pixels, "step": torch.tensor(step)})
    latents = torch.cat([one.model(pixels)[1].latents for pixels in parts[1:]])
    assert len(latents) == 1280 and one._pool.shape == (1280, 4) and not one._pool.requires_grad
    assert torch.allclose(one._pool, latents, atol=1e-6)


def test_the_draw_is_by_squared_distance_from_the_nearest_code_and_seeded_by_the_step() -> None:
    """By loops: codes 1 to 12 are long unused, code 0 and the others are not."""
    tables = []
    for step in (7, 8):
        one = objective(REVIVE)
        one.last_used[:], one.last_used[1:13] = step - 2, torch.arange(12) % 2 + step - 4
        table = one.model.quantize.embedding.weight.detach().clone()
        one._pool = torch.randn(50, 4, generator=torch.Generator().manual_seed(6))
        one.after_step(step)
        distances = torch.tensor([
            min(sum((a - b) ** 2 for a, b in zip(row, code, strict=True)) for code in table.tolist())
            for row in one._pool.tolist()
        ])  # fmt: skip
        drawn = torch.multinomial(distances, 12, replacement=True, generator=torch.Generator().manual_seed(step))
        table[1:13] = one._pool[drawn]
        assert torch.equal(one.model.quantize.embedding.weight, table)
        assert one.last_used.tolist() == [step - 2] + [step] * 12 + [step - 2] * 7
        tables.append(table)
    assert not torch.equal(*tables)


def test_a_pool_that_the_codebook_holds_already_is_drawn_from_evenly() -> None:
    """All distances are 0, which are chances of nothing."""
    one = objective(REVIVE)
    table = one.model.quantize.embedding.weight
    with torch.no_grad():
        table.copy_(torch.arange(80.0).view(20, 4))
    one._pool, one.last_used[:10] = table[:10].detach().clone(), 3
    one.after_step(3)
    assert {int(row[0]) // 4 for row in table[10:].tolist()} <= set(range(10))
    assert len({int(row[0]) for row in table[10:].tolist()}) > 3


def test_nothing_is_revived_where_that_is_not_asked_or_nothing_is_dead() -> None:
    for config, last_used in ((GAN, 0), (REVIVE, 98)):
        one = objective(config)
        one.last_used[:] = last_used
        before = one.model.quantize.embedding.weight.detach().clone()
        one.after_step(100)  # without a batch before it: the pool is empty
        assert torch.equal(one.model.quantize.embedding.weight, before) and (one.last_used == last_used).all()


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


@pytest.mark.parametrize(
    ("per_image", "kept"), [(1, 1), (63, 63), (64, 64), (65, 33), (128, 64), (256, 64), (1024, 64)]
)
def test_the_same_number_of_latents_of_each_image_is_kept_evenly_spaced(per_image: int, kept: int) -> None:
    latents = torch.arange(3 * per_image)[:, None].float()
    found = replacements(latents, 3)
    expected = [i * per_image + n for i in range(3) for n in range(per_image) if n % -(-per_image // 64) == 0]
    assert found[:, 0].tolist() == expected and len(found) == 3 * kept <= 3 * 64


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_revival_is_the_same_at_every_world_size_however_many_latents(world: int, accumulation: int) -> None:
    """256 latents an image, 8 images: 2048 in the batch, more than one rank once kept."""
    config = VqganConfig.model_validate({**MODEL.model_dump(), "image_size": 32})
    pixels = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def ranks_after_a_step(world: int, accumulation: int) -> list[Reconstruction]:
        ranks = []
        for part in pixels.chunk(world):
            torch.manual_seed(0)
            ranks.append(Reconstruction(Vqgan(config), REVIVE, ONE_DEVICE))
            with torch.no_grad():
                ranks[-1].model.quantize.embedding.weight[5:] = 9.0  # far from every latent
            for rows in part.chunk(accumulation):
                ranks[-1]({"pixels": rows, "step": torch.tensor(3)})
        for rank in ranks:
            rank.last_used[:] = torch.stack([one.last_used for one in ranks]).amax(0)
            rank.collectives = Collectives(lambda _: torch.cat([one._pool for one in ranks]), lambda x: x, world)
        for rank in ranks:
            rank.after_step(3)
        return ranks

    [alone] = ranks_after_a_step(1, 1)
    assert len(alone._pool) == 8 * 64 and alone._pool.shape[0] < 8 * 256
    for rank in ranks_after_a_step(world, accumulation):
        torch.testing.assert_close(rank.model.quantize.embedding.weight, alone.model.quantize.embedding.weight)


@pytest.mark.slow
def test_a_codebook_that_collapses_by_itself_is_used_when_revived():
    def codes_used(revive: int) -> float:
        torch.manual_seed(0)
        config = ReconstructionConfig(discriminator_weight=0, revive_after_steps=revive)
        one = Reconstruction(Vqgan(MODEL.model_copy(update={"codebook_size": 256})), config, ONE_DEVICE)
        optimizer = torch.optim.AdamW(one.parameters(), lr=2e-3)
        for step in range(25):
            optimizer.zero_grad()
            generator = torch.Generator().manual_seed(step)
            colours = torch.rand(8, 3, 4, 4, generator=generator) * 2 - 1
            named = one({"pixels": colours.repeat_interleave(2, 2).repeat_interleave(2, 3), "step": torch.tensor(step)})
            named["loss"].backward()
            optimizer.step()
            one.after_step(step)
        return float(named["codes_used"])

    assert codes_used(5) > 1.5 * codes_used(0)
