"""`tessera plan`: what it says of every recipe, what it refuses, and advice that can be checked by hand."""

import ast
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from data_pipeline.errors import ConfigError
from data_pipeline.settings import load_settings
from launchers.plan import trace
from launchers.plan.clusters import GPUS, Cluster, cluster_of
from launchers.plan.make import RunPlan, advise, as_json, candidates, first_limit, make_plan, stages_of, trace_step
from launchers.plan.show import memory_line, notes, show
from launchers.plan.textbook import transformer_flops
from pretrain.config import RunConfig
from pretrain.models import MODELS
from pretrain.schema.tasks import TASK_SETTINGS
from tests.launchers.plan.recipes import desk, recipes, run_of
from tests.launchers.test_cli import call, call_without_torch


def planned(recipe: str, *overrides: str, gpu: str = "h100", nodes: int = 1, per_node: int = 8) -> RunPlan:
    return make_plan(load_settings(RunConfig, recipe, overrides), cluster_of(gpu, nodes, per_node))


@pytest.fixture(autouse=True)
def _in_repository(repository: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", recipes())
def test_every_recipe_has_a_plan_with_memory_of_memory_and_an_error(recipe: str) -> None:
    plan = planned(recipe, per_node=2)
    best = advise(plan.config, plan.cluster, plan) if "/small/" in recipe else plan
    out = io.StringIO()
    show(plan, best, Console(file=out, width=160))
    assert " of 78.50 GiB, error at most " in out.getvalue()
    assert "Advice: " in out.getvalue() and "first limit" in out.getvalue()
    slow, usual, fast = (pace.step for pace in plan.paces)
    assert slow > usual > fast > 0
    assert 0 < plan.memory.error < plan.memory.used


@pytest.mark.slow
@pytest.mark.parametrize("micro", [None, 64])
def test_items_of_memory_have_a_name_each_and_sum_up_to_what_is_used(micro: int | None) -> None:
    plan = make_plan(run_of({"kind": "clip"}, global_batch=4096, micro_batch=micro), cluster_of("h100", 1, 8))
    names = [item.what for item in plan.memory.items]
    assert len(set(names)) == len(names)
    said = as_json(plan, None)["memory_bytes"]
    assert sum(said[name] for name in names) == pytest.approx(said["used"], abs=len(names))


@pytest.mark.slow
def test_the_command_prints_one_json_value_with_units(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = "configs/text_to_image/pai-painter-base.yaml"
    words = ("plan", recipe, "--nodes", "2", "--gpus-per-node", "8", "--gpu", "h100", "--json")
    assert call(monkeypatch, *words) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["parameters"] == 126_669_312
    memory = said["memory_bytes"]
    assert memory["margin"] == pytest.approx(memory["available"] - memory["used"] - memory["error"], abs=2)
    assert said["days"][1] == pytest.approx(200_000 * said["step_s"]["usual"] / 86_400)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpu", "h10"], "did you mean 'h100'?"),
        (["--gpu", "A100"], "a100-40, a100-80"),
        (["--nodes", "64"], "512 processes exceed train.global_batch=256"),
        (["--gpus-per-node", "3"], "global_batch=256 is not divisible by 3 ranks"),
        (["train.zero_stage=4"], "train.zero_stage"),
        (["--nodes", "0"], "greater than or equal to 1"),
    ],
)
def test_a_wrong_plan_is_one_clear_line_and_exit_code_64(words: list[str], said: str) -> None:
    done = call_without_torch("plan", "configs/text/bert-base.yaml", *words)
    assert done.returncode == 64
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_usable_batches_are_named_where_the_batch_does_not_divide() -> None:
    with pytest.raises(ConfigError, match=r"use 240 or 288"):
        planned("configs/text/bert-base.yaml", "train.micro_batch=6")


# ------------------------------------------------------------------------------------------- the advice

LARGE: dict[str, Any] = {"kind": "gpt", "layers": 8, "width": 8192, "heads": 64, "text_tokens": 32}
SHALLOW: dict[str, Any] = {"kind": "clip", "vision": {"layers": 2}, "text": {"layers": 2}}


