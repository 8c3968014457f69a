"""The limits of .ci/run, and how the tests are shared between the cores."""

import re
from pathlib import Path

from tests.balance import ROOT, SECONDS, SERVERS, group_of

MINUTES = 85


def test_the_limits_of_ci_add_up_to_less_than_85_minutes(repository: Path) -> None:
    limits = re.findall(r"^ *timeout (\d+) ", (repository / ".ci" / "run").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(limits) == 5 and sum(map(int, limits)) < 60 * MINUTES


def test_every_file_that_uses_the_gateway_is_in_its_group(repository: Path) -> None:
    files = [str(path.relative_to(repository)) for path in sorted((repository / "tests").rglob("test_*.py"))]
    asking = [file for file in files if re.search(r"def \w+\([^)]*\b(gateway|bucket)\b", (ROOT / file).read_text())]
    assert len(asking) > 5 and {group_of(file) for file in asking} == {"gateway"}


def test_the_groups_that_start_first_exist(repository: Path) -> None:
    assert all(name in SERVERS or (group_of(name) == name and (repository / name).is_file()) for name in SECONDS)
