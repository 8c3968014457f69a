"""Every model and task has its row in tests/families.py, and no other test keeps a list of all families."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from pretrain.schema import ModelConfig, TaskConfig, tasks_of
from pretrain.schema.tasks import TASK_SETTINGS
from tests.families import FAMILIES

PAIRS = {
    (model.model_fields["kind"].default, task) for task, settings in TASK_SETTINGS.items() for model in settings.trains
}
MODELS = {model for model, _ in PAIRS}
FEW = 3
"""So many families a test may name together, those that its law is about; with more it goes over the table."""


def names_in(collection: ast.expr) -> set[str]:
    """The words and names that a literal collection holds, the keys of a dict, or the first parts of its rows."""
    parts = collection.keys if isinstance(collection, ast.Dict) else getattr(collection, "elts", [])
    firsts = [part.elts[0] if isinstance(part, ast.Tuple) and part.elts else part for part in parts]
    words = {part.value for part in firsts if isinstance(part, ast.Constant) and isinstance(part.value, str)}
    return words | {part.id for part in firsts if isinstance(part, ast.Name)}


def lists_of_families(tree: ast.Module) -> Iterator[int]:
    """Lines of the literals that name more than FEW kinds of models or of tasks, each once."""
    for node in ast.walk(tree):
        if isinstance(node, ast.List | ast.Tuple | ast.Set | ast.Dict):
            names = names_in(node)
            once = len(getattr(node, "elts", names)) == len(names)
            if once and (len(names & MODELS) > FEW or len(names & set(TASK_SETTINGS)) > FEW):
                yield node.lineno


def test_every_model_and_task_has_a_row() -> None:
    rows = {family.pair for family in FAMILIES.values()}
    assert not PAIRS - rows, f"add rows to FAMILIES for {PAIRS - rows}"
    assert not rows - PAIRS, f"no task trains these models; add them to its `trains`: {rows - PAIRS}"
    assert all(task in tasks_of(model) for model, task in PAIRS)


def test_every_table_has_a_row_for_every_kind() -> None:
    """A family that is missing in one of them would only be noticed by the command that looks there."""
    from pretrain.evaluations import EVALUATIONS
    from pretrain.interchange.layouts import LAYOUTS
    from pretrain.models import MODELS as NETWORKS
    from pretrain.tasks import TASKS

    of_models, of_tasks = (
        {member.model_fields["kind"].default for member in get_args(get_args(union)[0])}
        for union in (ModelConfig, TaskConfig)
    )
    assert set(NETWORKS) == MODELS, "pretrain/models/__init__.py: MODELS"
    assert of_models == MODELS, "pretrain/schema/__init__.py: _Models"
    assert of_tasks == set(TASK_SETTINGS), "pretrain/schema/__init__.py: _Tasks"
    assert set(TASKS) == set(TASK_SETTINGS), "pretrain/tasks/__init__.py: TASKS"
    assert set(EVALUATIONS) == set(TASK_SETTINGS), "pretrain/evaluations/__init__.py: EVALUATIONS"
    assert {layout.kind for layout in LAYOUTS.values()} <= MODELS, "pretrain/interchange/layouts.py: LAYOUTS"
    assert all(settings.model_fields["kind"].default == kind for kind, settings in TASK_SETTINGS.items())


def test_no_other_test_lists_the_families(repository: Path) -> None:
    found = [
        f"{path.relative_to(repository)}:{line}"
        for path in sorted((repository / "tests").rglob("*.py"))
        if path != repository / "tests" / "families.py"
        for line in lists_of_families(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not found, "go over FAMILIES or PAIRS of tests/families.py instead"


@pytest.mark.parametrize(
    ("text", "listed"),
    [
        ("KINDS = ['clip', 'bert', 'electra', 'gpt', 'vqgan']", True),
        ("SIZES = {'clip': 1, 'bert': 2, 'electra': 3, 'gpt': 4}", True),
        ("CASES = [(clip, 1), (bert, 2), (electra, 3), (gpt, 4)]", True),
        ("TASKS = ('contrastive', 'mlm', 'rtd', 'autoregressive')", True),
        ("KINDS = ['clip', 'vqgan']", False),
        ("WRONG = [('clip', 1), ('clip', 2), ('bert', 1), ('gpt', 1), ('vqgan', 1), ('electra', 1)]", False),
    ],
)
def test_a_list_of_families_is_recognised(text: str, listed: bool) -> None:
    assert bool([*lists_of_families(ast.parse(text))]) is listed
