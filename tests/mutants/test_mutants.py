"""The lists of `make mutants` fit the tree, and mutants are drawn by their seed alone."""

import ast
import tomllib
from pathlib import Path

import pytest

from tests.mutants.mutations import mutants_of

TARGETS = tomllib.loads((Path(__file__).parent / "targets.toml").read_text("utf-8"))["files"]
EQUIVALENT = tomllib.loads((Path(__file__).parent / "equivalent.toml").read_text("utf-8"))["mutant"]
SOURCE = '''
def total(values: list[int | None], start: int = 1) -> int | None:
    """Add up 3 things."""
    for value in values:
        start += value * 2
    if start < 0 and values:
        raise ValueError(f"{start - 1} is less than 0")
    check(start)
    return start
'''


@pytest.mark.parametrize("file", TARGETS)
def test_a_target_and_its_tests_are_there(repository: Path, file: str) -> None:
    assert [name for name in [file, *TARGETS[file]] if not (repository / name).is_file()] == []


@pytest.mark.parametrize("mutant", EQUIVALENT, ids=lambda mutant: mutant["after"][:40])
def test_an_equivalent_mutant_is_of_a_line_that_is_still_there(repository: Path, mutant: dict[str, str]) -> None:
    lines = [line.strip() for line in (repository / mutant["file"]).read_text("utf-8").splitlines()]
    assert mutant["before"] in lines, "the line changed: look at its mutants again"
    assert mutant["reason"] and mutant["file"] in TARGETS


@pytest.mark.slow
def test_a_seed_draws_the_same_mutants_and_another_seed_others() -> None:
    first, again, other = (mutants_of(SOURCE, 8, seed) for seed in (0, 0, 1))
    assert first == again != other
    assert len(first) == 8


@pytest.mark.slow
def test_every_mutant_compiles_and_changes_one_line_that_computes() -> None:
    mutants = mutants_of(SOURCE, 1000, 0)
    for mutant in mutants:
        ast.parse(mutant.source)
        changed = [
            pair for pair in zip(SOURCE.splitlines(), mutant.source.splitlines(), strict=True) if pair[0] != pair[1]
        ]
        assert [(old.strip(), new.strip()) for old, new in changed] == [(mutant.before, mutant.after)]
        assert "list[int | None]" in mutant.source and "-> int | None" in mutant.source
        assert "start - 1" in mutant.source or mutant.after == "pass"
    after = {mutant.after for mutant in mutants}
    assert after >= {
        "start += value + 2", "start += value * 1", "pass", "if start <= 0 and values:", "if start < 0 or values:",
        "if not start < 0 and values:", "def total(values: list[int | None], start: int = 0) -> int | None:",
    }  # fmt: skip
    removed = {mutant.before for mutant in mutants if mutant.after == "pass"}
    assert removed == {
        "start += value * 2", 'raise ValueError(f"{start - 1} is less than 0")', "check(start)"
    }  # fmt: skip


def test_an_exception_with_a_dot_is_passed_over():
    mutants = mutants_of("try:\n    act()\nexcept (json.Error, OSError):\n    raise\n", 100, 0)
    assert {mutant.after for mutant in mutants} == {"pass", "except (json.Error, CosmicRayTestingException):"}
