"""`train.keep_best`: every metric that a task yields, its direction, and refusals at configuration time."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import ConfigError
from data_pipeline.settings import check_settings
from pretrain.config import RunConfig
from pretrain.schema import TASK_SETTINGS
from pretrain.schema.common import MAIN
from pretrain.schema.saved import saved_run
from pretrain.schema.tasks import parsed
from tests.families import FAMILIES, batch_of, task_of

BESIDE = {"grad_norm", "lr"}  # what `train.Run.update` adds to a task's own


def tree_of(kind: str, best: str, steps: int = 9, **objective: Any) -> dict[str, Any]:
    model = TASK_SETTINGS[kind].trains[0].model_fields["kind"].default
    return {
        "run": "unused", "model": {"kind": model}, "task": {"kind": kind} | objective,
        "data": {"dataset": "d", "text_tokenizer": "v", "image_tokenizer": "t"},
        "train": {"steps": steps, "global_batch": 2, "zero_stage": 0, "keep_best": best}, "optim": {"lr": 1.0},
    }  # fmt: skip


def accepted(kind: str, best: str, steps: int = 9, **objective: Any) -> bool:
    try:
        check_settings(RunConfig, tree_of(kind, best, steps, **objective), "test")
    except ConfigError as error:
        assert "train.keep_best=" in str(error)
        return False
    return True


@pytest.mark.parametrize("name", FAMILIES)
def test_the_table_holds_exactly_what_the_task_yields(name: str) -> None:
    """By running every turn of the last step; a name that is new there must be given a direction in the schema."""
    config = FAMILIES[name].config()
    last = config.train.steps - 1
    task, batch, found = task_of(config), batch_of(config, 6) | {"step": torch.tensor(last)}, set()
    for turn, role in enumerate(task.turns(last)):
        prefix = "" if role == MAIN else f"{role}_"
        found |= {prefix + metric for metric in (*task(batch | {"turn": torch.tensor(turn)}), *BESIDE)}
    settings_given = config.task.model_dump(exclude={"kind"})
    assert found == {
        metric for metric in config.task.metrics if accepted(config.task.kind, f"min:{metric}", **settings_given)
    }


@pytest.mark.parametrize(
    ("best", "metric", "direction"),
    [
        ("loss", "loss", "min"), ("mlm_accuracy", "mlm_accuracy", "max"), ("rtd_recall", "rtd_recall", "max"),
        ("psnr", "psnr", "max"), ("min:psnr", "psnr", "min"), ("max:loss", "loss", "max"), ("lr", "lr", None),
        ("max:lr", "lr", "max"), ("", "", None), ("max:", "", "max"), ("avg:loss", "avg:loss", None),
    ],
)  # fmt: skip
def test_the_direction_is_the_metrics_own_or_the_one_that_is_given(best: str, metric: str, direction: Any) -> None:
    assert parsed(best) == (metric, direction)


@pytest.mark.parametrize(
    ("kind", "best", "told"),
    [
        ("rtd", "rtd_acuracy", "mlm_accuracy, rtd_loss, rtd_accuracy"),
        ("rtd", "psnr", "'rtd' yields no such metric"),
        ("rtd", "avg:loss", "min: or max: in front"),
        ("rtd", "max:", "no such metric"),
        ("contrastive", "loss ", "logit_scale"),
        ("contrastive", "Loss", "loss, grad_norm"),
        ("contrastive", "logit_scale", "min:logit_scale or max:logit_scale"),
        ("autoregressive", "step_s", "code_accuracy"),
        ("reconstruction", "discriminator_loss", "codes_used"),  # it begins behind the end of the run
    ],
)
def test_other_names_are_refused_with_the_known_ones(kind: str, best: str, told: str) -> None:
    with pytest.raises(ConfigError, match=f"train.keep_best={best!r}") as refused:
        check_settings(RunConfig, tree_of(kind, best), "test")
    assert told in str(refused.value)


def test_what_settings_switch_off_is_no_metric() -> None:
    assert accepted("mlm", "nsp_accuracy") and not accepted("mlm", "nsp_accuracy", nsp=False)
    begins = {"discriminator_start_step": 5}
    assert accepted("reconstruction", "min:discriminator_loss", **begins)
    assert not accepted("reconstruction", "min:discriminator_loss", steps=5, **begins)
    assert not accepted("reconstruction", "min:discriminator_loss", discriminator_weight=0.0, **begins)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(sorted(TASK_SETTINGS)), st.text(max_size=12) | st.sampled_from(["min:", "max:", "loss", ":loss"])
)
def test_any_text_is_a_known_metric_or_refused_in_a_line(kind: str, best: str) -> None:
    name, direction = parsed(best)
    assert accepted(kind, best) == (not best or (name in TASK_SETTINGS[kind].metrics and direction is not None))


def test_a_saved_run_that_kept_nothing_by_such_a_name_is_still_read() -> None:
    for best, now in (("no such metric", ""), ("lr", ""), ("loss", "loss"), ("mlm_accuracy", "mlm_accuracy")):
        assert saved_run(tree_of("rtd", best))["train"]["keep_best"] == now
    assert saved_run({"train": 3}) == {"train": 3}
