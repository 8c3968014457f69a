"""Typed, frozen configuration: one YAML file, one optional `base:`, dotted overrides last.

Imports neither torch nor ray: a login node reads configurations too.
"""

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import yaml

from data_pipeline.errors import ConfigError


class Settings(pydantic.BaseModel):
    """Base of every configuration section: frozen, unknown keys refused."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


S = TypeVar("S", bound=Settings)

_NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)  # ValueError: another encoding, a date that is none


def load_settings(schema: type[S], path: str | Path, overrides: Sequence[str] = ()) -> S:
    """Read `path`, lay it over its `base:`, apply `key.sub=value` overrides, and check it against `schema`.

    Raises ConfigError naming the file, the key, the value, the rule and, for an unknown key, the nearest known one.
    """
    tree = read_yaml(Path(path))
    for override in overrides:
        _apply_override(tree, override)
    return check_settings(schema, tree, str(path))


def check_settings(schema: type[S], tree: Mapping[str, Any], where: str) -> S:
    """Validate a plain tree against `schema`; `where` names its origin in the error."""
    try:
        return schema.model_validate(tree)
    except pydantic.ValidationError as error:
        lines = [_explain(schema, tree, problem) for problem in error.errors()]
        raise ConfigError(f"{where}: " + "\n  ".join(lines)) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The YAML mapping in `path`, laid over the file that its single-level `base:` names."""
    tree = _read_one(path)
    base_name = tree.pop("base", None)
    if base_name is None:
        return tree
    base = _read_one(path.parent / base_name)
    if "base" in base:
        raise ConfigError(f"{path}: base {base_name} has a base of its own; one level only, name the root file instead")
    return _merge(base, tree)


def resolved_json(settings: Settings) -> str:
    """Canonical JSON of the complete settings, defaults included."""
    return json.dumps(settings.model_dump(mode="json"), sort_keys=True, ensure_ascii=False)


def digest(settings: Settings) -> str:
    """First 16 hex digits of the sha256 of `resolved_json`."""
    return hashlib.sha256(resolved_json(settings).encode()).hexdigest()[:16]


def _read_one(path: Path) -> dict[str, Any]:
    try:
        if not path.is_file():
            raise ConfigError(
                f"{path}: no such configuration file; give the path of a YAML file, for example one in configs/"
            )
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}; give this user the right to read it") from None
    except _NOT_YAML as error:
        raise ConfigError(f"{path}: not YAML in UTF-8: {error}; mend the file, or save it as UTF-8") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds {type(tree).__name__}; a configuration is a mapping of keys to values")
    return tree


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`, section by section; a section of another `kind` replaces the base's whole."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        same_kind = (
            isinstance(below, dict) and isinstance(value, dict) and value.get("kind") in (None, below.get("kind"))
        )
        merged[key] = _merge(below, value) if same_kind and isinstance(below, dict) else value
    return merged


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r} has no value; write key=value, for example optim.lr=3e-4")
    *sections, leaf = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"override {override!r}: {section!r} is a value, not a section")
    try:
        value = yaml.safe_load(text)
    except _NOT_YAML as error:
        raise ConfigError(f"override {override!r}: the value is not YAML: {error}") from None
    tree[leaf] = _number(value)


def _number(value: Any) -> Any:
    """YAML 1.1 reads 3e-4 as text; a person means the number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _explain(schema: type[Settings], tree: Any, problem: Any) -> str:
    path = [str(part) for part in problem["loc"]]
    key = ".".join(path)
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(path[-1], sorted(field_names(schema)), n=1, cutoff=0.5)
        return f"{key}: unknown key" + (f"; did you mean {near[0]!r}?" if near else "; see the schema in config.py")
    if problem["type"] == "missing":
        return f"{key}: missing; this key has no default"
    message = problem["msg"].removeprefix("Value error, ")
    shown = problem.get("input")
    value = "" if isinstance(shown, dict) else f" = {shown!r}"
    return f"{key}{value}: {message}" if key else message


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections -> dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def field_names(schema: type[Settings]) -> set[str]:
    """Every key that `schema` or a section below it knows."""
    names: set[str] = set()
    stack: list[Any] = [schema]
    seen: set[Any] = set()
    while stack:
        item = stack.pop()
        if isinstance(item, type) and issubclass(item, Settings):
            if item not in seen:
                seen.add(item)
                names |= set(item.model_fields)
                stack += [field.annotation for field in item.model_fields.values()]
        else:
            stack += list(getattr(item, "__args__", ()))
    return names
