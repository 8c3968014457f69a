"""The public layout of VQGANs."""

import torch

from data_pipeline.errors import DataError
from pretrain.interchange.rules import PublicLayout, Rule, without
from pretrain.models.vqgan import Vqgan
from pretrain.schema.vqgan import VqganConfig


def _taming_vqgan(config: VqganConfig) -> list[Rule]:
    """Names are identical. Raises DataError unless there are 32 groups and attention in the middle blocks."""
    if not config.attention_at:
        raise DataError(
            "programs of layout 'taming-vqgan' have attention in the middle blocks, the configuration has "
            "attention_at=[]; use --format tessera, or train with attention_at=[middle]"
        )
    if set(config.group_counts()) != {32}:
        raise DataError(
            f"programs of layout 'taming-vqgan' have 32 groups in every GroupNorm, the configuration has "
            f"norm_groups={config.norm_groups} over {config.channels} channels: the same weights compute different "
            "results; use --format tessera, or train with norm_groups=32"
        )
    with torch.device("meta"):
        return [Rule(name, (name,)) for name in Vqgan(config).state_dict()]


LAYOUTS: dict[str, PublicLayout] = {
    "taming-vqgan": PublicLayout("vqgan", _taming_vqgan, unpack=without("loss."), fixed={"local_encoder": False}),
}
