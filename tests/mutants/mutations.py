"""Mutants of a source file: cosmic-ray's operators and one of our own, at places that are drawn with a seed."""

import ast
import functools
import random
from collections.abc import Iterator
from dataclasses import dataclass

import parso
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator
from cosmic_ray.plugins import get_operator, operator_names

Place = tuple[int, int]
ARITHMETIC = {"Add", "Sub", "Mul", "Div", "FloorDiv", "Mod"}
BITWISE = {"RShift", "LShift", "BitOr", "BitAnd", "BitXor"}


class RemoveStatement(Operator):
    """Replace a call whose value nobody takes, an augmented assignment or a raise by `pass`."""

    def mutation_positions(self, node: parso.tree.NodeOrLeaf) -> Iterator[tuple[Place, Place]]:
        """Yield where such a statement starts and ends."""
        if node.type == "simple_stmt" and self._acts(node.children[0]):
            yield node.children[0].start_pos, node.children[0].end_pos

    def mutate(self, node: parso.tree.BaseNode, index: int) -> parso.tree.BaseNode:
        """Put `pass` where the statement stood."""
        first = node.children[0]
        node.children[0] = parso.python.tree.Keyword("pass", first.start_pos, first.get_first_leaf().prefix)
        return node

    @staticmethod
    def _acts(statement: parso.tree.NodeOrLeaf) -> bool:
        if statement.type in ("raise_stmt", "atom_expr"):
            return True
        operator = statement.children[1].get_code().strip() if statement.type == "expr_stmt" else "="
        return operator != "=" and operator.endswith("=") and ":" not in operator

    @classmethod
    def examples(cls) -> tuple[()]:
        """cosmic-ray asks every operator for examples of its own tests."""
        return ()


@dataclass(frozen=True)
class Mutant:
    """One changed token: its line, and that line before and after, without the blanks at its ends."""

    line: int
    before: str
    after: str
    source: str


def mutants_of(source: str, count: int, seed: int) -> list[Mutant]:
    """Draw `count` mutants of a file's text, all places once before any comes a second time.

    Left out: annotations and the insides of f-strings, since results seldom follow from a type's or a message's words,
    and what does not compile, which shows nothing.
    """
    choice = random.Random(seed)
    at: dict[Place, list[tuple[str, int]]] = {}
    for name, occurrence, place in _operations(source):
        at.setdefault(place, []).append((name, occurrence))
    rounds: list[tuple[str, int]] = []
    for operations in at.values():
        choice.shuffle(operations)
    while at:
        places = sorted(at)
        choice.shuffle(places)
        rounds += [at[place].pop() for place in places]
        at = {place: operations for place, operations in at.items() if operations}
    drawn: dict[str, Mutant] = {}
    for name, occurrence in rounds:
        if len(drawn) == count:
            break
        mutant = _mutant(source, name, occurrence)
        if mutant:
            drawn.setdefault(mutant.source, mutant)
    return sorted(drawn.values(), key=lambda mutant: mutant.line)


def _operations(source: str) -> Iterator[tuple[str, int, Place]]:
    """Yield (operator, its occurrence, place) for every token that an operator without arguments can change."""
    tree, passed_over = get_ast(source), [*_annotations(source), *_f_strings(source)]
    for name, operator in _operators().items():
        positions = (found for node in ast_nodes(tree) for found in operator.mutation_positions(node))
        for occurrence, (start, _) in enumerate(positions):
            if not any(first <= start < last for first, last in passed_over):
                yield name, occurrence, start


@functools.cache
def _operators() -> dict[str, Operator]:
    """Take every operator that needs no argument and stays with its kind: of + another sum or product, not a |.

    A number to which a bitwise operator is applied mostly ends as a TypeError, which any test notices.
    """
    kinds = {name: get_operator(name) for name in operator_names()}
    found = {name: kind() for name, kind in kinds.items() if not kind.arguments() and not name.endswith("/NoOp")}
    for name in list(found):
        _, _, pair = name.partition("ReplaceBinaryOperator_")
        if pair and not any(set(pair.split("_")) <= group for group in (ARITHMETIC, BITWISE)):
            del found[name]
    return found | {"RemoveStatement": RemoveStatement()}


def _annotations(source: str) -> list[tuple[Place, Place]]:
    """Find where annotations stand, as (start, end) of lines from 1 and columns from 0."""
    found: list[ast.expr | None] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.arg | ast.AnnAssign):
            found.append(node.annotation)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.append(node.returns)
    return [
        ((node.lineno, node.col_offset), (node.end_lineno or 0, node.end_col_offset or 0))
        for node in found
        if node is not None
    ]


def _f_strings(source: str) -> list[tuple[Place, Place]]:
    """Find where f-strings stand, as (start, end) of lines from 1 and columns from 0."""
    return [(node.start_pos, node.end_pos) for node in ast_nodes(get_ast(source)) if node.type == "fstring"]


def _mutant(source: str, name: str, occurrence: int) -> Mutant | None:
    try:
        changed = mutate_code(source, _operators()[name], occurrence)
        if changed is None or ast.dump(ast.parse(changed)) == ast.dump(ast.parse(source)):
            return None
    except (SyntaxError, AttributeError):  # cosmic-ray cannot replace a dotted name in `except (a.B, C)`
        return None
    pairs = zip(source.splitlines(), changed.splitlines(), strict=False)
    line, before, after = next((at, old, new) for at, (old, new) in enumerate(pairs, 1) if old != new)
    return Mutant(line, before.strip(), after.strip(), changed)
