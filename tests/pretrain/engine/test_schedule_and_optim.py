"""Learning rates against tables, torch's schedulers and transformers' formulas written as loops; groups by name."""

import math
import re

import pytest
import torch
from torch import nn

from data_pipeline.errors import ConfigError
from data_pipeline.settings import check_settings
from pretrain.config import OptimConfig
from pretrain.engine.optim import build_optimizer, check_names, parameter_groups
from pretrain.engine.schedule import learning_rate
from pretrain.models import MODELS
from pretrain.schema.encoders import ElectraConfig
from pretrain.schema.tasks import RtdConfig
from pretrain.tasks import TASKS
from pretrain.tasks.collectives import ONE_DEVICE
from tests.families import PAIRS, task_of
from tests.pretrain.plain import Plain


def optim(**tree: object) -> OptimConfig:
    return check_settings(OptimConfig, {"lr": 1.0} | tree, "test")


@pytest.mark.parametrize(
    ("tree", "steps", "expected"),
    [
        ({"schedule": "constant"}, 4, [1, 1, 1, 1]),
        ({"schedule": "constant", "warmup_steps": 4}, 6, [0.25, 0.5, 0.75, 1, 1, 1]),
        ({"schedule": "linear"}, 4, [1, 0.75, 0.5, 0.25]),
        ({"schedule": "linear", "warmup_steps": 2, "final_lr_fraction": 0.5}, 4, [0.5, 1, 1, 0.75]),
        ({"schedule": "polynomial", "power": 2.0}, 4, [1, 0.5625, 0.25, 0.0625]),
        ({"schedule": "polynomial", "power": 1.0}, 4, [1, 0.75, 0.5, 0.25]),
        ({"schedule": "cosine"}, 4, [1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125)]),
        ({"schedule": "cosine", "lr": 10.0, "final_lr_fraction": 0.1}, 2, [10, 5.5]),
    ],
)
def test_the_rate_of_each_step_is_the_table_s(tree: dict[str, object], steps: int, expected: list[float]) -> None:
    assert [learning_rate(step, steps, optim(**tree)) for step in range(steps)] == pytest.approx(expected)


def torch_rates(kind: str, steps: int, lr: float, final: float) -> list[float]:
    """What torch's own schedulers set, step after step."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    schedulers = torch.optim.lr_scheduler
    scheduler = {
        "cosine": lambda: schedulers.CosineAnnealingLR(optimizer, steps, eta_min=final * lr),
        "linear": lambda: schedulers.LinearLR(optimizer, 1.0, final, steps),
        "polynomial": lambda: schedulers.PolynomialLR(optimizer, steps, power=3.0),
    }[kind]()
    rates = []
    for _ in range(steps):
        rates.append(float(scheduler.get_last_lr()[0]))
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(("kind", "final"), [("cosine", 0.0), ("cosine", 0.2), ("linear", 0.1), ("polynomial", 0.0)])
def test_the_rates_are_those_of_torch_s_schedulers(kind: str, final: float) -> None:
    config = optim(schedule=kind, lr=3e-4, final_lr_fraction=final, power=3.0)
    rates = [learning_rate(step, 50, config) for step in range(50)]
    assert rates == pytest.approx(torch_rates(kind, 50, 3e-4, final), abs=1e-12)


@pytest.mark.parametrize(
    ("step", "steps", "expected"), [(0, 4, 1 / 3), (2, 4, 1.0), (3, 4, 1.0), (3, 5, 1.0), (4, 5, 0.5 + 0.5 * 0.25)]
)
def test_the_first_step_behind_the_warm_up_has_the_whole_rate(step: int, steps: int, expected: float) -> None:
    config = optim(schedule="linear", warmup_steps=3, final_lr_fraction=0.25)
    assert learning_rate(step, steps, config) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "polynomial"])
def test_the_rate_rises_to_its_peak_and_never_rises_again(kind: str) -> None:
    config = optim(schedule=kind, warmup_steps=7)
    rates = [learning_rate(step, 40, config) for step in range(40)]
    assert rates[:7] == sorted(rates[:7]) and rates[6] == rates[7] == 1.0
    assert rates[7:] == sorted(rates[7:], reverse=True)
    assert all(rate > 0 for rate in rates)


VECTORS = ("linear.bias", "norm.weight", "norm.bias")


class Net(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.norm = nn.LayerNorm(4)
        self.table = nn.Embedding(5, 4)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


@pytest.mark.parametrize(
    ("no_decay", "decay", "spared"),
    [
        ([], ["linear.weight", "table.weight"], [*VECTORS]),
        (["table"], ["linear.weight"], [*VECTORS, "table.weight"]),
        (["^linear", r"table\.weight$"], [], ["linear.weight", *VECTORS, "table.weight"]),
    ],
)
def test_matrices_decay_unless_named_and_vectors_never(
    no_decay: list[str], decay: list[str], spared: list[str]
) -> None:
    groups = parameter_groups(Net(), optim(no_decay=no_decay, weight_decay=0.3))
    expected = [(names, rate) for names, rate in ((decay, 0.3), (spared, 0.0)) if names]
    assert [(group["names"], group["weight_decay"]) for group in groups] == expected


class Duel(Net):
    roles = ("main", "judge")

    def role_of(self, name: str) -> str:
        return "judge" if name.startswith("table") or name == "linear.bias" else "main"

    def turns(self, step: int) -> tuple[str, ...]:
        return self.roles


def test_each_role_has_groups_and_settings_of_its_own_and_the_rest_from_the_main_one() -> None:
    """What a role does not say is the main optimizer's."""
    config = optim(weight_decay=0.3, betas=[0.5, 0.9], roles={"judge": {"lr": 0.25, "schedule": "linear"}})
    rows = [(g["name"], g["role"], g["names"], g["lr"], g["weight_decay"]) for g in parameter_groups(Duel(), config)]
    assert rows == [
        ("decay", "main", ["linear.weight"], 1.0, 0.3),
        ("no_decay", "main", ["norm.weight", "norm.bias"], 1.0, 0.0),
        ("judge.decay", "judge", ["table.weight"], 0.25, 0.3),
        ("judge.no_decay", "judge", ["linear.bias"], 0.25, 0.0),
    ]
    assert config.of("judge").betas == (0.5, 0.9)
    assert [learning_rate(step, 4, config.of("judge")) for step in (0, 2)] == [0.25, 0.125]
    assert [learning_rate(step, 4, config.of("main")) for step in (0, 2)] == [1.0, 0.5]


