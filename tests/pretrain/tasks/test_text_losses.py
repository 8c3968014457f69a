"""The losses beside for-loops in float64, and their independence of how a batch is spread over ranks."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain import schema as C
from pretrain.models import MODELS
from pretrain.models.electra import ElectraOutput
from pretrain.tasks import TASKS
from pretrain.tasks.collectives import ONE_DEVICE, Collectives
from pretrain.tasks.contrastive import contrastive_loss
from pretrain.tasks.mlm import word_loss
from pretrain.tasks.rtd import replaced_loss


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
        TASKS[kind](model, config, Collectives(lambda x: x, listen, 2))(half)
    total = torch.stack(heard).sum(0)
    return [TASKS[kind](model, config, Collectives(lambda x: x, lambda x: total, 2))(half) for half in halves]


@pytest.mark.parametrize(("model_config", "config"), CASES)
def test_loss_and_gradient_do_not_depend_on_how_samples_are_spread_over_ranks(model_config: Any, config: Any) -> None:
    torch.manual_seed(1)
    model, batch = MODELS[model_config.kind](model_config), uneven_batch()
    whole = TASKS[config.kind](model, config, ONE_DEVICE)(batch)
    ranks = ranks_of(config.kind, model, config, batch)
    parts = {key: sum(rank[key] for rank in ranks) / 2 for key in whole}
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)
    parameters = list(model.parameters())
    expected = torch.autograd.grad(whole["loss"], parameters)
    torch.testing.assert_close(torch.autograd.grad(parts["loss"], parameters), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("model_config", "config"), CASES)
def test_every_parameter_gets_a_gradient_and_no_metric_carries_one(model_config: Any, config: Any) -> None:
    model = MODELS[model_config.kind](model_config)
    result = TASKS[config.kind](model, config, ONE_DEVICE)(uneven_batch())
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
    found = {name: value.item() for name, value in TASKS["mlm"](model, config, ONE_DEVICE)(batch).items()}
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
    found = {name: v.item() for name, v in TASKS["rtd"](model, C.RtdConfig(), ONE_DEVICE)(batch).items()}
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
        found = TASKS[config.kind](MODELS[model_config.kind](model_config).eval(), config, ONE_DEVICE)(batch)
        assert float(found["mlm_loss"]) == float(found["mlm_accuracy"]) == 0.0
        assert all(torch.isfinite(value) for value in found.values())


def halves_of(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    return [{key: rows[half] for key, rows in batch.items()} for half in (slice(0, 2), slice(2, 4))]


@pytest.mark.parametrize(("model_config", "config"), CASES)
def test_what_a_micro_batch_is_divided_by_is_counted_by_a_loop(model_config: Any, config: Any) -> None:
    batch = uneven_batch()
    objective = TASKS[config.kind](MODELS[model_config.kind](model_config), config, ONE_DEVICE)
    wanted = {"masked_words": len(filled(batch))}
    if config.kind == "rtd":
        wanted["real_words"] = sum(sum(row) for row in batch["attention"].tolist())
    assert {name: count.item() for name, count in objective.counts(batch).items()} == wanted


@pytest.mark.parametrize(("model_config", "config"), CASES)
def test_micro_batches_divided_by_their_mean_counts_have_the_loss_of_the_whole_batch(
    model_config: Any, config: Any
) -> None:
    """The halves have 4 and 2 masked words, 16 and 8 real ones. Their metrics are their own."""
    objective, batch = TASKS[config.kind](wide(model_config), config, ONE_DEVICE), uneven_batch()
    halves = halves_of(batch)
    counts = [objective.counts(half) for half in halves]
    mean = {name: (counts[0][name] + counts[1][name]) / 2 for name in counts[0]}
    found = [objective(half | mean) for half in halves]
    assert sum(part["loss"].item() for part in found) / 2 == pytest.approx(objective(batch)["loss"].item(), rel=1e-5)
    for half, part in zip(halves, found, strict=True):
        alone = objective(half)
        assert {name: value.item() for name, value in part.items() if name != "loss"} == {
            name: value.item() for name, value in alone.items() if name != "loss"
        }
        assert part["loss"].item() != pytest.approx(alone["loss"].item(), rel=1e-3)


@pytest.mark.parametrize(("model_config", "config"), CASES)
def test_forward_needs_the_keys_that_it_declares(model_config: Any, config: Any) -> None:
    batch = uneven_batch()
    objective = TASKS[config.kind](MODELS[model_config.kind](model_config), config, ONE_DEVICE)
    objective({key: batch[key] for key in objective.keys})
    for key in objective.keys:
        with pytest.raises(KeyError, match=key):
            objective({name: rows for name, rows in batch.items() if name != key})


@pytest.mark.parametrize(("model_config", "config"), CASES[1:])
@pytest.mark.parametrize("taken", ["segments", "places"])
def test_samples_in_a_row_are_kept_apart_by_the_model(taken: str, model_config: Any, config: Any) -> None:
    """The loss of rows with these keys is that of a model that is given them, and is another one without either."""
    model, batch = wide(model_config), uneven_batch()
    batch["segments"] = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]] * 4)
    batch["places"] = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]] * 4)
    keys = [key for key in TASKS[config.kind].keys if key != "is_random"]
    inputs = keys[:4] if config.kind == "mlm" else keys
    out = model(**{key: batch[key] for key in [*inputs, "segments", "places"]})
    losses = [nll(out[0][slot].tolist(), int(batch["labels"][slot])) for slot in filled(batch)]
    objective = TASKS[config.kind](model, config, ONE_DEVICE)
    assert objective(batch)["mlm_loss"].item() == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    less = {key: rows for key, rows in batch.items() if key != taken}
    assert objective(less)["mlm_loss"].item() != pytest.approx(sum(losses) / len(losses), rel=1e-4)


class Says(torch.nn.Module):
    """Returns what it was told, whatever it is asked."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.output


