"""Accumulation 1 and k have the same loss and the same gradient, for every family, in float32 and under bf16 autocast.

What a step makes of its micro-batches is `train.Run`'s own; the engine is torch alone: autocast around the forward,
gradients averaged over micro-batches.
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pretrain import schema as C
from pretrain.models import MODELS
from pretrain.runtime.mesh import Mesh, place_from
from pretrain.schema.clip import TextTower, VisionTower
from pretrain.tasks import TASKS
from pretrain.tasks.collectives import ONE_DEVICE
from pretrain.train import Run, Turn

BATCH, STEP = 8, 3
TEXT: dict[str, Any] = {"vocab_size": 50, "context": 8, "layers": 2, "width": 32, "heads": 2}
TOWERS = {"vision": VisionTower(image_size=16, patch_size=8, width=32, layers=2, heads=2), "embed_dim": 16}
GPT = C.GptConfig(text_vocab=11, image_vocab=13, text_tokens=4, image_tokens=6, layers=2, width=32, heads=2)
VQGAN = C.VqganConfig(
    image_size=16, channels=16, multipliers=(1, 2), res_blocks=1, attention_at=(), latent_channels=8,
    codebook_size=20, code_width=4, discriminator_channels=8, discriminator_layers=1,
)  # fmt: skip
ELECTRA = C.ElectraConfig(**TEXT, embedding_width=16, dropout=0.0, generator_fraction=0.5)
FAMILIES: dict[str, tuple[Any, Any]] = {
    "clip": (C.ClipConfig(text=TextTower(**TEXT), **TOWERS), C.ContrastiveConfig()),
    "bert": (C.BertConfig(**TEXT, embedding_width=32, dropout=0.0), C.MlmNspConfig()),
    "bert without pairs": (C.BertConfig(**TEXT, embedding_width=32, dropout=0.0), C.MlmNspConfig(nsp=False)),
    "electra": (ELECTRA, C.RtdConfig()),
    "gpt": (GPT, C.AutoregressiveConfig()),
    "vqgan": (VQGAN, C.ReconstructionConfig(discriminator_weight=0.0, revive_after_steps=2)),
    "vqgan and discriminator": (VQGAN, C.ReconstructionConfig(discriminator_start_step=0, revive_after_steps=2)),
}


def global_batch() -> dict[str, Tensor]:
    """Every tensor that any family reads, of BATCH samples; texts of uneven length."""
    draw = torch.Generator().manual_seed(1)
    lengths = torch.tensor([8, 7, 8, 3, 5, 4, 8, 3])
    attention = torch.arange(8) < lengths[:, None]
    weights = torch.tensor([[1.0, 1.0]] * 3 + [[1.0, 0.0]] * 5)
    return {
        "pixels": torch.rand(BATCH, 3, 16, 16, generator=draw) * 2 - 1,
        "tokens": torch.randint(5, 50, (BATCH, 8), generator=draw) * attention,
        "eot": lengths - 1,
        "types": torch.zeros(BATCH, 8, dtype=torch.int64),
        "attention": attention,
        "positions": torch.tensor([[1, 2]] * BATCH),
        "labels": torch.randint(5, 50, (BATCH, 2), generator=draw),
        "label_weights": weights,
        "is_random": torch.tensor([0, 1] * (BATCH // 2)),
        "uniforms": torch.rand(BATCH, 2, generator=draw),
        "text": torch.randint(0, 11, (BATCH, 4), generator=draw),
        "codes": torch.randint(0, 13, (BATCH, 6), generator=draw),
    }


class Plain:
    """An engine of torch alone, with the calls that a step makes."""

    def __init__(self, objective: nn.Module, precision: str) -> None:
        self.objective, self.low = objective, precision == "bf16"

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """One micro-batch -> named losses."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.low):
            return dict(self.objective(batch))


def built(family: str) -> nn.Module:
    """The objective, with weights larger than at the start, so that logits lie apart."""
    torch.manual_seed(0)
    model_config, config = FAMILIES[family]
    objective = TASKS[config.kind](MODELS[model_config.kind](model_config), config, ONE_DEVICE).train()
    for name, parameter in objective.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3 if "embedding" in name else parameter[0].numel() ** -0.5)
    return objective


def outputs(family: str, number: int) -> dict[str, Tensor]:
    """What the objective yields for the whole batch in the turn of that number."""
    told = {"step": torch.tensor(STEP), "turn": torch.tensor(number)}
    return Plain(built(family), "fp32").forward(global_batch() | told)


def turn_of(objective: nn.Module, precision: str, accumulation: int, number: int) -> tuple[float, dict[str, Tensor]]:
    """One turn of a step -> its loss and the gradient of every parameter."""
    run: Any = object.__new__(Run)
    run.task, run.step = objective, STEP
    run.engine = Plain(objective, precision)
    run.mesh = Mesh(place_from({}), torch.device("cpu"), torch.distributed.HashStore())
    turn = Turn("", torch.tensor(number), last=True)
    parts = [rows.split(BATCH // accumulation) for rows in global_batch().values()]
    batches = [dict(zip(global_batch(), part, strict=True)) for part in zip(*parts, strict=True)]
    losses = []
    for batch in run.with_whole_step(batches, turn):
        losses.append(run.engine.forward(batch | {"step": torch.tensor(STEP), "turn": turn.number})["loss"])
        (losses[-1] / accumulation).backward()
    found = {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}
    objective.zero_grad()
    return float(torch.stack(losses).detach().double().mean()), found


@pytest.mark.parametrize("accumulation", [2, 4, 8])
@pytest.mark.parametrize(("precision", "off", "apart"), [("fp32", 1e-6, 1e-5), ("bf16", 1e-5, 4e-3)])
@pytest.mark.parametrize("family", FAMILIES)
def test_accumulation_has_the_loss_and_the_gradient_of_the_whole_batch(
    family: str, precision: str, off: float, apart: float, accumulation: int
) -> None:
    """off: of the loss, relatively. apart: of the whole gradient; every micro-batch rounds its part to bf16.

    The loss with a discriminator holds lambda, the ratio of two such gradients.
    """
    objective = built(family)
    if (family, precision) == ("vqgan and discriminator", "bf16"):
        off, apart = 2e-4, 1e-2
    for number in range(2 if family == "vqgan and discriminator" else 1):
        loss, whole = turn_of(copy.deepcopy(objective), precision, 1, number)
        found, cut = turn_of(copy.deepcopy(objective), precision, accumulation, number)
        assert found == pytest.approx(loss, rel=off)
        assert cut.keys() == whole.keys()
        flat = [torch.cat([grads[name].flatten() for name in whole]).double() for grads in (cut, whole)]
        assert float((flat[0] - flat[1]).norm() / flat[1].norm()) < apart


@pytest.mark.parametrize("accumulation", [2, 4])
def test_codes_are_revived_from_the_latents_of_the_whole_batch(accumulation: int) -> None:
    tables = []
    for parts in (1, accumulation):
        objective = built("vqgan")
        with torch.no_grad():
            objective.model.quantize.embedding.weight[10:] = 9.0  # far from every latent
        turn_of(objective, "fp32", parts, 0)
        objective.after_step(STEP + 1)
        tables.append(objective.model.quantize.embedding.weight.detach())
    torch.testing.assert_close(tables[1], tables[0], rtol=1e-5, atol=1e-6)
