"""Conversion between public weight layouts and ours by rules over names, without the other side's model code.

A layout is the complete list of rules for one configuration, so that missing and unknown keys are named. LAYOUTS
collects the layouts of all model families, one file each.
"""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from data_pipeline.errors import ConfigError, DataError
from pretrain.interchange import clip, encoders, gpt, vit, vqgan
from pretrain.interchange.rules import PublicLayout, Rule, State, export_rule, import_rule

LAYOUTS: dict[str, PublicLayout] = clip.LAYOUTS | encoders.LAYOUTS | gpt.LAYOUTS | vqgan.LAYOUTS | vit.LAYOUTS


def import_state(layout: str, config: Any, state: Mapping[str, Tensor]) -> State:
    """Weights in `layout` -> our state dict. Raises DataError naming missing, unknown and contradicting keys."""
    rules = _rules(layout, config)
    state = LAYOUTS[layout].unpack(config, dict(state))
    state = {key: value for key, value in state.items() if not key.endswith(LAYOUTS[layout].ignored or ("\0",))}
    known = {name for rule in rules for name in rule.theirs}
    needed = {name for rule in rules for name in (rule.theirs[:1] if rule.form == "copies" else rule.theirs)}
    _refuse(layout, needed - state.keys(), state.keys() - known)
    return {rule.ours: import_rule(rule, state) for rule in rules}


def export_state(layout: str, config: Any, state: Mapping[str, Tensor]) -> State:
    """Our state dict -> weights in `layout`, without shared storage. Raises DataError naming the keys that differ."""
    rules = _rules(layout, config)
    ours = {rule.ours for rule in rules}
    _refuse(layout, ours - state.keys(), state.keys() - ours)
    exported: State = {}
    for rule in rules:
        exported |= export_rule(rule, state[rule.ours].detach())
    return LAYOUTS[layout].pack(config, exported)


def _layout_of(layout: str, config: Any) -> PublicLayout:
    """Return the layout. Raises DataError for an unknown name, ConfigError for a layout of another family."""
    if layout not in LAYOUTS:
        raise DataError(f"layout {layout!r} is unknown; use one of {', '.join(sorted(LAYOUTS))}")
    if LAYOUTS[layout].kind != config.kind:
        fitting = ", ".join(sorted(name for name, known in LAYOUTS.items() if known.kind == config.kind))
        raise ConfigError(
            f"layout {layout!r} is for {LAYOUTS[layout].kind}, and the model is of kind {config.kind}; use {fitting}"
        )
    return LAYOUTS[layout]


def _rules(layout: str, config: Any) -> list[Rule]:
    known = _layout_of(layout, config)
    _check_settings(layout, config, known.fixed)
    return known.rules(config)


def check_derived(layout: str, config: Any) -> None:
    """Raise DataError for a setting that the layout's programs would derive differently from an exported file."""
    wanted = {name: value(config) for name, value in _layout_of(layout, config).derived.items()}
    _check_settings(layout, config, wanted)


def _check_settings(layout: str, config: Any, wanted: Mapping[str, Any]) -> None:
    for name, value in wanted.items():
        has = functools.reduce(getattr, name.split("."), config)
        if has != value:
            raise DataError(
                f"programs of layout {layout!r} have {name}={value}, the configuration has {name}={has}: the same "
                "weights compute different results there; use --format tessera, or train with that value"
            )


def _refuse(layout: str, missing: set[str], unknown: set[str]) -> None:
    found = [f"{len(keys)} {what}: {_few(keys)}" for what, keys in (("missing", missing), ("unknown", unknown)) if keys]
    if found:
        raise DataError(
            f"the weights are not a {layout} of this configuration ({'; '.join(found)}); "
            "check its layers, widths and vocabulary, or use another layout"
        )


def _few(keys: Iterable[str]) -> str:
    names = sorted(keys)
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
