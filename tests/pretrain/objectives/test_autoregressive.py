"""Cross-entropy of codes against a loop."""

import math

import pytest
import torch

from pretrain.config import AutoregressiveConfig, GptConfig
from pretrain.models.gpt import Gpt
from pretrain.objectives.autoregressive import Autoregressive, code_loss
from pretrain.objectives.collectives import ONE_DEVICE


def test_code_loss_equals_a_loop():
    logits, codes = torch.randn(2, 3, 5), torch.randint(0, 5, (2, 3))
    total = 0.0
    for row in range(2):
        for place in range(3):
            scores = [math.exp(value) for value in logits[row, place].tolist()]
            total -= math.log(scores[codes[row, place]] / sum(scores))
    assert float(code_loss(logits, codes)) == pytest.approx(total / 6, rel=1e-5)


def test_metrics_are_detached_and_the_loss_reaches_every_parameter():
    config = GptConfig(text_vocab=7, image_vocab=5, text_tokens=3, image_tokens=4, layers=1, width=8, heads=2)
    objective = Autoregressive(Gpt(config), AutoregressiveConfig(), ONE_DEVICE)
    named = objective({"text": torch.randint(0, 7, (2, 3)), "codes": torch.randint(0, 5, (2, 4))})
    named["loss"].backward()
    assert not named["code_accuracy"].requires_grad
    assert all(parameter.grad is not None for parameter in objective.parameters())