@pytest.mark.slow
def test_the_advice_is_the_fastest_of_all_settings_with_a_margin() -> None:
    run, cluster = run_of({"kind": "gpt"}, global_batch=64), cluster_of("h100", 1, 8)
    best, every = advise(run, cluster), candidates(run, cluster, recompute=False)
    assert best is not None and len(every) == 4 * 4  # stages by divisors of 8
    roomy = [plan.paces[1].step for plan in every if plan.margin > 0]
    assert best.paces[1].step <= 1.01 * min(roomy)


@pytest.mark.slow
def test_a_model_too_large_for_a_device_is_sharded_and_one_too_large_for_all_is_told() -> None:
    run = run_of(LARGE, global_batch=8, zero_stage=0)
    cluster = cluster_of("a100-80", 1, 8)
    plan, best = make_plan(run, cluster), advise(run, cluster)
    assert "more than there is" in memory_line(plan)
    assert best is not None and best.config.train.zero_stage > 0 and best.margin > 0
    assert first_limit(plan, best) == "memory: see the advice"
    small = dataclasses.replace(cluster.device, memory=4e9)
    assert advise(run, dataclasses.replace(cluster, device=small)) is None


@pytest.mark.slow
def test_memory_within_the_error_of_what_there_is_is_called_open() -> None:
    plan = make_plan(run_of({"kind": "gpt"}), cluster_of("h100", 1, 8))
    tight = dataclasses.replace(GPUS["h100"], memory=plan.memory.used)
    assert "may or may not be enough" in memory_line(make_plan(plan.config, Cluster(tight, 1, 8, 400e9)))


@pytest.mark.slow
def test_computing_again_saves_activations_and_costs_a_forward_of_the_blocks() -> None:
    layers, width, length = 12, 768, 32 + 256 - 1
    runs = (run_of({"kind": "gpt"}, global_batch=64, recompute=recompute) for recompute in (False, True))
    plain, again = (make_plan(run, cluster_of("h100", 1, 8)) for run in runs)
    inputs = layers * plain.micro * length * width * 4  # all that is left of a block
    assert {item.what: item.bytes for item in again.memory.items}["layers"] == pytest.approx(inputs, rel=0.2)
    assert again.memory.used < plain.memory.used
    extra = transformer_flops(layers, width, 4 * width, length) / plain.sample_flops
    # the last products of a block are not computed again: nothing in its backward needs them
    assert 1 + 0.6 * extra < again.paces[1].products / plain.paces[1].products < 1 + extra


@pytest.mark.slow
def test_gradient_caching_trades_a_forward_for_activations_and_keeps_the_loss_of_the_whole_batch() -> None:
    whole, split = (
        make_plan(run_of({"kind": "clip"}, global_batch=4096, micro_batch=micro), cluster_of("h100", 1, 8))
        for micro in (512, 64)
    )
    assert split.memory.used < whole.memory.used / 2
    assert split.paces[1].products > whole.paces[1].products
    assert split.sent_per_rank == whole.sent_per_rank
    # both log-probabilities of the 4096 x 4096 logits, in float32, on every rank
    held = {item.what: item.bytes for item in whole.memory.items}
    assert held["loss"] == pytest.approx(2 * 4 * 4096**2, rel=0.2)  # and the embeddings of all


SENT = {  # bytes of a parameter that crosses in w bytes: reduced to all passes twice, gathered or scattered once
    0: lambda w: 2 * 4,
    1: lambda w: 2 * w + 4,
    2: lambda w: 2 * w + 4,
    3: lambda w: w + w,
}


@pytest.mark.parametrize("stage", SENT)
def test_a_step_sends_what_its_stage_says(stage: int) -> None:
    plan = make_plan(run_of({"kind": "gpt"}, zero_stage=stage), cluster_of("h100", 1, 8))
    crossing = sum(weight.numel * SENT[stage](2 if weight.low else 4) for weight in plan.traced.weights)
    assert plan.sent_per_rank == pytest.approx(crossing * 7 / 8)


