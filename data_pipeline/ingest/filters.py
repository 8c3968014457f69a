"""Row filters written as expressions in the configuration: `width >= 256 and aspect < 3`, `nsfw < 0.5`.

The grammar is a subset of Python: comparisons, and / or / not, + - * / // %, numbers, strings, lists
(`label in ["cat"]`), and the functions below. Anything else is rejected, and no code is executed. A row passes when the
condition is true. A missing or null value, a type mismatch or an arithmetic error (1 / 0, min([])) makes it false.
"""

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

from data_pipeline.errors import ConfigError

IMAGE_NAMES = frozenset({"width", "height", "aspect", "area", "bytes"})
TEXT_NAMES = frozenset({"caption", "captions", "chars", "key"})

_BINARY: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.In: lambda value, container: value in container,
    ast.NotIn: lambda value, container: value not in container,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {"min": min, "max": max, "abs": abs, "len": len, "lower": str.lower}
_LONGEST = 1000

Value = Callable[[Mapping[str, Any]], Any]


class Condition:
    """One compiled condition. names: the names it uses. Raises ConfigError naming `where` for unsupported syntax."""

    def __init__(self, text: str, where: str) -> None:
        self.text = text
        self._where = where
        self.names: set[str] = set()
        if len(text) > _LONGEST:
            raise ConfigError(f"{where}: {len(text)} characters; a condition has at most {_LONGEST}, split it into two")
        try:
            self._value = self._compile(ast.parse(text.strip(), mode="eval").body)
        except (SyntaxError, ValueError, RecursionError) as error:
            raise ConfigError(f"{where}={text!r}: not a condition ({error}); write one such as width >= 256") from None

    def why_not(self, values: Mapping[str, Any]) -> str:
        """Return why `values` fail the condition (the condition and its values), or an empty string if they pass."""
        try:
            if self._value(values):
                return ""
            problem = ""
        except (_Missing, TypeError, ValueError, ArithmeticError) as error:
            problem = f" ({error})"
        shown = ", ".join(f"{name}={values.get(name)!r:.60}" for name in sorted(self.names))
        return f"{self.text}: {shown}{problem}"

    def _compile(self, node: ast.AST) -> Value:
        if isinstance(node, ast.Constant) and isinstance(node.value, str | int | float):
            constant = node.value
            return lambda values: constant
        if isinstance(node, ast.Name):
            name = node.id
            self.names.add(name)
            return lambda values: _look_up(values, name)
        if isinstance(node, ast.BoolOp):
            return self._boolean(node)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
            inner, apply = self._compile(node.operand), operator.not_ if isinstance(node.op, ast.Not) else operator.neg
            return lambda values: apply(inner(values))
        if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
            return self._binary(node.op, self._compile(node.left), self._compile(node.right))
        if isinstance(node, ast.Compare) and all(type(op) in _BINARY for op in node.ops):
            return self._comparison(node)
        if isinstance(node, ast.List | ast.Tuple):
            items = [self._compile(item) for item in node.elts]
            return lambda values: [item(values) for item in items]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
            return self._call(node.func.id, [self._compile(argument) for argument in node.args])
        raise ConfigError(
            f"{self._where}={self.text!r}: {ast.unparse(node)!r} is not supported; use comparisons, and, or, not, "
            f"arithmetic, numbers, strings, lists and {', '.join(sorted(_FUNCTIONS))}"
        )

    def _boolean(self, node: ast.BoolOp) -> Value:
        parts = [self._compile(part) for part in node.values]
        every = all if isinstance(node.op, ast.And) else any
        return lambda values: every(part(values) for part in parts)

    def _binary(self, op: ast.AST, left: Value, right: Value) -> Value:
        apply = _BINARY[type(op)]
        return lambda values: apply(*_alike(left(values), right(values)))

    def _comparison(self, node: ast.Compare) -> Value:
        parts = [self._compile(part) for part in (node.left, *node.comparators)]
        links = [self._binary(op, left, right) for op, left, right in zip(node.ops, parts[:-1], parts[1:], strict=True)]
        return lambda values: all(link(values) for link in links)

    def _call(self, name: str, arguments: list[Value]) -> Value:
        if name not in _FUNCTIONS:
            raise ConfigError(f"{self._where}: {name}() is unknown; use {', '.join(sorted(_FUNCTIONS))}")
        function = _FUNCTIONS[name]
        return lambda values: function(*(argument(values) for argument in arguments))


class _Missing(Exception):
    """Raised for a name without a value."""


def _look_up(values: Mapping[str, Any], name: str) -> Any:
    value = values.get(name)
    if value is None:
        raise _Missing(f"no {name}")
    return value


def _alike(left: Any, right: Any) -> tuple[Any, Any]:
    """Convert a numeric string that meets a number to a number, since csv has only strings."""
    if isinstance(left, str) and isinstance(right, int | float):
        return _number(left), right
    if isinstance(right, str) and isinstance(left, int | float):
        return left, _number(right)
    return left, right


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


class Filters:
    """All conditions of a build, split into those that need the decoded image and those that do not."""

    def __init__(self, filters: Mapping[str, str]) -> None:
        self._all = {name: Condition(text, f"filters.{name}") for name, text in filters.items()}

    @property
    def names(self) -> set[str]:
        """All names used by the conditions."""
        return {name for condition in self._all.values() for name in condition.names}

    def before(self, values: Mapping[str, Any]) -> tuple[str, str]:
        """Return (name, why) of the first failed condition on columns and captions only; empty strings if all pass."""
        return self._first(values, with_image=False)

    def after(self, values: Mapping[str, Any]) -> tuple[str, str]:
        """Like `before`, for the conditions that use the image."""
        return self._first(values, with_image=True)

    def _first(self, values: Mapping[str, Any], with_image: bool) -> tuple[str, str]:
        for name, condition in self._all.items():
            if bool(condition.names & IMAGE_NAMES) == with_image and (why := condition.why_not(values)):
                return name, why
        return "", ""
