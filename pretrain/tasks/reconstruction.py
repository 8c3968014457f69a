"""Training of the VQGAN. Esser et al. 2021, arXiv:2012.09841; the losses of taming-transformers.

    main = nll + codebook_weight * codebook + [step >= discriminator_start_step] lambda * generator
    nll = mean(|x - y|) + perceptual_weight * perceptual(x, y),   y the reconstruction, generator = -mean D(y)
    lambda = discriminator_weight * clamp(|d nll / d last layer| / (|d generator / d last layer| + 1e-4), 0, 1e4)
    discriminator = hinge(D(x), D(y')),   y' the reconstruction by the model after main's update in this step

Two optimizers take turns, the model's first. Deviations: before discriminator_start_step the discriminator has no turn,
where the original takes steps with zero gradient. Its weights stay the same either way, but here its AdamW counts steps
from its first gradient on, so that the bias correction is right (the original's first steps are 1.6 times the learning
rate). The norms in lambda are those of the global batch: with accumulation, one more forward of every micro-batch
computes them before the first backward (`slopes`). The perceptual distance is LPIPS in the paper; ours is injectable,
and the default needs no weights (`EdgePyramid`).
Letters: B batch of this rank, S image side, E code width, N codebook size, M latents of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data_pipeline.schema import Sample
from pretrain.inputs.pixels import drawn_pixels, to_tensor
from pretrain.models.discriminator import PatchDiscriminator
from pretrain.models.vqgan import Vqgan
from pretrain.schema.common import MAIN
from pretrain.schema.tasks import ReconstructionConfig
from pretrain.tasks.collectives import Collectives
from pretrain.tasks.task import PREVIEWED, Batch, Task

EDGE_WEIGHT = 1 / 24
REPLACEMENTS = 64
"""Latents kept of each image as replacements of dead codes: a number per image, so no world size shows in the pool."""
NEAREST_AT_ONCE = 4096

if TYPE_CHECKING:
    from data_pipeline.stream.mixture import Source
    from data_pipeline.text.tokenizer import TextTokenizer
    from pretrain.config import RunConfig


class ReconstructionInputs:
    """Samples -> {"pixels": float32 [b, 3, S, S] in [-1, 1]}, for the VQGAN."""

    def __init__(self, config: RunConfig, stream: Source, tokenizer: TextTokenizer | None) -> None:
        assert config.model.reads.pixels
        self.image_size = config.model.reads.pixels.side
        self.data = config.data
        self.seed = config.seed

    def __call__(self, samples: list[Sample]) -> Batch:
        """Return the batch, in the samples' order."""
        return {"pixels": to_tensor(drawn_pixels(samples, self.image_size, self.data, self.seed))}


class EdgePyramid(nn.Module):
    """Squared error, plus L1 of the error's differences between neighbouring pixels at sides S, S/2, S/4.

    Needs no weights. The edge terms penalise blur. The squared error separates colours; with L1 alone the model first
    learns their median and outputs grey for hundreds of steps.
    """

    def forward(self, pixels: Tensor, reconstruction: Tensor) -> Tensor:
        """float32 [B, 3, S, S] twice -> []."""
        error = pixels - reconstruction
        total = error.square().mean()
        for level in range(3):
            if level:
                error = F.avg_pool2d(error, 2)
            total = total + EDGE_WEIGHT * (error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean())
        return total


