"""Public weight layouts as rules that map tensor names and transform tensors."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from data_pipeline.errors import DataError

State = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Rule:
    """One of our tensors and its names in the other layout.

    same: one tensor, unchanged. stack: ours is theirs concatenated along dimension 0.
    transpose: theirs is ours transposed. scalar: theirs has shape (), ours (1,).
    copies: each of theirs equals ours (tied weights); files may omit all but the first.
    """

    ours: str
    theirs: tuple[str, ...]
    form: Literal["same", "stack", "transpose", "scalar", "copies"] = "same"


def _as_is(config: Any, state: State) -> State:
    return state


@dataclasses.dataclass(frozen=True)
class HubConfig:
    """The config.json that transformers writes beside the weights of a layout, without token ids.

    write: our configuration -> its entries by subfolder, "" for the folder itself. fields: our field -> their entry in
    the first subfolder; empty when the file does not determine our configuration, which then cannot be imported.
    defaults: of transformers, for missing entries. further: entries by subfolder -> our fields that need several.
    no_effect: further entries that say nothing about what the model computes.
    """

    write: Callable[[Any], dict[str, dict[str, Any]]]
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    parts: tuple[str, ...] = ("",)
    further: Callable[[Mapping[str, Mapping[str, Any]]], dict[str, Any]] = lambda trees: {}
    no_effect: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True)
class PublicLayout:
    """kind: of the model configuration; rules: configuration -> all rules; ignored: suffixes of non-weight keys.

    fixed: settings that the layout's programs hard-code, so that its files do not contain them.
    derived: settings that its programs compute from the shapes of the exported tensors.
    hub: the config.json of a layout of transformers.
    unpack, pack: transformations that rules cannot express, of their state before import and after export.
    """

    kind: str
    rules: Callable[[Any], list[Rule]]
    ignored: tuple[str, ...] = ()
    unpack: Callable[[Any, State], State] = _as_is
    pack: Callable[[Any, State], State] = _as_is
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    derived: Mapping[str, Callable[[Any], Any]] = dataclasses.field(default_factory=dict)
    hub: HubConfig | None = None


def import_rule(rule: Rule, state: Mapping[str, Tensor]) -> Tensor:
    first = state[rule.theirs[0]]
    if rule.form == "stack":
        return torch.cat([state[name] for name in rule.theirs])
    if rule.form == "transpose":
        return first.T.contiguous()
    if rule.form == "scalar":
        return first.reshape(1)
    for name in rule.theirs[1:]:
        if name in state and not torch.equal(state[name], first):
            raise DataError(
                f"{name} differs from {rule.theirs[0]}; tessera shares one tensor, import tied weights only"
            )
    return first.clone()


def export_rule(rule: Rule, tensor: Tensor) -> State:
    if rule.form == "stack":
        parts = tensor.chunk(len(rule.theirs))
        return {name: part.clone() for name, part in zip(rule.theirs, parts, strict=True)}
    if rule.form == "transpose":
        return {rule.theirs[0]: tensor.T.contiguous()}
    if rule.form == "scalar":
        return {rule.theirs[0]: tensor.reshape(()).clone()}
    return {name: tensor.clone() for name in rule.theirs}


def affine(ours: str, *theirs: str, form: Literal["same", "stack"] = "same") -> list[Rule]:
    """Return the rules of a weight and a bias."""
    return [Rule(f"{ours}.{part}", tuple(f"{name}.{part}" for name in theirs), form) for part in ("weight", "bias")]


def copies(ours: str, *theirs: str) -> Rule:
    return Rule(ours, theirs, "copies")


def without(prefix: str) -> Callable[[Any, State], State]:
    """Return an `unpack` that drops keys with this prefix, which belong to another model in the same file."""
    return lambda config, state: {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}
