"""The losses beside for-loops in float64, and their independence of how a batch is spread over ranks."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain import config as C
from pretrain.models import MODELS
from pretrain.objectives import OBJECTIVES
from pretrain.objectives.collectives import ONE_DEVICE, Collectives
from pretrain.objectives.contrastive import contrastive_loss
from pretrain.objectives.mlm import word_loss
from pretrain.objectives.rtd import replaced_loss


def nll(scores: list[float], answer: int) -> float:
    return math.log(sum(math.exp(score) for score in scores)) - scores[answer]


def test_contrastive_loss_is_the_mean_of_both_directions() -> None:
    logits = torch.randn(5, 5) * 3
    table = logits.double().tolist()
    rows = [nll(table[i], i) for i in range(5)]
    columns = [nll([table[j][i] for j in range(5)], i) for i in range(5)]
    assert contrastive_loss(logits).item() == pytest.approx((sum(rows) + sum(columns)) / 10, rel=1e-5)


def test_word_loss_sums_over_filled_slots_only() -> None:
    logits, labels = torch.randn(3, 2, 7), torch.randint(0, 7, (3, 2))
    weights = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
    table = logits.double().tolist()
    expected = sum(nll(table[b][m], int(labels[b, m])) for b in range(3) for m in range(2) if weights[b, m])
    assert word_loss(logits, labels, weights).item() == pytest.approx(expected, rel=1e-5)


def test_replaced_loss_sums_over_real_words_only() -> None:
    logits, replaced, real = torch.randn(3, 4), torch.rand(3, 4) > 0.5, torch.rand(3, 4) > 0.3
    expected = 0.0
    for b in range(3):
        for s in range(4):
            chance = 1 / (1 + math.exp(-logits[b, s].item()))
            expected -= math.log(chance if replaced[b, s] else 1 - chance) * bool(real[b, s])
    assert replaced_loss(logits, replaced, real).item() == pytest.approx(expected, rel=1e-5)


TOWER: dict[str, Any] = {"vocab_size": 50, "context": 8, "layers": 1, "width": 16, "heads": 2, "dropout": 0.0}
CASES = [
    (C.BertConfig(**TOWER, embedding_width=16), C.MlmNspConfig()),
    (C.BertConfig(**TOWER, embedding_width=16), C.MlmNspConfig(nsp=False)),
    (C.ElectraConfig(**TOWER, embedding_width=12, generator_fraction=0.5), C.RtdConfig()),
]


def uneven_batch() -> dict[str, Tensor]:
    attention = torch.arange(8) < torch.tensor([8, 8, 5, 3])[:, None]
    return {
        "tokens": torch.randint(5, 50, (4, 8)) * attention,
        "types": torch.zeros(4, 8, dtype=torch.int64),
        "attention": attention,
        "positions": torch.tensor([[1, 6], [2, 3], [2, 0], [1, 0]]),
        "labels": torch.randint(5, 50, (4, 2)),
        "label_weights": torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, 0.0], [1.0, 0.0]]),
        "is_random": torch.tensor([0, 1, 1, 0]),
        "uniforms": torch.rand(4, 2),
    }


def ranks_of(kind: str, model: torch.nn.Module, config: Any, batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """What two ranks with half of the batch each return: first their sums are written down, then added up."""
    halves = [{key: rows[half] for key, rows in batch.items()} for half in (slice(0, 2), slice(2, 4))]
    heard: list[Tensor] = []

    def listen(x: Tensor) -> Tensor:
        heard.append(x)
        return x

    for half in halves:
        OBJECTIVES[kind](model, config, Collectives(lambda x: x, listen, 2))(half)
    total = torch.stack(heard).sum(0)
    return [OBJECTIVES[kind](model, config, Collectives(lambda x: x, lambda x: total, 2))(half) for half in halves]


@pytest.mark.parametrize(("model_config", "config"), CASES)
def test_loss_and_gradient_do_not_depend_on_how_samples_are_spread_over_ranks(model_config: Any, config: Any) -> None:
    torch.manual_seed(1)
    model, batch = MODELS[model_config.kind](model_config), uneven_batch()
    whole = OBJECTIVES[config.kind](model, config, ONE_DEVICE)(batch)
    ranks = ranks_of(config.kind, model, config, batch)
    parts = {key: sum(rank[key] for rank in ranks) / 2 for key in whole}
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)
    parameters = list(model.parameters())
    expected = torch.autograd.grad(whole["loss"], parameters)
    torch.testing.assert_close(torch.autograd.grad(parts["loss"], parameters), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("model_config", "config"), CASES)
def test_every_parameter_gets_a_gradient_and_no_metric_carries_one(model_config: Any, config: Any) -> None:
    model = MODELS[model_config.kind](model_config)
    result = OBJECTIVES[config.kind](model, config, ONE_DEVICE)(uneven_batch())
    result["loss"].backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert [key for key, value in result.items() if value.requires_grad] == ["loss"]


def share(right: list[bool]) -> float:
    return sum(right) / len(right)


def filled(batch: dict[str, Tensor]) -> list[tuple[int, int]]:
    """Sample and slot of every masked word."""
    return [(b, m) for b, row in enumerate(batch["label_weights"].tolist()) for m, weight in enumerate(row) if weight]


def wide(model_config: Any, seed: int = 4) -> torch.nn.Module:
    """With weights so large that some words and pairs are right by themselves."""
    torch.manual_seed(seed)
    model = MODELS[model_config.kind](model_config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


@pytest.mark.parametrize("nsp", [True, False])
def test_the_metrics_of_masked_words_are_those_of_loops(nsp: bool) -> None:
    model, batch = wide(CASES[0][0]), uneven_batch()
    words, pairs = model(batch["tokens"], batch["types"], batch["attention"], batch["positions"])
    slots = filled(batch)
    batch["labels"][slots[0]] = words[slots[0]].argmax()  # one is right
    config = C.MlmNspConfig(nsp=nsp)
    found = {name: value.item() for name, value in OBJECTIVES["mlm"](model, config, ONE_DEVICE)(batch).items()}
    losses = [nll(words[slot].tolist(), int(batch["labels"][slot])) for slot in slots]
    right = [int(words[slot].argmax()) == int(batch["labels"][slot]) for slot in slots]
    wanted = {"mlm_loss": sum(losses) / len(losses), "mlm_accuracy": share(right)}
    if nsp:
        answers = batch["is_random"].tolist()
        wanted["nsp_loss"] = sum(nll(row, a) for row, a in zip(pairs.tolist(), answers, strict=True)) / 4
        wanted["nsp_accuracy"] = share([int(row.argmax()) == a for row, a in zip(pairs, answers, strict=True)])
    wanted["loss"] = wanted["mlm_loss"] + wanted.get("nsp_loss", 0.0)
    assert found == pytest.approx(wanted, rel=1e-4) and 0 < found["mlm_accuracy"] < 1


def test_the_metrics_of_replaced_tokens_are_those_of_loops() -> None:
    model, batch = wide(CASES[2][0], 20), uneven_batch()
    keys = ("tokens", "types", "attention", "positions", "labels", "label_weights", "uniforms")
    out = model(**{key: batch[key] for key in keys})
    found = {name: v.item() for name, v in OBJECTIVES["rtd"](model, C.RtdConfig(), ONE_DEVICE)(batch).items()}
    slots = filled(batch)
    mlm = sum(nll(out.word_logits[slot].tolist(), int(batch["labels"][slot])) for slot in slots) / len(slots)
    real = [(b, s) for b in range(4) for s in range(8) if batch["attention"][b, s]]
    guessed = {place: out.replaced_logits[place].item() > 0 for place in real}
    true = {place: bool(out.replaced[place]) for place in real}
    losses = [nll([0.0, out.replaced_logits[place].item()], int(true[place])) for place in real]
    caught = sum(guessed[place] and true[place] for place in real)
    wanted = {
        "loss": mlm + 50 * sum(losses) / len(real),
        "mlm_loss": mlm,
        "mlm_accuracy": share([int(out.word_logits[slot].argmax()) == int(batch["labels"][slot]) for slot in slots]),
        "rtd_loss": sum(losses) / len(real),
        "rtd_accuracy": share([guessed[place] == true[place] for place in real]),
        "rtd_precision": caught / max(1, sum(guessed.values())),
        "rtd_recall": caught / max(1, sum(true.values())),
    }
    assert found == pytest.approx(wanted, rel=1e-4)
    assert 0 < caught < min(sum(guessed.values()), sum(true.values()))  # so that precision and recall are shares


def test_what_no_word_was_masked_of_has_no_loss_and_no_division_by_zero() -> None:
    batch = uneven_batch() | {"label_weights": torch.zeros(4, 2)}
    for model_config, config in CASES[1:]:
        found = OBJECTIVES[config.kind](MODELS[model_config.kind](model_config).eval(), config, ONE_DEVICE)(batch)
        assert float(found["mlm_loss"]) == float(found["mlm_accuracy"]) == 0.0
        assert all(torch.isfinite(value) for value in found.values())