class Reconstruction(Task):
    """Owns the model and the discriminator; `after_step` replaces unused codes."""

    inputs = ReconstructionInputs
    keys: ClassVar[tuple[str, ...]] = ("pixels", "step")
    compares_batch = True
    model: Vqgan
    config: ReconstructionConfig
    last_used: Tensor  # int64 [N], step at which each code was last used

    def __init__(
        self,
        model: Vqgan,
        config: ReconstructionConfig,
        collectives: Collectives,
        perceptual: nn.Module | None = None,
    ) -> None:
        super().__init__(model, config, collectives)
        self.perceptual = perceptual or EdgePyramid()
        self.discriminator: PatchDiscriminator | None = None
        if config.discriminator_weight:
            self.discriminator = PatchDiscriminator(
                model.config.discriminator_channels, model.config.discriminator_layers
            )
        self.register_buffer("last_used", torch.zeros(model.config.codebook_size, dtype=torch.int64))
        self._pool = torch.empty(0)  # float32 [B * REPLACEMENTS or fewer, E], latents of the last step's micro-batches
        self._pool_step = -1

    def role_of(self, name: str) -> str:
        """Return "discriminator" for the discriminator's parameters, MAIN for all others."""
        return "discriminator" if name.startswith("discriminator.") else MAIN

    def turns(self, step: int) -> tuple[str, ...]:
        """Return the model's role and, from discriminator_start_step on, the discriminator's."""
        return self.roles if self._plays(step) else self.roles[:1]

    def must_train(self) -> dict[str, int]:
        """Return the decoder's last layer, whose gradients balance the adversarial loss from its first step on."""
        if self.discriminator is None:
            return {}
        return {"model.decoder.conv_out.weight": self.config.discriminator_start_step}

    def _plays(self, step: int) -> bool:
        return self.discriminator is not None and step >= self.config.discriminator_start_step

    def forward(self, batch: Batch) -> Batch:
        """pixels float32 [B, 3, S, S] in [-1, 1], step int64 [], turn int64 [] -> loss and metrics of that turn.

        With "embed" in the batch, returns what `slopes` needs of this micro-batch. With "adversarial_weight" (from
        `slopes`) in the batch, uses it as lambda.
        """
        discriminates, step = bool(batch.get("turn", 0)), int(batch["step"])
        if "embed" in batch:
            return {} if discriminates or not self._plays(step) else self._gradients_at_last_layer(batch["pixels"])
        if discriminates:
            return self._discriminate(batch["pixels"])
        return self._reconstruct(batch["pixels"], step, batch.get("adversarial_weight"))

    def slopes(self, rows: list[Batch]) -> list[Batch]:
        """Gradients at the last layer -> lambda of the global batch per micro-batch; empty without adversarial loss."""
        if not rows[0]:
            return rows
        weight = self._adaptive_weight(torch.stack([row["at_last_layer"] for row in rows]).mean(0))
        return [{"adversarial_weight": weight}] * len(rows)

    def _gradients_at_last_layer(self, pixels: Tensor) -> Batch:
        with torch.enable_grad():
            drawn = self.model(pixels)[0].float()
            return {"at_last_layer": self._at_last_layer(self._nll(pixels, drawn), self._judged(drawn))}

    def _nll(self, pixels: Tensor, reconstruction: Tensor) -> Tensor:
        absolute = (pixels - reconstruction).abs().mean()
        return absolute + self.config.perceptual_weight * self.perceptual(pixels, reconstruction)

    def _judged(self, reconstruction: Tensor) -> Tensor:
        """Return the generator loss [], -mean D."""
        assert self.discriminator is not None
        return -self.discriminator(reconstruction).float().mean()

    def _reconstruct(self, pixels: Tensor, step: int, weight: Tensor | None) -> Batch:
        """Compute the model's turn. weight: lambda; computed here when None."""
        output, quantised = self.model(pixels)
        reconstruction = output.float()
        absolute = (pixels - reconstruction).abs().mean()
        nll = self._nll(pixels, reconstruction)
        codebook = codebook_loss(
            quantised.latents, quantised.nearest, self.config.commitment, self.config.legacy_commitment
        )
        loss = nll + self.config.codebook_weight * codebook
        metrics = {"absolute_error": absolute, "codebook_loss": codebook, "psnr": psnr(pixels, reconstruction)}
        if self._plays(step):
            adversarial, more = self._adversarial(reconstruction, nll, weight)
            loss = loss + adversarial
            metrics |= more
        if self.training:
            earlier = self._pool if step == self._pool_step else quantised.latents[:0].detach()
            self._pool = torch.cat([earlier, replacements(quantised.latents.detach(), len(pixels))])
            self._pool_step = step
        metrics |= self._usage(quantised.codes, step)
        return {"loss": loss} | {name: value.detach() for name, value in metrics.items()}

    def totals(self, batch: Batch) -> Batch:
        """Return the sums over the images of a batch, and how often each code is used, float64 [N].

        The adversarial part of the loss is left out: its weight depends on gradients.
        """
        pixels = batch["pixels"]
        output, quantised = self.model(pixels)
        drawn, config = output.float(), self.config
        codebook = codebook_loss(quantised.latents, quantised.nearest, config.commitment, config.legacy_commitment)
        found = {
            "loss": self._nll(pixels, drawn) + config.codebook_weight * codebook,
            "absolute_error": (pixels - drawn).abs().mean(),
            "codebook_loss": codebook,
            "psnr": psnr(pixels, drawn),
            "samples": torch.ones((), device=drawn.device),
        }
        sums = {name: value.double() * len(pixels) for name, value in found.items()}
        return sums | {"codes": self._counts(quantised.codes).double()}

    def means(self, totals: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the means over all images, and the usage of the codes in them."""
        plain = {name: total for name, total in totals.items() if name != "codes"}
        usage = {name: float(value) for name, value in code_usage(totals["codes"]).items()}
        return super().means(plain) | usage

    def _adversarial(self, reconstruction: Tensor, nll: Tensor, weight: Tensor | None) -> tuple[Tensor, Batch]:
        """Return (lambda * generator, metrics)."""
        generator = self._judged(reconstruction)
        if not torch.is_grad_enabled():
            return generator, {}
        if weight is None:
            weight = self._adaptive_weight(self._at_last_layer(nll, generator))
        return weight * generator, {"adversarial_weight": weight}

    def _discriminate(self, pixels: Tensor) -> Batch:
        """Compute the discriminator's turn; the model runs without gradient."""
        assert self.discriminator is not None
        with torch.no_grad():
            drawn, _ = self.model(pixels)
        real, fake = self.discriminator(pixels).float(), self.discriminator(drawn.float()).float()
        logits = {"logits_real": real.detach().mean(), "logits_fake": fake.detach().mean()}
        return {"loss": hinge_loss(real, fake)} | logits

    def _at_last_layer(self, nll: Tensor, generator: Tensor) -> Tensor:
        """Return the gradients of both losses [] at the decoder's last layer, float32 [2, 3, C, 3, 3]."""
        last = self.model.decoder.conv_out.weight
        (of_nll,) = torch.autograd.grad(nll, last, retain_graph=True)
        (of_generator,) = torch.autograd.grad(generator, last, retain_graph=True)
        return torch.stack([of_nll, of_generator]).detach()

    def _adaptive_weight(self, at_last_layer: Tensor) -> Tensor:
        """Return lambda []. The gradients at the last layer are averaged over ranks before the norm is taken."""
        both = self.collectives.sum(at_last_layer) / self.collectives.world
        ratio = both[0].norm() / (both[1].norm() + 1e-4)
        return self.config.discriminator_weight * ratio.clamp(0, 1e4)

    def _usage(self, codes: Tensor, step: int) -> Batch:
        """Count the codes used in the global batch -> metrics; in training, update `last_used`."""
        counts = self.collectives.sum(self._counts(codes).float())
        if self.training:
            self.last_used.masked_fill_(counts > 0, step)
        return code_usage(counts)

    def _counts(self, codes: Tensor) -> Tensor:
        """Return how often each code is used, int64 [N]."""
        used = codes.flatten()  # not bincount: its output shape depends on the data
        return torch.zeros_like(self.last_used).index_add_(0, used, torch.ones_like(used))

    @torch.no_grad()
    def preview(self, first: Callable[[int], Batch]) -> Tensor:
        """Return float32 [2 PREVIEWED, 3, S, S]: the first samples, then their reconstructions."""
        pixels = first(PREVIEWED)["pixels"]
        drawn, _ = self.model(pixels.to(self.last_used.device))
        return torch.cat([pixels, drawn.float().cpu()])

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Replace codes unused for `revive_after_steps` steps by latents of the last global batch.

        A latent's probability is proportional to its squared distance from the codebook (k-means++, Arthur &
        Vassilvitskii 2007). With uniform probability most replacements would be plain background, and dozens of codes
        would mean the same. The draw is seeded by `step` and every rank sees the same pool, so all ranks write the same
        rows. Edits the codebook in place, so every rank must hold all of it (ZeRO stage 0). A frozen one stays.
        """
        if not self.config.revive_after_steps or not self.model.quantize.embedding.weight.requires_grad:
            return
        dead = (step - self.last_used >= self.config.revive_after_steps).nonzero()[:, 0]
        if not len(dead):
            return
        pool = self.collectives.gather(self._pool)
        generator = torch.Generator().manual_seed(step)
        table = self.model.quantize.embedding.weight
        nearest = torch.cat([self.model.quantize.nearest(some) for some in pool.split(NEAREST_AT_ONCE)])
        distances = (pool - table[nearest].float()).square().sum(1).cpu()
        chosen = torch.multinomial(distances + 1e-12, len(dead), replacement=True, generator=generator)
        table[dead] = pool[chosen.to(pool.device)].to(table.dtype)
        self.last_used[dead] = step


def replacements(latents: Tensor, images: int) -> Tensor:
    """Return at most REPLACEMENTS evenly spaced latents of each image: [M, E] -> [images * n, E], in the same order."""
    per_image = len(latents) // images
    step = -(-per_image // REPLACEMENTS)
    return latents.unflatten(0, (images, per_image))[:, ::step].flatten(0, 1)


# -------------------------------------------------------------------------------------------- losses


def codebook_loss(latents: Tensor, nearest: Tensor, commitment: float, legacy: bool = False) -> Tensor:
    """latents z, nearest e: float32 [M, E] -> mean (sg[z] - e)^2 + commitment * mean (z - sg[e])^2.

    `legacy` applies the commitment weight to the other term: a mistake of taming-transformers, with which its published
    weights were trained.
    """
    to_codes = (latents.detach() - nearest).square().mean()
    to_latents = (latents - nearest.detach()).square().mean()
    return commitment * to_codes + to_latents if legacy else to_codes + commitment * to_latents


def code_usage(counts: Tensor) -> Batch:
    """counts float [N], how often each code is used -> the number of codes used [] and their perplexity []."""
    share = counts / counts.sum()
    perplexity = torch.exp(-(share * share.clamp(min=1e-10).log()).sum())
    return {"codes_used": (counts > 0).float().sum(), "perplexity": perplexity}


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Logits of the discriminator, any shape -> half the sum of both mean hinge losses []."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def psnr(pixels: Tensor, reconstruction: Tensor) -> Tensor:
    """float32 [B, 3, S, S] in [-1, 1] -> PSNR [] of the clamped reconstruction in dB, averaged over images."""
    error = (pixels - reconstruction.clamp(-1, 1)).square().mean((1, 2, 3)) / 4
    return (-10 * torch.log10(error.clamp(min=1e-10))).mean()
