"""The sigmoid loss against a loop over pairs and against SiglipModel, and its place in a configuration."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.settings import check_settings
from pretrain.checkpoint.identity import differences, identity
from pretrain.config import NOTES_FILE, RunConfig
from pretrain.interchange.folder import read_notes, write_notes
from pretrain.interchange.layouts import export_state, import_state
from pretrain.models.clip import Clip
from pretrain.schema.clip import ClipConfig
from pretrain.schema.tasks import SigmoidConfig
from pretrain.tasks.collectives import ONE_DEVICE, Collectives
from pretrain.tasks.sigmoid import Sigmoid, sigmoid_loss

TOWERS: dict[str, Any] = {
    "vision": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "heads": 2},
    "text": {"vocab_size": 40, "context": 6, "width": 16, "layers": 1, "heads": 2},
    "embed_dim": 8,
}


def tree(task: str, **model: Any) -> dict[str, Any]:
    return {
        "run": "r", "model": {"kind": "clip", **model}, "task": {"kind": task},
        "data": {"dataset": "d", "text_tokenizer": "v"}, "train": {"steps": 3, "global_batch": 4},
        "optim": {"lr": 1.0},
    }  # fmt: skip


def config_of(task: str, **model: Any) -> RunConfig:
    return check_settings(RunConfig, tree(task, **model), "test")


@pytest.fixture(scope="module")
def task() -> Sigmoid:
    torch.manual_seed(0)
    return Sigmoid(Clip(ClipConfig(logit_scale=10, logit_bias=-10, **TOWERS)), SigmoidConfig(), ONE_DEVICE)


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    tokens, eot = torch.randint(1, 40, (8, 6), generator=draw), torch.randint(1, 6, (8,), generator=draw)
    return {"pixels": torch.randn(8, 3, 16, 16, generator=draw), "tokens": tokens, "eot": eot}


def test_the_loss_is_that_of_a_loop_over_pairs() -> None:
    logits = 20 * torch.randn(5, 5, generator=torch.Generator().manual_seed(2)).double()
    total = sum(math.log1p(math.exp(-float(logits[i, j]) * (1 if i == j else -1))) for i in range(5) for j in range(5))
    assert float(sigmoid_loss(logits)) == pytest.approx(total / 5, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (117.3, -12.9), (1.0, 0.0)])
def test_loss_and_gradients_are_those_of_siglip_for_the_same_embeddings(
    scale: float, bias: float, dtype: torch.dtype
) -> None:
    """Of a random SiglipModel: its loss, and the gradients of scale and bias, from its own normalised embeddings."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = small | {"vocab_size": 40, "max_position_embeddings": 6, "projection_size": 16}
    vision = small | {"image_size": 16, "patch_size": 8}
    theirs = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision)).to(dtype)
    with torch.no_grad():
        theirs.logit_scale.fill_(math.log(scale))
        theirs.logit_bias.fill_(bias)
    tokens, pixels = torch.randint(2, 40, (7, 6)), torch.randn(7, 3, 16, 16, dtype=dtype)
    out = theirs.eval()(input_ids=tokens, pixel_values=pixels, return_loss=True)
    out.loss.backward()
    log_scale = torch.tensor([math.log(scale)], dtype=dtype, requires_grad=True)
    offset = torch.tensor([bias], dtype=dtype, requires_grad=True)
    images, texts = out.image_embeds.detach(), out.text_embeds.detach()
    logits = Sigmoid.logits(object.__new__(Sigmoid), images, texts, log_scale.exp(), offset)
    ours = sigmoid_loss(logits) if dtype == torch.float32 else sigmoid_loss(log_scale.exp() * images @ texts.T + offset)
    ours.backward()
    off = 2e-6 if dtype == torch.float32 else 1e-12
    assert ours.item() == pytest.approx(out.loss.item(), rel=off)
    assert log_scale.grad is not None and offset.grad is not None
    assert log_scale.grad.item() == pytest.approx(theirs.logit_scale.grad.item(), rel=10 * off, abs=10 * off)
    assert offset.grad.item() == pytest.approx(theirs.logit_bias.grad.item(), rel=10 * off)


