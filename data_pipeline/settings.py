"""Typed, frozen configuration: one YAML file, one optional `base:`, dotted overrides last.

The type of the field decides how an override is read: a text field takes the text as written, even empty; a number has
decimal digits; only lists, mappings, `true`, `false` and `null` are parsed as YAML. Imports neither torch nor ray, as
login nodes read configurations too.
"""

import datetime
import difflib
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_origin

import pydantic
import yaml

from data_pipeline.errors import ConfigError


class Settings(pydantic.BaseModel):
    """Base of every configuration section: frozen; refuses unknown keys, infinity and NaN."""

    renamed: ClassVar[Mapping[str, str]] = {}
    """Dotted keys of earlier versions -> their present names; set by the class of a whole configuration."""
    added: ClassVar[frozenset[str]] = frozenset()
    """Fields newer than recorded digests: at their default they do not enter the digest."""
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)


def expand_home(text: str) -> str:
    """Expand `~` and `~user` at the beginning of a path, or of each path joined by `::`."""
    parts = [os.path.expanduser(part) for part in text.split("::")]
    if unknown := next((part for part in parts if part.startswith("~")), None):
        raise ValueError(
            f"home folder {unknown.partition('/')[0]} does not exist; write an absolute path, or ./{unknown}"
        )
    return "::".join(parts)


def _named(text: str) -> str:
    if not text:
        raise ValueError("empty; set a file, a folder or an address")
    return expand_home(text)


Location = Annotated[str, pydantic.AfterValidator(_named)]
"""A path or an address; `~` is the user's home."""
OptionalLocation = Annotated[Location | None, pydantic.BeforeValidator(lambda given: None if given == "" else given)]
"""A Location or None; empty text means None."""


def local_path(location: str) -> Path | None:
    """Return the path of a location, without a dataset's version; None for an address or a pattern of paths."""
    if "://" in location or "::" in location or any(letter in location for letter in "*?[{"):
        return None
    path = Path(location)
    name, at, version = path.name.rpartition("@")
    of_version = bool(at and name) and set(version) <= set("0123456789abcdef")
    return path.with_name(name) if of_version and not path.exists() else path


S = TypeVar("S", bound=Settings)

MAX_SEED = 2**64 - 1
Seed = Annotated[int, pydantic.Field(ge=0, le=MAX_SEED)]
"""Random generators have keys of 64 bits."""

_DECIMAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)  # ValueError: another encoding, an invalid date


def load_settings(schema: type[S], path: str | Path, overrides: Sequence[str] = ()) -> S:
    """Read `path`, merge it over its `base:`, apply `key.sub=value` overrides, and check it against `schema`.

    Raises ConfigError naming the file, the key, the value, the rule and, for an unknown key, the nearest known one.
    """
    return override_settings(schema, read_yaml(Path(path)), overrides, str(path))


def override_settings(schema: type[S], tree: dict[str, Any], overrides: Sequence[str], where: str) -> S:
    """Apply `key.sub=value` overrides to `tree`, in place, and check it against `schema`; `where` names its origin."""
    for override in overrides:
        _apply_override(schema, tree, override)
    return check_settings(schema, tree, where)


