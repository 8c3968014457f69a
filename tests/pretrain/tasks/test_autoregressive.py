"""Cross-entropy of codes against a loop."""

import math

import pytest
import torch

from pretrain.models.gpt import Gpt
from pretrain.schema.gpt import GptConfig
from pretrain.schema.tasks import AutoregressiveConfig
from pretrain.tasks.autoregressive import Autoregressive, code_loss
from pretrain.tasks.collectives import ONE_DEVICE

CONFIG = GptConfig(text_vocab=7, image_vocab=5, text_tokens=3, image_tokens=4, layers=1, width=8, heads=2)


def test_code_loss_equals_a_loop():
    logits, codes = torch.randn(2, 3, 5), torch.randint(0, 5, (2, 3))
    total = 0.0
    for row in range(2):
        for place in range(3):
            scores = [math.exp(value) for value in logits[row, place].tolist()]
            total -= math.log(scores[codes[row, place]] / sum(scores))
    assert float(code_loss(logits, codes)) == pytest.approx(total / 6, rel=1e-5)


def test_metrics_are_detached_and_the_loss_reaches_every_parameter():
    objective = Autoregressive(Gpt(CONFIG), AutoregressiveConfig(), ONE_DEVICE)
    named = objective({"text": torch.randint(0, 7, (2, 3)), "codes": torch.randint(0, 5, (2, 4))})
    named["loss"].backward()
    assert not named["code_accuracy"].requires_grad
    assert all(parameter.grad is not None for parameter in objective.parameters())


def test_the_accuracy_is_the_share_of_codes_with_the_largest_logit() -> None:
    """Of 8 codes 3 are what the model says, 4 are smaller and 1 is larger."""
    torch.manual_seed(3)
    objective = Autoregressive(Gpt(CONFIG).eval(), AutoregressiveConfig(), ONE_DEVICE)
    text, logits = torch.randint(0, 7, (2, 3)), torch.zeros(2, 4, 5)
    said = torch.tensor([[0, 1, 2, 3], [4, 1, 2, 3]])
    codes = torch.tensor([[0, 1, 2, 2], [3, 0, 3, 0]])
    objective.model.forward = lambda *_: logits.scatter(2, said[..., None], 2.0)  # type: ignore[method-assign]
    found = objective({"text": text, "codes": codes})
    assert found["code_accuracy"].item() == pytest.approx(3 / 8)
    wrong = math.log(4 + math.exp(2.0))
    assert found["loss"].item() == pytest.approx((3 * (wrong - 2) + 5 * wrong) / 8, rel=1e-5)


def test_forward_needs_the_keys_that_it_declares() -> None:
    batch = {"text": torch.randint(0, 7, (2, 3)), "codes": torch.randint(0, 5, (2, 4)), "other": torch.zeros(2)}
    objective = Autoregressive(Gpt(CONFIG), AutoregressiveConfig(), ONE_DEVICE)
    assert objective({key: batch[key] for key in objective.keys}).keys() == {"loss", "code_accuracy"}
    for key in objective.keys:
        with pytest.raises(KeyError, match=key):
            objective({name: rows for name, rows in batch.items() if name != key})
