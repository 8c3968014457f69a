"""How `make test` shares the tests between the cores: which of them stay together, and which start first.

A file stays on one core, with what its fixtures start. All files that use a server of tests/conftest.py stay together
too: the server is started once. The longest groups start first, so that the cores end together.
"""

import ast
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

ROOT = Path(__file__).parent.parent
SERVERS = {"gateway": {"gateway", "bucket"}}
"""The servers that several files use, and the fixtures that need each."""
SECONDS = {
    "gateway": 670,
    "tests/launchers/test_slurm_real.py": 360,
    "tests/launchers/test_hosts.py": 180,
    "tests/pretrain/test_running.py": 140,
    "tests/end_to_end/test_real_data.py": 130,
    "tests/pretrain/test_training.py": 100,
    "tests/launchers/test_demo.py": 95,
    "tests/pretrain/test_families.py": 80,
    "tests/pretrain/test_tracking.py": 50,
    "tests/data_pipeline/ingest/test_run.py": 40,
    "tests/pretrain/test_identity_of_runs.py": 40,
    "tests/pretrain/test_lethal.py": 40,
    "tests/launchers/test_data_codes.py": 35,
    "tests/pretrain/test_data_of_runs.py": 30,
    "tests/launchers/plan/test_measured.py": 30,
    "tests/pretrain/test_elastic.py": 20,
    "tests/launchers/plan/test_plan.py": 20,
}
"""Seconds that the longest groups take, one after the other; the others take less."""


@functools.cache
def group_of(file: str) -> str:
    """The tests that run on one core with those of this file: a server's name, or the file's own."""
    words = _arguments(ast.parse((ROOT / file).read_text(encoding="utf-8")))
    return next((server for server, fixtures in SERVERS.items() if fixtures & words), file)


def _arguments(tree: ast.Module) -> set[str]:
    """What the functions of a file ask for, and what they are marked to use."""
    named = {argument.arg for node in ast.walk(tree) if isinstance(node, ast.arguments) for argument in node.args}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    marks = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "usefixtures"]
    return named | {word.value for call in marks for word in call.args if isinstance(word, ast.Constant)}


def file_of(test: str) -> str:
    """The path in the id of a test."""
    return test.partition("::")[0]


def longest_first(items: Iterable[pytest.Item]) -> list[pytest.Item]:
    """The tests in their order, but the longest groups first."""
    return sorted(items, key=lambda item: -SECONDS.get(group_of(file_of(item.nodeid)), 0))


class Groups(LoadScopeScheduling):
    """Sends each group to one core, in the order of the tests. (With pytest 9.2 xdist's own groups are lost.)"""

    def __init__(self, config: pytest.Config, log: Any) -> None:
        config.option.loadscopereorder = False
        super().__init__(config, log)

    def _split_scope(self, nodeid: str) -> str:
        return group_of(file_of(nodeid))
