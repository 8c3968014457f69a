"""The average of weights (`optim.ema`): its rate, its cost in a plan, commands that choose it; see test_freezing."""

import json
from pathlib import Path

import pytest
import torch

from data_pipeline.errors import ConfigError
from data_pipeline.settings import check_settings
from launchers.plan.clusters import cluster_of
from launchers.plan.make import make_plan
from pretrain.checkpoint.catalog import committed
from pretrain.checkpoint.layout import Slices
from pretrain.checkpoint.trained import load_trained, weights_of
from pretrain.config import OptimConfig
from pretrain.engine.schedule import ema_rate
from tests.families import PAIRS, Material
from tests.pretrain.commands import recipe, tessera


def test_the_rate_warms_up_to_its_value_as_in_tensorflow() -> None:
    assert [ema_rate(step, 0.5) for step in (0, 1, 8, 100)] == [0.1, 2 / 11, 0.5, 0.5]
    assert ema_rate(10**6, 0.9999) == 0.9999


@pytest.mark.parametrize("ema", [-0.1, 1.0, 1.5, float("nan")])
def test_a_decay_is_at_least_0_and_below_1(ema: float) -> None:
    with pytest.raises(ConfigError, match="ema"):
        check_settings(OptimConfig, {"lr": 1.0, "ema": ema}, "test")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_plan_counts_four_bytes_for_each_parameter_that_trains(stage: int) -> None:
    used = []
    for more in ({}, {"ema": 0.99}, {"ema": 0.99, "freeze": ["vision"]}):
        config = PAIRS["clip"].config(zero_stage=stage)
        optim = check_settings(OptimConfig, {"lr": 1e-3} | more, "test")
        plan = make_plan(config.model_copy(update={"optim": optim}), cluster_of("h100", 1, 2))
        share = 2 if stage else 1
        items = {item.what: item.bytes for item in plan.memory.items}
        assert items.get("average of the weights", 0) == (4 * plan.traced.trained / share if more else 0)
        used.append(plan.memory.used)
    assert used[2] < used[0] < used[1]


@pytest.mark.slow
@pytest.mark.real
def test_evaluate_and_export_take_the_average_where_asked(material: Material, tmp_path: Path) -> None:
    """And refuse it where there is none: in a run without it, and in an export."""
    family, run, out = PAIRS["bert"], tmp_path / "run", tmp_path / "out"
    tree = family.run(material, run, steps=3, checkpoint_every_steps=3)
    tree["optim"] |= {"ema": 0.5, "freeze": ["embeddings"]}
    done = tessera("train", recipe(tree, tmp_path / "run.yaml"))
    assert done.returncode == 0, done.stdout[-3000:]
    (saved,) = committed(run / "checkpoints")
    slices, averages = Slices(saved.folder), weights_of(saved, ema=True)
    assert slices.kinds("model.nsp.weight") == ("param", "exp_avg", "exp_avg_sq", "ema")
    for name, weight in weights_of(saved).items():
        stood = "embeddings" in name
        assert slices.kinds(f"model.{name}")[1:] == (() if stood else ("exp_avg", "exp_avg_sq", "ema"))
        assert torch.equal(averages[name], weight) == stood, name
    done = tessera("checkpoint", "export", run, out, "--ema")
    assert done.returncode == 0, done.stdout[-3000:]
    assert json.loads((out / "config.json").read_text())["weights"] == "ema"
    model = load_trained(out).model
    assert all(torch.equal(tensor, averages[name]) for name, tensor in model.named_parameters())
    figures = {}
    for word, source in (("", run), ("--ema", run), ("", out)):
        done = tessera("evaluate", source, *([word] if word else []), "--json")
        assert done.returncode == 0, done.stdout[-3000:]
        figures[word, source] = json.loads(done.stdout.strip().splitlines()[-1])
    assert figures["--ema", run].pop("weights") == "ema"
    assert figures["--ema", run]["mlm_loss"] == figures["", out]["mlm_loss"] != figures["", run]["mlm_loss"]
    with pytest.raises(ConfigError, match="one set of weights; leave --ema out"):
        load_trained(out, ema=True)
    universal = tessera("checkpoint", "export", run, tmp_path / "universal", "--format", "deepspeed")
    assert universal.returncode == 0, universal.stdout[-3000:]
