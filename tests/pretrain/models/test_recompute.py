"""Blocks that are computed again in the backward: the same values and gradients, with dropout, and less memory."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pretrain import schema as C
from pretrain.models.clip import Clip
from pretrain.models.electra import Electra
from pretrain.models.gpt import Gpt
from pretrain.models.layers import Block, recompute
from pretrain.models.noise import name_noise, noise_of
from pretrain.models.vqgan import Vqgan
from pretrain.schema.clip import TextTower, VisionTower

TEXT = torch.randint(0, 40, (3, 6), generator=torch.Generator().manual_seed(1))
CODES = torch.randint(0, 30, (3, 9), generator=torch.Generator().manual_seed(2))
PIXELS = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(3)) * 2 - 1


def gpt() -> tuple[nn.Module, Any]:
    sizes = {"text_vocab": 40, "image_vocab": 30, "text_tokens": 6, "image_tokens": 9, "layers": 3, "width": 16}
    return Gpt(C.GptConfig(**sizes, heads=2, dropout=0.2)), lambda model: model(TEXT, CODES)


def electra() -> tuple[nn.Module, Any]:
    sizes = {"vocab_size": 40, "context": 6, "layers": 2, "width": 16, "heads": 2, "embedding_width": 8}
    model = Electra(C.ElectraConfig(**sizes, dropout=0.2, generator_fraction=0.5))

    def run(model: Any) -> Tensor:
        embedded = model.embeddings(TEXT, torch.zeros_like(TEXT))
        hidden: Tensor = model.discriminator(embedded, torch.ones_like(TEXT, dtype=torch.bool))
        return hidden

    return model, run


def clip() -> tuple[nn.Module, Any]:
    vision = VisionTower(image_size=16, patch_size=8, width=16, layers=2, heads=2)
    text = TextTower(vocab_size=40, context=6, width=16, layers=2, heads=2)
    model = Clip(C.ClipConfig(vision=vision, text=text, embed_dim=8))
    return model, lambda model: torch.stack(model(PIXELS, TEXT, torch.full((3,), 5))[:2])


def vqgan() -> tuple[nn.Module, Any]:
    sizes = {"image_size": 16, "channels": 16, "multipliers": (1, 2), "res_blocks": 1, "attention_at": (8,)}
    model = Vqgan(C.VqganConfig(**sizes, latent_channels=8, codebook_size=20, code_width=4))
    return model, lambda model: model(PIXELS)[0]


FAMILIES = {"gpt": gpt, "electra": electra, "clip": clip, "vqgan": vqgan}


def outcome(family: str, again: bool, keys: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
    """-> what the model gives, and the gradients of all parameters."""
    torch.manual_seed(0)
    model, run = FAMILIES[family]()
    name_noise(model.train())
    if again:
        recompute(model)
    with noise_of(keys):
        out = run(model)
    with noise_of(torch.full((3, 1), 99)):  # the backward comes when the next micro-batch may be there already
        (out * torch.arange(float(out.numel())).view_as(out)).mean().backward()
    return out.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("keys", [torch.tensor([[5], [6], [7]]), None], ids=["noise of samples", "torch's noise"])
@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_gradients_are_bit_for_bit_those_of_kept_activations(family: str, keys: Tensor | None) -> None:
    plain, gradients = outcome(family, False, keys)
    again, repeated = outcome(family, True, keys)
    assert torch.equal(plain, again)
    assert gradients.keys() == repeated.keys()
    assert [name for name in gradients if not torch.equal(gradients[name], repeated[name])] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_is_run_twice_in_training_and_once_otherwise(family: str) -> None:
    model, run = FAMILIES[family]()
    recompute(model.train())
    runs = {name: 0 for name, module in model.named_modules() if isinstance(module, Block)}

    def count(name: str) -> Any:
        return lambda *_: runs.update({name: runs[name] + 1})

    for name in runs:
        model.get_submodule(name).register_forward_pre_hook(count(name))
    run(model).sum().backward()
    ran = {name: times for name, times in runs.items() if times}
    assert ran and set(ran.values()) == {2}
    with torch.no_grad():
        run(model)
    assert {runs[name] for name in ran} == {3}
