"""May a run go on from a checkpoint: who consented to a change, and until when; what was replaced."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from data_pipeline.errors import ConfigError, DataError
from pretrain.checkpoint.catalog import Saved, claim_attempt, committed
from pretrain.checkpoint.identity import identity
from pretrain.checkpoint.resume import check_resumed
from pretrain.config import RunConfig
from tests.pretrain.checkpoint.simulated import config_of, mesh_of, model_of, ranks_of, save

KNOWN = {"data.text_tokenizer": "a" * 64, "data.image_tokenizer": "b" * 12, "data.dataset": "c" * 64}


class Stream:
    """Data of which only the fingerprint is looked at."""

    def check(self, state: dict[str, Any]) -> None:
        if state["dataset"] != KNOWN["data.dataset"]:
            raise DataError("dataset: another")


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    """Step 4 of attempt 1."""
    root = tmp_path / "run" / "checkpoints"
    config = config_of(tmp_path / "run")
    state = {
        "identity": identity(config),
        "fingerprints": KNOWN,
        "stream": {"dataset": KNOWN["data.dataset"], "position": 64},
    }
    save(ranks_of(root, 1, attempt=1), 4, model_of(4), **state)
    return committed(root)[-1]


def resumed(saved: Saved, known: dict[str, str] | None = None, **changed: Any) -> dict[str, Any]:
    """What changes in a run whose settings `changed` (optim.lr as optim__lr) says."""
    config = config_of(Path(saved.folder).parent.parent)
    for name, value in changed.items():
        section, key = name.split("__")
        below = getattr(config, section).model_copy(update={key: value})
        config = config.model_copy(update={section: below})
    stream: Any = Stream()
    return check_resumed(saved, config, stream, mesh_of(), dict(KNOWN if known is None else known))


def claim(saved: Saved, number: int, **changes: Any) -> None:
    told = {name.replace("__", "."): value for name, value in changes.items()}
    assert claim_attempt(Path(saved.folder).parent, number, {"changes": told} if told else {}) == number


def test_nothing_changes_where_nothing_differs(saved: Saved) -> None:
    claim(saved, 2, optim__lr=0.5)
    assert resumed(saved) == {}


def test_consent_of_an_attempt_that_saved_nothing_holds_for_the_next_at_the_same_value(saved: Saved) -> None:
    claim(saved, 2, optim__lr=0.5, train__steps=48)
    claim(saved, 3)
    changed = {"optim.lr": {"from": 1e-3, "to": 0.5}}
    assert resumed(saved, optim__lr=0.5) == changed
    assert resumed(saved, optim__lr=0.5, train__steps=48) == changed | {"train.steps": {"from": 24, "to": 48}}
    with pytest.raises(ConfigError, match="optim.lr: 0.001 saved, 0.25 now"):
        resumed(saved, optim__lr=0.25)


def test_the_newest_word_on_a_setting_counts(saved: Saved) -> None:
    claim(saved, 2, optim__lr=0.5)
    claim(saved, 3, optim__lr=0.25)
    assert resumed(saved, optim__lr=0.25) == {"optim.lr": {"from": 1e-3, "to": 0.25}}
    with pytest.raises(ConfigError, match="optim.lr"):
        resumed(saved, optim__lr=0.5)


def test_consent_of_before_the_checkpoint_is_used_up(saved: Saved) -> None:
    claim(saved, 0, optim__lr=0.5)
    claim(saved, 1, optim__lr=0.5)
    with pytest.raises(ConfigError, match="add --change optim.lr=0.5"):
        resumed(saved, optim__lr=0.5)


@pytest.mark.parametrize("nonsense", [[], "optim.lr", 3, None])
def test_a_claim_that_says_something_else_is_no_consent(nonsense: Any, saved: Saved) -> None:
    claim_attempt(Path(saved.folder).parent, 2, {"changes": nonsense})
    with pytest.raises(ConfigError, match="optim.lr"):
        resumed(saved, optim__lr=0.5)


def test_consent_does_not_reach_what_cannot_be_changed(saved: Saved) -> None:
    claim(saved, 2, model__layers=3)
    with pytest.raises(ConfigError, match="model.layers: . saved, 3 now") as refusal:
        resumed(saved, model__layers=3)
    assert "--change" not in str(refusal.value)


def test_a_run_is_not_cut_to_fewer_steps_than_it_has_made(saved: Saved) -> None:
    for steps, fits in ((3, False), (4, True)):
        claim(saved, steps, train__steps=steps)
        if fits:
            assert resumed(saved, train__steps=steps)
        else:
            with pytest.raises(ConfigError, match="train.steps=3: .* is at step 4 already; use at least 4"):
                resumed(saved, train__steps=steps)


@pytest.mark.parametrize("name", ["data.text_tokenizer", "data.image_tokenizer"])
def test_what_was_replaced_is_refused_by_name(name: str, saved: Saved) -> None:
    with pytest.raises(ConfigError, match=f"was trained with another {name}; use the one"):
        resumed(saved, KNOWN | {name: "d" * 12})


def test_fingerprints_of_the_beginning_are_kept(saved: Saved) -> None:
    known = {key: value for key, value in KNOWN.items() if key != "data.image_tokenizer"}
    config: RunConfig = config_of(Path(saved.folder).parent.parent)
    stream: Any = Stream()
    check_resumed(saved, config, stream, mesh_of(), known)
    assert known == KNOWN


def test_weights_to_start_from_are_no_longer_read_by_a_run_that_began_without(saved: Saved) -> None:
    config = config_of(Path(saved.folder).parent.parent).model_copy(update={"initial": "elsewhere"})
    stream: Any = SimpleNamespace(check=lambda state: None)
    with pytest.raises(ConfigError, match="initial=elsewhere: .* belongs to a run without it"):
        check_resumed(saved, config, stream, mesh_of(), dict(KNOWN))


def test_a_run_of_an_earlier_version_with_weights_to_start_from_goes_on_again_and_again(tmp_path: Path) -> None:
    """Which weights it began with was not recorded: that is kept, and is no run that began without."""
    root, config = tmp_path / "run" / "checkpoints", config_of(tmp_path / "run")
    config = config.model_copy(update={"initial": "elsewhere"})
    stream: Any = SimpleNamespace(check=lambda state: None)
    state: dict[str, Any] = {"identity": identity(config), "stream": {"position": 64}}
    for step in (4, 8, 12):
        save(ranks_of(root, 1, attempt=step), step, model_of(step), **state)
        known = dict(KNOWN)
        check_resumed(committed(root)[-1], config, stream, mesh_of(), known)
        state |= {"fingerprints": known}


@pytest.mark.parametrize("nonsense", [["a"], {"initial": "aaaaaaaaaaaa@step x"}, {"data.text_tokenizer": 3}])
def test_fingerprints_that_are_none_are_damage(nonsense: Any, saved: Saved) -> None:
    root = Path(saved.folder).parent
    save(ranks_of(root, 1, attempt=2), 8, model_of(8), fingerprints=nonsense)
    with pytest.raises(DataError, match="state.json: fingerprints"):
        assert committed(root)[-1].state
