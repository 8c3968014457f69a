"""Parameter counts at the published sizes, on the meta device, and the properties of CLIP's scale."""

import math

import pytest
import torch
from torch import nn

from pretrain import schema as C
from pretrain.models import MODELS
from pretrain.models.clip import Clip
from pretrain.models.electra import Electra, put, sample_words
from pretrain.schema.clip import TextTower, VisionTower


def on_meta(config: C.ModelConfig) -> nn.Module:
    with torch.device("meta"):
        return MODELS[config.kind](config)


def count(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


LARGE = {"layers": 24, "width": 1024, "heads": 16, "embedding_width": 1024}
L14 = C.ClipConfig(
    vision=VisionTower(patch_size=14, width=1024, layers=24, heads=16),
    text=TextTower(width=768, heads=12),
    embed_dim=768,
)


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (C.ClipConfig(), 151_277_313),
        (C.ClipConfig(vision=VisionTower(patch_size=16)), 149_620_737),
        (L14, 427_616_513),
        (C.BertConfig(), 110_106_428),
    ],
)
def test_a_published_model_has_its_published_number_of_parameters(config: C.ModelConfig, parameters: int) -> None:
    assert count(on_meta(config)) == parameters


@pytest.mark.parametrize(
    ("sizes", "parameters"), [({}, 109_482_240), ({"vocab_size": 21128}, 102_267_648), (LARGE, 335_141_888)]
)
def test_bert_without_its_heads_has_its_published_number_of_parameters(sizes: dict[str, int], parameters: int) -> None:
    model = on_meta(C.BertConfig(**sizes))
    assert count(model.embeddings, model.encoder, model.pooler) == parameters


@pytest.mark.parametrize(
    ("config", "discriminator", "generator"),
    [
        (C.ElectraConfig(width=256, heads=4, embedding_width=128), 13_549_057, 4_620_026),
        # the released small one had a generator as wide as its discriminator
        (C.ElectraConfig(width=256, heads=4, embedding_width=128, generator_fraction=1), 13_549_057, 13_546_682),
        (C.ElectraConfig(generator_fraction=1 / 3), 109_483_009, 33_740_602),
        (C.ElectraConfig(**LARGE), 335_142_913, 51_295_290),
    ],
)
def test_electra_towers_have_their_published_sizes_each_with_the_shared_embeddings(
    config: C.ElectraConfig, discriminator: int, generator: int
) -> None:
    model = on_meta(config)
    assert isinstance(model, Electra)
    assert count(model.embeddings, model.discriminator, model.rtd) == discriminator
    assert count(model.embeddings, model.generator, model.mlm) == generator


def tiny_clip() -> Clip:
    vision = VisionTower(image_size=8, patch_size=4, width=16, layers=1, heads=2)
    text = TextTower(vocab_size=60, context=8, width=16, layers=1, heads=2)
    return Clip(C.ClipConfig(vision=vision, text=text, embed_dim=8))


@pytest.mark.parametrize(
    ("value", "sign", "moves"), [(5.0, 1, True), (5.0, -1, False), (2.0, 1, True), (2.0, -1, True)]
)
def test_the_logit_scale_stays_at_100_and_can_come_down_again(value: float, sign: int, moves: bool) -> None:
    model = tiny_clip()
    model.logit_scale.data.fill_(value)
    scale = model(torch.zeros(1, 3, 8, 8), torch.zeros(1, 8, dtype=torch.int64), torch.tensor([2]))[2]
    (sign * scale.sum()).backward()
    assert scale.shape == model.logit_scale.shape == (1,)
    assert scale.item() == pytest.approx(math.exp(min(value, math.log(100))))
    assert bool(model.logit_scale.grad.abs().item() > 0) is moves


def test_text_behind_the_end_of_text_does_not_change_the_embedding() -> None:
    model = tiny_clip()
    tokens, eot = torch.randint(5, 60, (2, 8)), torch.tensor([3, 5])
    other = torch.where(torch.arange(8) > eot[:, None], 7, tokens)
    assert torch.equal(model.text(tokens, eot), model.text(other, eot))


def test_drawn_words_have_the_frequencies_of_the_softmax() -> None:
    logits = torch.tensor([2.0, -1.0, 0.0, -50.0])
    draws = (torch.arange(20_000) + 0.5) / 20_000
    drawn = sample_words(logits.expand(20_000, 4), draws)
    assert torch.allclose(torch.bincount(drawn, minlength=4) / 20_000, logits.softmax(-1), atol=2e-4)


def test_the_largest_uniform_draws_a_word_of_the_vocabulary() -> None:
    largest = torch.tensor([1 - 2**-24])
    assert sample_words(torch.zeros(1, 7), largest).item() == 6


def test_an_empty_slot_changes_no_token() -> None:
    tokens = torch.tensor([[2, 10, 11, 3]])
    put_in = put(tokens, torch.tensor([[2, 0]]), torch.tensor([[9, 8]]), torch.tensor([[True, False]]))
    assert put_in.tolist() == [[2, 10, 9, 3]]