def test_every_rank_returns_the_loss_of_all_ranks_rows(task: Sigmoid, batch: dict[str, Tensor]) -> None:
    expected = {name: value.item() for name, value in task(batch).items()}
    assert set(expected) | {"grad_norm", "lr"} == set(SigmoidConfig.metrics)
    image, text, *_ = task.model(batch["pixels"], batch["tokens"], batch["eot"])
    for rank in range(2):
        whole = iter([image, text])
        on_rank = Sigmoid(task.model, SigmoidConfig(), Collectives(lambda _, whole=whole: next(whole), lambda x: x, 2))
        found = on_rank({name: tensor[4 * rank : 4 * rank + 4] for name, tensor in batch.items()})
        assert {name: value.item() for name, value in found.items()} == pytest.approx(expected, rel=1e-6)


def test_the_scale_is_not_limited_to_that_of_the_softmax(task: Sigmoid, batch: dict[str, Tensor]) -> None:
    """The published SigLIP B/16 has a scale of 117."""
    model = Clip(ClipConfig(logit_bias=-10, **TOWERS))
    with torch.no_grad():
        model.logit_scale.fill_(math.log(117.0))
    assert Sigmoid(model, SigmoidConfig(), ONE_DEVICE)(batch)["logit_scale"].item() == pytest.approx(117.0)


def test_the_task_gives_a_clip_its_bias_and_its_scale_unless_the_recipe_does() -> None:
    model = config_of("sigmoid").model
    assert isinstance(model, ClipConfig) and (model.logit_scale, model.logit_bias) == (10.0, -10.0)
    model = config_of("sigmoid", logit_bias=-5.0).model
    assert isinstance(model, ClipConfig) and (model.logit_scale, model.logit_bias) == (10.0, -5.0)
    clip = Clip(ClipConfig(logit_scale=10, logit_bias=-10, **TOWERS))
    assert clip.logit_scale.item() == pytest.approx(math.log(10)) and clip.logit_bias is not None
    assert clip.logit_bias.item() == -10


def test_a_softmax_clip_has_neither_and_resumes_from_before_there_were_these_fields() -> None:
    config = config_of("contrastive")
    assert "logit_bias" not in Clip(ClipConfig(**TOWERS)).state_dict()
    assert Clip(ClipConfig(**TOWERS)).logit_scale.item() == torch.tensor(math.log(1 / 0.07)).item()
    saved = identity(config)
    saved["model"] = {key: value for key, value in saved["model"].items() if not key.startswith("logit_")}
    assert differences(saved, config) == {}


@pytest.mark.parametrize(
    ("task", "model", "told"),
    [
        ("contrastive", {"logit_bias": -10.0}, "model.logit_bias=-10 has no effect on 'contrastive'"),
        ("sigmoid", {"logit_bias": None}, "model.logit_bias is null"),
        ("sigmoid", {"logit_bias": float("nan")}, "logit_bias"),
        ("sigmoid", {"logit_scale": 0}, "logit_scale"),
        ("sigmoid", {"kind": "bert"}, "does not train a bert; use 'mlm'"),
    ],
)
def test_a_bias_where_none_belongs_is_refused_with_the_remedy(task: str, model: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told.replace(".", r"\.")):
        config_of(task, **model)


def test_the_bias_is_exported_where_the_layout_has_one() -> None:
    """open_clip has it; transformers' CLIP has none, and would compute other logits."""
    config = ClipConfig(logit_scale=10, logit_bias=-10, **TOWERS)
    state = Clip(config).state_dict()
    exported = export_state("openai-clip", config, state)
    assert exported["logit_bias"].shape == () and exported["logit_bias"].item() == -10
    returned = import_state("openai-clip", config, exported)
    assert all(torch.equal(returned[name], tensor) for name, tensor in state.items())
    with pytest.raises(DataError, match="have logit_bias=None, the configuration has logit_bias=-10"):
        export_state("transformers-clip", config, state)


def test_notes_from_before_a_model_had_a_field_are_still_its_notes(tmp_path: Path) -> None:
    config = ClipConfig(**TOWERS)
    write_notes(tmp_path, config, {"step": 7})
    notes = json.loads((tmp_path / NOTES_FILE).read_text())
    del notes["model"]["logit_bias"], notes["model"]["logit_scale"]
    (tmp_path / NOTES_FILE).write_text(json.dumps(notes))
    assert read_notes(tmp_path, config) == {"step": 7}
    assert read_notes(tmp_path, config.model_copy(update={"embed_dim": 4})) == {}
    for broken in ({"model": 3}, {"model": {"kind": "bert"}}, {}, [1]):
        (tmp_path / NOTES_FILE).write_text(json.dumps(broken))
        assert read_notes(tmp_path, config) == {}
