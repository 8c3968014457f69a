"""Gradient caching against the whole batch at once: same loss, same gradient, however the batch is cut."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.models.clip import Clip
from pretrain.schema.clip import ClipConfig
from pretrain.schema.tasks import ContrastiveConfig
from pretrain.tasks.collectives import ONE_DEVICE, Collectives
from pretrain.tasks.contrastive import Contrastive, contrastive_loss

BATCH = 12
CONFIG = ClipConfig.model_validate({
    "vision": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "heads": 2},
    "text": {"vocab_size": 40, "context": 6, "width": 16, "layers": 1, "heads": 2},
    "embed_dim": 8,
})  # fmt: skip


@pytest.fixture(scope="module")
def objective() -> Contrastive:
    torch.manual_seed(0)
    return Contrastive(Clip(CONFIG), ContrastiveConfig(), ONE_DEVICE)


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 40, (BATCH, 6), generator=draw)
    eot = torch.randint(1, 6, (BATCH,), generator=draw)
    return {"pixels": torch.randn(BATCH, 3, 16, 16, generator=draw), "tokens": tokens, "eot": eot}


def test_the_loss_is_that_of_a_loop_over_pairs() -> None:
    logits = torch.randn(5, 5, generator=torch.Generator().manual_seed(2)).double()
    total = 0.0
    for i in range(5):
        for rows in (logits, logits.T):
            total -= float(torch.log(torch.exp(rows[i, i]) / sum(torch.exp(rows[i, j]) for j in range(5))))
    assert float(contrastive_loss(logits)) == pytest.approx(total / 10)


@pytest.mark.parametrize("micro", [1, 3, 4, 5, 6, 12])
def test_micro_batches_carry_the_loss_and_gradient_of_the_whole_batch(
    micro: int, objective: Contrastive, batch: dict[str, Tensor]
) -> None:
    whole = copy.deepcopy(objective)
    expected = whole(batch)
    expected["loss"].backward()
    parts: list[dict[str, Any]] = [
        {name: tensor[at : at + micro] for name, tensor in batch.items()} for at in range(0, BATCH, micro)
    ]
    cut = copy.deepcopy(objective)
    with torch.no_grad():
        rows = [cut(part | {"embed": torch.tensor(1)}) for part in parts]
    for part, slopes in zip(parts, cut.slopes(rows), strict=True):
        found = cut(part | slopes)
        assert found.keys() == expected.keys()
        assert [value.item() for value in found.values()] == pytest.approx(
            [value.item() for value in expected.values()], rel=1e-6
        )
        (found["loss"] / len(parts)).backward()  # as the engine does
        assert [name for name, value in found.items() if value.requires_grad] == ["loss"]
    for (name, ours), theirs in zip(cut.named_parameters(), whole.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6), name


def test_a_plain_sum_over_micro_batches_is_another_loss(objective: Contrastive, batch: dict[str, Tensor]) -> None:
    halves = [objective({name: tensor[at : at + 6] for name, tensor in batch.items()})["loss"] for at in (0, 6)]
    assert abs(float(sum(halves) / 2) - float(objective(batch)["loss"])) > 0.1


def test_each_direction_has_its_own_accuracy() -> None:
    """By a loop over rows and over columns of logits, which are the scaled products of what every rank gathers."""
    draw = torch.Generator().manual_seed(11)
    image, text = (torch.nn.functional.normalize(torch.randn(9, 3, generator=draw), dim=-1) for _ in range(2))
    objective = Contrastive(Clip(CONFIG), ContrastiveConfig(), ONE_DEVICE)
    found = objective._of_global_batch(image, text, torch.tensor([5.0]))
    table = [[5.0 * sum(a * b for a, b in zip(i, t, strict=True)) for t in text.tolist()] for i in image.tolist()]
    rows = sum(max(range(9), key=lambda j, i=i: table[i][j]) == i for i in range(9)) / 9
    columns = sum(max(range(9), key=lambda i, j=j: table[i][j]) == j for j in range(9)) / 9
    assert rows != columns
    assert float(found["image_to_text_accuracy"]) == pytest.approx(rows)
    assert float(found["text_to_image_accuracy"]) == pytest.approx(columns)
    assert float(found["logit_scale"]) == 5.0
    assert float(found["loss"]) == pytest.approx(float(contrastive_loss(torch.tensor(table))), rel=1e-5)


def test_forward_needs_the_keys_that_it_declares_and_only_the_loss_carries_a_gradient(
    objective: Contrastive, batch: dict[str, Tensor]
) -> None:
    found = objective({key: batch[key] for key in objective.keys})
    assert [name for name, value in found.items() if value.requires_grad] == ["loss"]
    for key in objective.keys:
        with pytest.raises(KeyError, match=key):
            objective({name: tensor for name, tensor in batch.items() if name != key})


def test_every_rank_returns_the_loss_and_accuracies_of_all_ranks_rows(
    objective: Contrastive, batch: dict[str, Tensor]
) -> None:
    """Two ranks of 4 and 4 rows: each gathers the images, then the texts, and finds what one device does."""
    batch = {name: tensor[:8] for name, tensor in batch.items()}
    expected = {name: value.item() for name, value in objective(batch).items()}
    image, text, _ = objective.model(batch["pixels"], batch["tokens"], batch["eot"])
    for rank in range(2):
        mine = slice(4 * rank, 4 * rank + 4)
        asked: list[Tensor] = []

        def gather(rows: Tensor, asked: list[Tensor] = asked) -> Tensor:
            asked.append(rows)
            return image if len(asked) == 1 else text

        on_rank = Contrastive(objective.model, ContrastiveConfig(), Collectives(gather, lambda x: x, 2))
        found = on_rank({name: tensor[mine] for name, tensor in batch.items()})
        assert {name: value.item() for name, value in found.items()} == pytest.approx(expected, rel=1e-6)
        torch.testing.assert_close(asked, [image[mine], text[mine]])


def test_the_logits_are_float32_under_autocast_also() -> None:
    """With bfloat16 embeddings and a scale of 100 the logits would be half a unit off."""
    draw = torch.Generator().manual_seed(5)
    image, text = (
        torch.nn.functional.normalize(torch.randn(16, 8, generator=draw), dim=-1).bfloat16() for _ in range(2)
    )
    objective = Contrastive(Clip(CONFIG), ContrastiveConfig(), ONE_DEVICE)
    expected = float(contrastive_loss(100 * image.double() @ text.double().T))
    with torch.autocast("cpu", torch.bfloat16):
        found = objective._of_global_batch(image, text, torch.tensor([100.0]))
    assert float(found["loss"]) == pytest.approx(expected, rel=1e-5)
    assert float(found["logit_scale"]) == 100.0
