"""The text-to-image GPT: published sizes, what may see what, and sampling against full recomputation."""

import pytest
import torch
from torch import Tensor

from pretrain.models.gpt import Gpt, choose
from pretrain.schema.gpt import GptConfig

CONFIG = GptConfig(text_vocab=11, image_vocab=13, text_tokens=4, image_tokens=7, layers=3, width=16, heads=2)
TEXT = torch.tensor([[3, 9, 10, 10], [5, 1, 2, 8], [7, 7, 4, 10]])
EMPTY = torch.tensor([10, 10, 10, 10])


def model() -> Gpt:
    """Weights large enough that no two codes are nearly tied."""
    gpt = Gpt(CONFIG)
    generator = torch.Generator().manual_seed(0)
    for parameter in gpt.parameters():
        if parameter.ndim > 1:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5
    return gpt.eval()


def recompute(gpt: Gpt, text: Tensor, guidance: float) -> Tensor:
    """Greedy decoding without a cache: the whole sequence again for every code."""
    codes = torch.zeros(len(text), 0, dtype=torch.int64)
    for _ in range(CONFIG.image_tokens):
        padded = torch.cat([codes, codes.new_zeros(len(text), 1)], 1)
        given, empty = gpt(text, padded)[:, -1], gpt(EMPTY.expand_as(text), padded)[:, -1]
        codes = torch.cat([codes, (empty + guidance * (given - empty)).argmax(-1, keepdim=True)], 1)
    return codes


@pytest.mark.parametrize(
    ("config", "parameters"),
    [(GptConfig(), 126_669_312), (GptConfig(layers=24, width=1024, heads=16), 357_795_840)],
)
def test_published_sizes_have_the_published_number_of_parameters(config, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in Gpt(config).parameters()) == parameters


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_cached_greedy_sampling_equals_full_recomputation_token_for_token(guidance):
    gpt = model()
    with torch.no_grad():
        wanted = recompute(gpt, TEXT, guidance)
    assert torch.equal(gpt.sample(TEXT, temperature=0.0, guidance=guidance, empty=EMPTY), wanted)
    assert len(wanted.unique()) > 2


def test_guidance_changes_codes_after_the_first():
    """Defect of a peer: an unconditional branch that reads the conditional keys makes guidance a no-op."""
    gpt = model()
    plain, guided = (gpt.sample(TEXT, temperature=0.0, guidance=g, empty=EMPTY)[:, 1:] for g in (1.0, 4.0))
    assert not torch.equal(plain, guided)


def test_guidance_needs_the_empty_caption():
    with pytest.raises(ValueError, match="pass `empty`"):
        model().sample(TEXT, guidance=2.0)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_sampling_leaves_the_prompt_as_it_is(guidance):
    text = TEXT.clone()
    model().sample(text, guidance=guidance, empty=EMPTY)
    assert torch.equal(text, TEXT)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_sampled_row_does_not_depend_on_the_batch_around_it(guidance):
    gpt, uniforms = model(), torch.rand(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    together = gpt.sample(TEXT, guidance=guidance, empty=EMPTY, uniforms=uniforms)
    alone = [
        gpt.sample(TEXT[i : i + 1], guidance=guidance, empty=EMPTY, uniforms=uniforms[i : i + 1]) for i in range(3)
    ]
    assert torch.equal(together, torch.cat(alone))


def test_every_sampling_step_after_the_first_reads_one_token():
    gpt, lengths = model(), []
    gpt.embed.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    gpt.sample(TEXT)
    assert lengths == [4] + [1] * 6


def test_a_logit_sees_the_text_and_the_codes_before_it_only():
    gpt = model()
    codes = torch.randint(0, 13, (1, 7), generator=torch.Generator().manual_seed(1))
    before = gpt(TEXT[:1], codes)
    for place in range(7):
        changed = codes.clone()
        changed[0, place] = (changed[0, place] + 1) % 13
        differs = (gpt(TEXT[:1], changed) - before).abs().amax(-1)[0] > 1e-6
        assert not differs[: place + 1].any() and differs[place + 1 :].all()


def test_the_last_text_token_reaches_the_first_logit():
    gpt, other = model(), TEXT[:1].clone()
    other[0, -1] = 6
    codes = torch.zeros(1, 7, dtype=torch.int64)
    assert not torch.allclose(gpt(TEXT[:1], codes)[:, 0], gpt(other, codes)[:, 0])


def test_the_head_is_computed_at_image_places_only():
    gpt, places = model(), []
    gpt.head.register_forward_pre_hook(lambda module, args: places.append(args[0].shape[1]))
    gpt(TEXT, torch.zeros(3, 7, dtype=torch.int64))
    assert places == [7]


# ------------------------------------------------------------------------------------------- choosing a code

LOGITS = torch.log(torch.tensor([[0.1, 0.4, 0.2, 0.3]]))


@pytest.mark.parametrize(
    ("uniform", "temperature", "top_k", "code"),
    [
        (0.05, 1.0, 0, 0),
        (0.11, 1.0, 0, 1),
        (0.69, 1.0, 0, 2),
        (0.71, 1.0, 0, 3),
        (0.999999, 1.0, 0, 3),
        (0.0, 1.0, 1, 1),
        (0.99, 1.0, 1, 1),
        (0.0, 1.0, 2, 1),
        (0.6, 1.0, 2, 3),
        (0.99, 0.0, 0, 1),
        (0.02, 0.5, 0, 0),
        (0.05, 0.5, 0, 1),
    ],
)
def test_a_code_is_the_inverse_of_the_cumulative_distribution(uniform, temperature, top_k, code):
    assert choose(LOGITS, temperature, top_k, torch.tensor([uniform], dtype=torch.float64)).tolist() == [code]


def test_sampled_frequencies_are_the_probabilities():
    uniforms = torch.rand(20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    codes = choose(LOGITS.expand(20_000, -1), 1.0, 0, uniforms)
    assert torch.allclose(codes.bincount() / 20_000, LOGITS.exp()[0], atol=0.02)