def test_every_trainable_parameter_of_a_model_is_in_exactly_one_group() -> None:
    model = MODELS["electra"](ElectraConfig(vocab_size=50, context=8, layers=1, width=16, heads=2, embedding_width=8))
    task = TASKS["rtd"](model, RtdConfig(), ONE_DEVICE)
    names = [name for group in parameter_groups(task, optim()) for name in group["names"]]
    assert sorted(names) == sorted(name for name, _ in task.named_parameters())


def test_the_optimizer_moves_weights_as_the_formula_of_adamw_does() -> None:
    """Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2, in float64."""
    net = Net()
    config = optim(lr=0.1, betas=[0.9, 0.99], eps=1e-3, weight_decay=0.5)
    optimizer = build_optimizer(parameter_groups(net, config))
    weight, bias = net.linear.weight.detach().double().clone(), net.linear.bias.detach().double().clone()
    loss = net.linear(torch.ones(1, 3)).square().sum()
    loss.backward()
    optimizer.step()
    for before, parameter, decay in ((weight, net.linear.weight, 0.5), (bias, net.linear.bias, 0.0)):
        assert parameter.grad is not None
        grad = parameter.grad.double()
        moved = before - 0.1 * (grad / (grad.abs() + 1e-3)) - 0.1 * decay * before
        torch.testing.assert_close(parameter.detach().double(), moved, rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------- layer-wise decay of the rate

MAE_BASE = (
    0.023757264018058777, 0.03167635202407837, 0.04223513603210449, 0.056313514709472656, 0.07508468627929688,
    0.1001129150390625, 0.13348388671875, 0.177978515625, 0.2373046875, 0.31640625, 0.421875, 0.5625, 0.75, 1.0,
)  # fmt: skip
"""Multipliers of patch embedding, blocks 0 to 11 and head of ViT-B with a decay of 0.75, as mmselfsup's recipe of MAE
lists them (configs/benchmarks/classification/imagenet/vit-b-16-b1024-coslr-100e_in1k.py)."""


def rates_of(name: str, model: dict[str, object], decay: float) -> dict[str, float]:
    """The rate of every parameter, by the groups of the optimizer."""
    task = task_of(PAIRS[name].config(model))
    groups = parameter_groups(task, optim(layer_decay=decay))
    rates = {name: group["lr_scale"] for group in groups for name in group["names"]}
    assert rates.keys() == {name for name, _ in task.named_parameters()}
    assert len({group["name"] for group in groups}) == len(groups)
    return rates


def test_rates_by_layer_are_those_published_for_mae() -> None:
    vision = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 12, "heads": 2}
    rates = rates_of("clip", {"vision": vision}, 0.75)
    expected = {f"blocks.{layer}.": MAE_BASE[layer + 1] for layer in range(12)}
    expected |= dict.fromkeys(("patch.", "class_token", "positions", "norm_pre."), MAE_BASE[0])
    expected |= dict.fromkeys(("norm_post.", "project."), MAE_BASE[-1])
    for name, rate in rates.items():
        if name.startswith("model.vision."):
            own = [rate for start, rate in expected.items() if name.startswith(f"model.vision.{start}")]
            assert [rate] == pytest.approx(own, rel=1e-12), name
    assert rates["model.logit_scale"] == 1.0


LOWEST = re.compile(
    r"model\.(embed\.|embeddings\.|(generator|discriminator)\.project\.|text\.(word|positions)|"
    r"(vision\.)?(patch|class_token|positions|norm_pre))"
)
"""What lies below the blocks of a tower: embeddings, and what brings them to its width."""


@pytest.mark.parametrize("name", PAIRS)
def test_embeddings_lie_below_the_first_block_and_heads_above_the_last(name: str) -> None:
    family = PAIRS[name]
    if family.model["kind"] == "vqgan":
        with pytest.raises(ConfigError, match=r"optim.layer_decay=0.5: this model has no numbered blocks"):
            check_names(task_of(family.config()), optim(layer_decay=0.5))
        return
    layers = 2
    for at, rate in rates_of(name, family.dropping(0.0), 0.5).items():
        block = re.search(r"blocks\.(\d)\.", at)
        expected = 0.5 ** (layers - int(block[1])) if block else 0.5 ** (layers + 1) if LOWEST.match(at) else 1.0
        assert rate == expected, at


@pytest.mark.parametrize("decay", [0.0, -0.5, 1.5, math.nan])
def test_a_decay_by_layer_is_above_0_and_at_most_1(decay: float) -> None:
    with pytest.raises(ConfigError, match="layer_decay"):
        optim(layer_decay=decay)