REPLACED = [
    # logits of four words, whether each was replaced -> accuracy, precision, recall
    ([0.0, 0.0, 0.0, 0.0], [0, 0, 0, 0], 1.0, 0.0, 0.0),
    ([0.0, 0.0, 0.0, 0.0], [1, 0, 0, 0], 0.75, 0.0, 0.0),
    ([0.1, 0.0, -1.0, 0.0], [1, 0, 0, 0], 1.0, 1.0, 1.0),
    ([0.1, 0.1, -1.0, 0.0], [1, 0, 0, 0], 0.75, 0.5, 1.0),
    ([0.1, -0.1, 0.0, -1.0], [1, 1, 1, 0], 0.5, 1.0, 1 / 3),
    ([9.0, 9.0, 9.0, 9.0], [0, 0, 0, 0], 0.0, 0.0, 0.0),
]


@pytest.mark.parametrize(("logits", "replaced", "accuracy", "precision", "recall"), REPLACED)
def test_only_a_logit_above_0_accuses_a_word(
    logits: list[float], replaced: list[int], accuracy: float, precision: float, recall: float
) -> None:
    """Beside the four words stand four of padding, which are accused and replaced and do not count."""
    told = ElectraOutput(
        torch.zeros(1, 1, 3), torch.tensor([logits + [5.0] * 4]), torch.tensor([replaced + [1] * 4]) > 0,
        torch.zeros(1, 8),
    )  # fmt: skip
    batch = {key: torch.zeros(1, 1, dtype=torch.int64) for key in TASKS["rtd"].keys}
    batch |= {"label_weights": torch.ones(1, 1), "attention": torch.arange(8)[None] < 4}
    model: Any = Says(told)
    found = {n: v.item() for n, v in TASKS["rtd"](model, C.RtdConfig(rtd_weight=3.0), ONE_DEVICE)(batch).items()}
    rtd = sum(nll([0.0, logit], answer) for logit, answer in zip(logits, replaced, strict=True)) / 4
    assert found == pytest.approx({
        "loss": math.log(3) + 3.0 * rtd, "mlm_loss": math.log(3), "mlm_accuracy": 1.0, "rtd_loss": rtd,
        "rtd_accuracy": accuracy, "rtd_precision": precision, "rtd_recall": recall,
    }, rel=1e-5)  # fmt: skip