def check_settings(schema: type[S], tree: Mapping[str, Any], where: str) -> S:
    """Validate a plain tree against `schema`; `where` names its origin in the error."""
    try:
        return schema.model_validate(tree)
    except pydantic.ValidationError as error:
        lines = [_explain(schema, tree, problem) for problem in error.errors()]
        raise ConfigError(f"{where}: " + "\n  ".join(lines)) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Read the YAML mapping in `path`, merged over the file that its single-level `base:` names."""
    tree = _read_one(path)
    base_name = tree.pop("base", None)
    if base_name is None:
        return tree
    if not isinstance(base_name, str) or not base_name or "\0" in base_name:
        raise ConfigError(f"{path}: base = {base_name!r}: not a file name; quote the name of a file in the same folder")
    base = _read_one(path.parent / base_name)
    if "base" in base:
        raise ConfigError(
            f"{path}: base {base_name} has a base itself; only one level is allowed, use the root file as base"
        )
    return _merge(base, tree)


def resolved_json(settings: Settings) -> str:
    """Return canonical JSON of the complete settings, defaults included."""
    return _canonical(settings.model_dump(mode="json"))


def digest(settings: Settings) -> str:
    """Return the first 16 hex digits of the sha256 of `resolved_json` without fields of `added` at their default."""
    tree = _without_unset(settings, settings.model_dump(mode="json"))
    return hashlib.sha256(_canonical(tree).encode()).hexdigest()[:16]


def _without_unset(value: Any, tree: Any) -> Any:
    """Return `tree`, the dump of `value`, without the fields of `added` that have their default, at every depth."""
    if isinstance(value, Settings):
        fields = type(value).model_fields
        unset = {name for name in value.added if getattr(value, name) == fields[name].default}
        return {key: _without_unset(getattr(value, key, None), tree[key]) for key in tree if key not in unset}
    if isinstance(value, Mapping):
        return {key: _without_unset(below, tree[key]) for key, below in value.items()}
    if isinstance(value, list | tuple):
        return [_without_unset(below, dumped) for below, dumped in zip(value, tree, strict=True)]
    return tree


def _canonical(tree: Any) -> str:
    return json.dumps(tree, sort_keys=True, ensure_ascii=False)


def _read_one(path: Path) -> dict[str, Any]:
    try:
        if not path.is_file():
            raise ConfigError(
                f"{path}: no such configuration file; give the path of a YAML file, for example one in configs/"
            )
        tree = _with_whole_letters(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}; grant this user read access") from None
    except _NOT_YAML as error:
        raise ConfigError(f"{path}: not YAML in UTF-8: {error}; correct the file, or save it as UTF-8") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds {type(tree).__name__}; a configuration must map keys to values")
    return tree


def _with_whole_letters(tree: Any) -> Any:
    """Join surrogate pairs of JSON escapes (\\uD83D\\uDE00) into one character. Raises ValueError for half a pair."""
    if isinstance(tree, str):
        return tree if tree.isascii() else tree.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
    if isinstance(tree, list):
        return [_with_whole_letters(value) for value in tree]
    if isinstance(tree, dict):
        return {_with_whole_letters(key): _with_whole_letters(value) for key, value in tree.items()}
    return tree


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Merge `over` into `base`, section by section; a section of another `kind` replaces that of `base` entirely."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        same_kind = (
            isinstance(below, dict) and isinstance(value, dict) and value.get("kind") in (None, below.get("kind"))
        )
        merged[key] = _merge(below, value) if same_kind and isinstance(below, dict) else value
    return merged


# ------------------------------------------------------------------------------------------------ overrides


def _apply_override(schema: type[Settings], tree: dict[str, Any], override: str) -> None:
    """Put `key.sub=value` into `tree`. Raises ConfigError for text that is not an override or not UTF-8."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r} has no value; write key=value, for example optim.lr=3e-4")
    if "\0" in override or override.encode("utf-8", "replace").decode() != override:
        raise ConfigError(f"override {override!r} is not UTF-8; type the value again")
    *sections, leaf = key.split(".")
    kinds: list[Any] = [schema]
    for section in sections:
        kinds = _kinds_below(kinds, tree, section)
        if tree.get(section) is None:
            tree[section] = {}
        tree = tree[section]
        if not isinstance(tree, dict):
            raise ConfigError(f"override {override!r}: {section!r} is a value, not a section")
    if leaf == "kind" and sections:
        _check_kind(kinds, tree, ".".join(sections), text)
    try:
        tree[leaf] = _read_value(text, _kinds_below(kinds, tree, leaf))
    except _Grouped:
        raise ConfigError(f"override {override!r}: write the number without underscores") from None
    except _NOT_YAML as error:
        raise ConfigError(f"override {override!r}: the value is not YAML: {error}") from None


def _check_kind(kinds: Sequence[Any], tree: Mapping[str, Any], section: str, kind: str) -> None:
    """Raise ConfigError when the file gives `section` another kind, with keys that `kind` does not have."""
    named = [each for each in kinds if "kind" in getattr(each, "model_fields", {})]
    chosen = [each for each in named if kind in get_args(each.model_fields["kind"].annotation)]
    foreign = [key for key in tree if key != "kind" and chosen and key not in chosen[0].model_fields]
    if foreign and tree.get("kind") not in (None, kind):
        raise ConfigError(
            f"override '{section}.kind={kind}': the file describes kind {tree['kind']!r}, and {kind!r} has no "
            f"{', '.join(foreign)}; start from a file of kind {kind!r}, or replace the section: "
            f"'{section}={{kind: {kind}, ...}}'"
        )


def _kinds_below(kinds: Sequence[Any], tree: Mapping[str, Any], key: str) -> list[Any]:
    """Return the types that `key` may have in a section of one of `kinds`; the section's own `kind` selects one."""
    found: list[Any] = []
    for kind in kinds:
        if kind is Any or get_origin(kind) is dict:
            found += _members(get_args(kind)[1] if get_args(kind) else Any)
        elif isinstance(kind, type) and issubclass(kind, Settings) and key in kind.model_fields:
            own = kind.model_fields.get("kind")
            if own is None or len(kinds) == 1 or tree.get("kind", own.default) in get_args(own.annotation):
                found += _members(kind.model_fields[key].annotation)
    return found


