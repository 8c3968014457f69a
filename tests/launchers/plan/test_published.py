"""Published figures: FLOPs of models, utilisation of runs, and throughputs that lie where the planner expects them."""

from pathlib import Path
from typing import Any

import pytest

from data_pipeline.settings import load_settings
from launchers.plan.clusters import GPUS, cluster_of
from launchers.plan.make import make_plan
from launchers.plan.textbook import flops_per_token, layer_activation_bytes, mfu, states_bytes, transformer_flops
from pretrain.config import RunConfig
from tests.launchers.plan.recipes import figures_of, run_of

LLM_FOUNDRY = [  # its tables of bf16 runs: parameters, layers, width, length, H100s, tokens/s, MFU in %
    (6_658_859_008, 32, 4096, 2048, 8, 85_144, 46.44),
    (6_658_859_008, 32, 4096, 2048, 512, 4_951_479, 42.20),
    (64_862_437_376, 80, 8192, 2048, 512, 515_636, 41.25),
    (1_445_974_016, 24, 2048, 65_536, 8, 44_050, 26.34),
    (2_730_480_640, 32, 2560, 32_768, 8, 46_984, 28.84),
]


@pytest.mark.parametrize(("parameters", "layers", "width", "length", "gpus", "tokens", "published"), LLM_FOUNDRY)
def test_the_throughputs_of_llm_foundry_give_its_utilisation(
    parameters: int, layers: int, width: int, length: int, gpus: int, tokens: int, published: float
) -> None:
    share = mfu(flops_per_token(parameters, layers, width, length), tokens, gpus, GPUS["h100"].peaks["bf16"])
    assert 100 * share == pytest.approx(published, abs=0.03)


PARAMETERS = {  # of OpenAI's CLIP, timm's ViT, transformers' BertForPreTraining and EasyNLP's base model
    "configs/clip/vit-b-32.yaml": 151_277_313,
    "configs/clip/vit-b-16.yaml": 149_620_737,
    "configs/clip/vit-b-16-sigmoid.yaml": 149_620_738,  # and a bias
    "configs/vision/vit-b-16.yaml": 86_567_656,
    "configs/text/bert-base.yaml": 110_106_428,
    "configs/text_to_image/pai-painter-base.yaml": 126_669_312,
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", PARAMETERS)
def test_a_recipe_of_published_size_has_its_published_parameters(recipe: str, repository: Path) -> None:
    run = load_settings(RunConfig, repository / recipe, ["train.global_batch=8"])
    assert make_plan(run, cluster_of("h100", 1, 1)).parameters == PARAMETERS[recipe]


def test_a_forward_of_clip_has_its_published_flops() -> None:
    vit_b_32 = figures_of(run_of({"kind": "clip"}, global_batch=8), rows=1, on_gpu=True).forward
    assert vit_b_32 / 1e9 == pytest.approx(14.78, abs=0.005)
    # g/14 has another width in the middle than our towers: by the formula, open_clip's profile of it says 581.15
    image = transformer_flops(40, 1408, 6144, 257) + 2 * 256 * 3 * 14**2 * 1408 + 2 * 1408 * 1024
    text = transformer_flops(24, 1024, 4096, 77) + 2 * 1024 * 1024
    assert (image + text) / 1e9 == pytest.approx(581.15, rel=1e-3)


def test_the_formula_of_papers_and_the_trace_count_the_same_flops_of_a_gpt() -> None:
    plan, tokens = make_plan(run_of(gpt(12, 768, 12, 1024)), cluster_of("h100", 1, 8)), 1024
    inside = plan.parameters - 50_369 * 768 - 1025 * 768  # what is looked up is not computed with
    assert plan.tokens == tokens
    assert plan.sample_flops / tokens == pytest.approx(flops_per_token(inside, 12, 768, tokens), rel=2e-3)


def test_the_textbooks_states_and_activations_differ_from_ours_where_they_should() -> None:
    assert [states_bytes(1000, 4, stage) for stage in range(4)] == [16_000, 7_000, 5_500, 4_000]
    model = {"kind": "bert", "context": 512, "dropout": 0.0}
    two, three = (figures_of(run_of(model | {"layers": n}), rows=1, on_gpu=True).layers for n in (2, 3))
    # ours keeps the residual in float32, theirs has all in 16 bits and the masks of dropout, 3 bytes an element
    masks = 3 * 512 * 768
    theirs = layer_activation_bytes(512, 1, 768, 12) - masks
    assert (three - two) / theirs == pytest.approx(1.2, abs=0.1)


# ------------------------------------------------------------------------- throughputs of other people's runs


def gpt(layers: int, width: int, heads: int, length: int) -> dict[str, Any]:
    """A GPT with a vocabulary of 50,368 that reads `length` tokens and predicts them all."""
    sizes = {"layers": layers, "width": width, "heads": heads, "text_tokens": 1, "image_tokens": length}
    return {"kind": "gpt", "text_vocab": 6, "image_vocab": 50_363} | sizes


LARGE = {"layers": 24, "width": 1024, "heads": 16, "embedding_width": 1024, "dropout": 0.0}
BERT_LARGE = {"kind": "bert", "context": 128} | LARGE
ELECTRA_BASE = {"kind": "electra", "context": 128, "dropout": 0.0, "generator_fraction": 1 / 3}
RUNS = [  # model, batch, micro-batch, stage, GPU, nodes of 8, recompute, samples/s
    (BERT_LARGE, 1024, 128, 0, "a100-80", 1, False, 8 * 580),
    (ELECTRA_BASE, 1408, 176, 0, "a100-80", 1, False, 8 * 955),
    (gpt(24, 1536, 16, 2048), 192, 24, 3, "h100", 1, False, 505_177 / 2048),
    (gpt(24, 2048, 16, 2048), 112, 14, 3, "h100", 1, False, 363_645 / 2048),
    (gpt(24, 2048, 16, 2048), 6144, 12, 2, "h100", 64, False, 20_396_905 / 2048),
    (gpt(32, 2560, 20, 2048), 160, 10, 3, "h100", 2, False, 386_285 / 2048),
    (gpt(32, 4096, 32, 2048), 48, 6, 3, "h100", 1, False, 85_144 / 2048),
    (gpt(32, 4096, 32, 2048), 3072, 6, 3, "h100", 64, False, 4_951_479 / 2048),
    (gpt(40, 5120, 40, 2048), 16, 2, 3, "h100", 1, False, 38_336 / 2048),
    (gpt(80, 8192, 64, 2048), 4096, 8, 3, "h100", 64, True, 515_636 / 2048),
    (gpt(32, 2560, 20, 32_768), 24, 3, 3, "h100", 1, True, 46_984 / 32_768),
    (gpt(24, 2048, 16, 65_536), 8, 1, 3, "h100", 1, True, 44_050 / 65_536),
]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "batch", "micro", "stage", "gpu", "nodes", "recompute", "published"), RUNS)
def test_published_throughputs_lie_between_the_slow_and_the_fast_step(
    model: dict[str, Any], batch: int, micro: int, stage: int, gpu: str, nodes: int, recompute: bool, published: float
) -> None:
    run: RunConfig = run_of(model, global_batch=batch, micro_batch=micro, zero_stage=stage, recompute=recompute)
    slow, usual, fast = make_plan(run, cluster_of(gpu, nodes, 8)).paces
    assert batch / slow.step < published < batch / fast.step
    assert 0.6 < published / (batch / usual.step) < 1.2
