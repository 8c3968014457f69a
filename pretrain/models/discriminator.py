"""PatchGAN discriminator: classifies each patch as real or reconstructed. Isola et al. 2017, arXiv:1611.07004.

Deviation: GroupNorm instead of BatchNorm, whose statistics over a rank's batch would make the result depend on the
number of ranks.
"""

from torch import Tensor, nn

from pretrain.schema.vqgan import discriminator_widths, group_count


class PatchDiscriminator(nn.Module):
    """`layers` strided 4x4 convolutions, one unstrided, one that outputs a logit per patch; leaky ReLU 0.2."""

    def __init__(self, channels: int = 64, layers: int = 3) -> None:
        super().__init__()
        parts: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = channels
        for index, wider in enumerate(discriminator_widths(channels, layers), 1):
            stride = 2 if index < layers else 1
            parts += [nn.Conv2d(width, wider, 4, stride=stride, padding=1, bias=False)]
            parts += [nn.GroupNorm(group_count(wider, "width/4"), wider), nn.LeakyReLU(0.2)]
            width = wider
        self.main = nn.Sequential(*parts, nn.Conv2d(width, 1, 4, padding=1))
        self.apply(_init)

    def forward(self, pixels: Tensor) -> Tensor:
        """float [B, 3, S, S] in [-1, 1] -> logits [B, 1, s, s], above 0 where a patch looks real."""
        return self.main(pixels)


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