def test_stage_3_gathers_again_in_the_backward_what_lies_further_back_than_the_reuse_distance() -> None:
    sizes = (LARGE | {"layers": 1, "width": 4096}, LARGE)
    small, large = (make_plan(run_of(size, zero_stage=3), cluster_of("h100", 1, 8)) for size in sizes)
    bytes_of = {t.what: t.bytes for t in small.transfers}
    assert bytes_of["weights, backward"] == 0
    bytes_of = {t.what: t.bytes for t in large.transfers}
    rest = bytes_of["weights, backward"] / bytes_of["weights, forward"]
    assert rest == pytest.approx(1 - 0.5e9 / large.parameters)


@pytest.mark.slow
def test_what_leaves_a_node_passes_its_network_and_a_slower_one_makes_slower_steps() -> None:
    run = run_of({"kind": "gpt"}, global_batch=64, zero_stage=3)
    inside, fast, slow = (
        make_plan(run, cluster_of("h100", nodes, 8 // nodes, gbits))
        for nodes, gbits in ((1, None), (2, None), (2, 1.0))
    )
    assert inside.sent_per_node == 0
    assert fast.sent_per_node == pytest.approx(fast.sent_per_rank)
    assert slow.paces[1].network * 0.7 == pytest.approx(slow.sent_per_rank / (1e9 / 8))
    assert slow.paces[1].step > fast.paces[1].step
    assert first_limit(slow, None).startswith("the network")


@pytest.mark.slow
def test_the_processes_of_a_desk_share_its_memory() -> None:
    run = run_of({"kind": "gpt"})
    assert make_plan(run, desk(2)).cluster.memory == make_plan(run, desk(1)).cluster.memory / 2


@pytest.mark.slow
def test_json_of_a_plan_without_a_way_out_has_no_advice() -> None:
    plan = make_plan(run_of({"kind": "gpt"}), cluster_of("h100", 1, 8))
    assert as_json(plan, None)["advice"] is None


# ------------------------------------------------------------------------------------------- the trace


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", [{"kind": "gpt", "layers": 2}, {"kind": "bert", "layers": 2}, SHALLOW])
def test_between_two_micro_batches_a_step_lies_on_their_line(model: dict[str, Any], precision: str) -> None:
    low, middle, high = (
        trace_step(run_of(model, global_batch=128, micro_batch=size, precision=precision), cluster_of("h100", 1, 2))
        for size in (2, 8, 32)
    )
    drawn = low.at(8, high)
    assert drawn.micro.flops == pytest.approx(middle.micro.flops)
    assert drawn.micro.kept == pytest.approx(middle.micro.kept, rel=1e-3)
    assert middle.micro.most <= 1.001 * drawn.micro.most
    assert drawn.micro.moved == pytest.approx(middle.micro.moved, rel=1e-3)


def test_a_plan_of_16384_ranks_traces_as_many_operations_as_one_of_8(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = []
    for nodes in (1, 2048):
        run = run_of(SHALLOW, global_batch=4 * 8 * nodes, micro_batch=2)
        called = []
        noted = trace.Recorder._noted
        monkeypatch.setattr(trace.Recorder, "_noted", lambda *words, n=noted, c=called: c.append(1) or n(*words))
        make_plan(run, cluster_of("h100", nodes, 8))
        monkeypatch.undo()
        counted.append(len(called))
    assert counted[0] == counted[1]


@pytest.mark.slow
def test_a_run_whose_discriminator_learns_later_says_so() -> None:
    weight = "task.discriminator_weight=0.8"
    later = (weight, "train.steps=40", "task.discriminator_start_step=20")
    assert "discriminator" in notes_of(planned("configs/small/vqgan.yaml", *later, per_node=1))
    never = (weight, "train.steps=40", "task.discriminator_start_step=40")
    assert "discriminator" not in notes_of(planned("configs/small/vqgan.yaml", *never, per_node=1))


def notes_of(plan: RunPlan) -> str:
    return "\n".join(notes(plan, None))


def test_stages_are_those_that_the_schema_accepts() -> None:
    assert stages_of(run_of({"kind": "gpt"})) == [0, 1, 2, 3]
    assert stages_of(run_of({"kind": "vqgan"})) == [0]


def test_the_planner_knows_no_family(repository: Path) -> None:
    files = [*(repository / "launchers" / "plan").glob("*.py"), repository / "pretrain" / "inputs" / "shapes.py"]
    names = {*MODELS, *TASK_SETTINGS}
    for path in files:
        constants = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        assert not names & constants, path