@pytest.mark.parametrize("nsp", [True, False])
def test_a_single_masked_word_is_divided_by_one(nsp: bool) -> None:
    """Three words of equal logits, and one pair of which the model is sure and wrong."""
    model: Any = Says((torch.zeros(1, 2, 3), torch.tensor([[0.0, 4.0]])))
    batch = {key: torch.zeros(1, 2, dtype=torch.int64) for key in TASKS["mlm"].keys}
    batch |= {"label_weights": torch.tensor([[1.0, 0.0]]), "is_random": torch.tensor([0])}
    objective = TASKS["mlm"](model, C.MlmNspConfig(nsp=nsp), ONE_DEVICE)
    found = {name: value.item() for name, value in objective(batch).items()}
    wanted = {"loss": math.log(3), "mlm_loss": math.log(3), "mlm_accuracy": 1.0}
    if nsp:
        wrong = nll([0.0, 4.0], 0)
        wanted |= {"loss": math.log(3) + wrong, "nsp_loss": wrong, "nsp_accuracy": 0.0}
    assert found == pytest.approx(wanted, rel=1e-5)


def test_a_single_real_word_is_divided_by_one() -> None:
    told = ElectraOutput(torch.zeros(1, 1, 3), torch.tensor([[2.0, 2.0]]), torch.tensor([[True, True]]), torch.zeros(1))
    batch = {key: torch.zeros(1, 1, dtype=torch.int64) for key in TASKS["rtd"].keys}
    batch |= {"label_weights": torch.ones(1, 1), "attention": torch.tensor([[True, False]])}
    model: Any = Says(told)
    found = TASKS["rtd"](model, C.RtdConfig(), ONE_DEVICE)(batch)
    assert found["rtd_loss"].item() == pytest.approx(nll([0.0, 2.0], 1), rel=1e-5)
    assert found["loss"].item() == pytest.approx(math.log(3) + 50 * nll([0.0, 2.0], 1), rel=1e-5)
    assert [found[f"rtd_{name}"].item() for name in ("accuracy", "precision", "recall")] == [1.0, 1.0, 1.0]


ANSWERS = [(0, 0), (0, 0), (1, 1), (2, 2), (1, 2), (2, 1), (0, 1)]  # what the model says and what is right: 4 of 7


def test_a_word_or_pair_is_right_where_the_largest_logit_is_the_answer_and_nowhere_else() -> None:
    said, right = (torch.tensor(column) for column in zip(*ANSWERS, strict=True))
    words = torch.nn.functional.one_hot(said, 3)[None] * 3.0
    mlm: Any = Says((words.expand(5, -1, -1), torch.nn.functional.one_hot(torch.tensor([0, 0, 0, 1, 1]), 2) * 2.0))
    batch = {key: torch.zeros(5, 7, dtype=torch.int64) for key in TASKS["mlm"].keys}
    batch |= {"labels": right.expand(5, -1), "label_weights": torch.ones(5, 7), "attention": torch.ones(5, 8) > 0}
    batch |= {"is_random": torch.tensor([0, 0, 1, 0, 1]), "uniforms": torch.zeros(5, 7)}
    found = TASKS["mlm"](mlm, C.MlmNspConfig(), ONE_DEVICE)(batch)
    assert found["mlm_accuracy"].item() == pytest.approx(4 / 7)
    assert found["nsp_accuracy"].item() == pytest.approx(3 / 5)
    rtd: Any = Says(ElectraOutput(words.expand(5, -1, -1), torch.zeros(5, 8), torch.zeros(5, 8) > 0, torch.zeros(5, 8)))
    assert TASKS["rtd"](rtd, C.RtdConfig(), ONE_DEVICE)(batch)["mlm_accuracy"].item() == pytest.approx(4 / 7)