def _members(annotation: Any) -> Iterator[Any]:
    """Yield the types of a union, without their annotations."""
    if get_origin(annotation) is Annotated:
        yield from _members(get_args(annotation)[0])
    elif get_origin(annotation) in (None, Literal, tuple, list, dict):
        yield annotation
    else:
        for part in get_args(annotation):
            yield from _members(part)


class _Grouped(Exception):
    """The text is a number with underscores, such as 1_000."""


def _is_text(kind: Any) -> bool:
    return kind is str or (get_origin(kind) is Literal and all(isinstance(value, str) for value in get_args(kind)))


def _read_value(text: str, kinds: Sequence[Any]) -> Any:
    """Parse `text` for a field of one of `kinds`; the schema validates the value later."""
    numeric = any(kind in (int, float, Any) or (get_origin(kind) is Literal and not _is_text(kind)) for kind in kinds)
    if numeric and (number := _number(text)) is not None:
        return number
    mapping = text.lstrip().startswith("{") and any(get_origin(kind) is dict for kind in kinds)
    if any(map(_is_text, kinds)) and not mapping:
        return None if not text and type(None) in kinds else text
    if numeric and Any not in kinds and "_" in text and _number(text.replace("_", "")) is not None:
        raise _Grouped  # pydantic would accept it
    of_text = any(get_origin(kind) and all(map(_is_text, _elements(kind))) for kind in kinds)
    value = yaml.safe_load(text)
    if of_text and isinstance(value, list | dict):
        return yaml.load(text, yaml.BaseLoader)  # every scalar stays text
    if isinstance(value, bool) and not {bool, Any} & set(kinds):
        return text
    # YAML takes 1:30 and 0x10 for numbers and parses dates, which users do not mean: the schema refuses the text.
    return value if value is None or isinstance(value, bool | list | dict) else text


def _elements(kind: Any) -> list[Any]:
    """Return the types of the elements of a list or mapping."""
    parts = get_args(kind)[1:] if get_origin(kind) is dict else get_args(kind)
    return [member for part in parts if part is not Ellipsis for member in _members(part)]


def _number(text: str) -> int | float | None:
    """Parse a finite decimal number in the digits 0 to 9; None when `text` is not one."""
    text = text.strip(" ")
    if not _DECIMAL.fullmatch(text):
        return None
    if text.lstrip("+-").isdecimal():
        return int(text)
    return float(text) if math.isfinite(float(text)) else None


# --------------------------------------------------------------------------------------------------- errors


def _explain(schema: type[Settings], tree: Any, problem: Any) -> str:
    path = _path(tree, problem["loc"])
    key = ".".join(path)
    if problem["type"] == "extra_forbidden":
        if key in schema.renamed:
            return f"{key}: renamed to {schema.renamed[key]}; use that key"
        near = difflib.get_close_matches(path[-1], sorted(field_names(schema)), n=1, cutoff=0.5)
        known = (
            f"did you mean {near[0]!r}?" if near else f"known keys are {', '.join(_keys_beside(schema, tree, path))}"
        )
        return f"{key}: unknown key; {known}"
    if problem["type"] == "missing":
        return f"{key}: missing; this key has no default"
    message = problem["msg"].removeprefix("Value error, ")
    shown = problem.get("input")
    if problem["type"] == "string_type" and isinstance(shown, bool | int | float | datetime.date):
        message = f"YAML reads this as a {type(shown).__name__}, expected text; put it in quotation marks"
    value = "" if isinstance(shown, dict) else f" = {shown!r}"
    return f"{key}{value}: {message}" if key else message


def _keys_beside(schema: type[Settings], tree: Any, path: Sequence[str]) -> list[str]:
    """Return the keys of the section that holds the last key of `path`."""
    kinds: list[Any] = [schema]
    for section in path[:-1]:
        kinds = _kinds_below(kinds, tree, section) if isinstance(tree, Mapping) else _elements_of(kinds)
        tree = tree.get(section) if isinstance(tree, Mapping) else tree[int(section)]
    chosen = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Settings)]
    told = tree.get("kind") if isinstance(tree, Mapping) else None
    own = [kind for kind in chosen if "kind" in kind.model_fields and told == kind.model_fields["kind"].default]
    return sorted({name for kind in own or chosen for name in kind.model_fields})


def _elements_of(kinds: Sequence[Any]) -> list[Any]:
    return [member for kind in kinds for member in _elements(kind)]


def _path(tree: Any, place: Sequence[str | int]) -> list[str]:
    """Return the parts of a key as a user writes it, without the kinds that pydantic inserts (model.clip.vision)."""
    path = []
    for part in place:
        if isinstance(tree, Mapping) and part == tree.get("kind"):
            continue
        path.append(str(part))
        try:
            tree = tree[part]
        except (KeyError, IndexError, TypeError):
            tree = None
    return path


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested sections to dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def field_names(schema: type[Settings]) -> set[str]:
    """Return every key of `schema` and of the sections below it."""
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
