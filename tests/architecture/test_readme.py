"""The README's map is the tree on disk, its tests exist, its links lead somewhere."""

import re
import subprocess
from pathlib import Path

import pytest

from data_pipeline.settings import read_yaml
from tests.architecture.source import PACKAGES

MAP = re.compile(r"<!-- map -->\n+```\n(.*?)```", re.S)
NAMED_TEST = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")
MADE_LATER = {"docs/", "docs/demo.png"}  # out of a demo run: named here, in a tree only once it was taken
LINK = re.compile(r"\]\((?!https?://|#)([^)#]+)")


@pytest.fixture(scope="module")
def readme(repository: Path) -> str:
    return (repository / "README.md").read_text(encoding="utf-8")


def listed(readme: str) -> set[str]:
    """Every path that the map names; a line is `path  what it is`, indented lines stand below their folder."""
    block = MAP.search(readme)
    assert block, "README.md has no map: a code block after <!-- map -->"
    paths, folder = set(), ""
    for line in block.group(1).splitlines():
        names = re.match(r"( *)(\S+)", line)
        if not names:
            continue
        name = names.group(2)
        if not names.group(1):
            folder = name if name.endswith("/") else ""
            paths.add(name)
        else:
            paths.add(folder + name)
    return paths


def tracked(repository: Path) -> list[Path]:
    """Files that git tracks or would: what a clone has."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=30)
    if done.returncode:
        pytest.skip("not a git checkout: the tree on disk cannot be told from build outputs")
    return [Path(line) for line in done.stdout.splitlines() if (repository / line).exists()]


def expected(repository: Path) -> set[str]:
    """Top-level entries, and each file or sub-folder of the three packages."""
    files = tracked(repository)
    top = {f"{file.parts[0]}/" if len(file.parts) > 1 else file.parts[0] for file in files}
    inside = {
        f"{file.parts[0]}/{file.parts[1]}" + ("/" if len(file.parts) > 2 else "")
        for file in files
        if file.parts[0] in PACKAGES and len(file.parts) > 1 and file.parts[1] != "__init__.py"
    }
    return {name for name in top if name != ".gitignore"} | inside


def test_the_map_is_the_tree(readme: str, repository: Path) -> None:
    there, named = expected(repository) - MADE_LATER, listed(readme) - MADE_LATER
    assert there == named, f"missing in the map: {sorted(there - named)}; not on disk: {sorted(named - there)}"


def test_every_test_that_the_readme_names_exists(readme: str, repository: Path) -> None:
    named = NAMED_TEST.findall(readme)
    assert named
    for path, function in named:
        assert (repository / path).is_file(), path
        assert not function or f"def {function}(" in (repository / path).read_text(encoding="utf-8"), function


def test_links_of_the_documents_lead_somewhere(repository: Path) -> None:
    for document in ("README.md", "CONTRIBUTING.md", "slurm/README.md", "deploy/README.md"):
        for target in LINK.findall((repository / document).read_text(encoding="utf-8")):
            there = (repository / document).parent.joinpath(target).exists()
            assert there or target in MADE_LATER, f"{document}: {target}"


def test_commands_on_own_data_do_not_evaluate_on_the_recipe_s(repository: Path) -> None:
    """A recipe's data.evaluation belongs to its data.dataset: a command that overrides the one gives the other too."""
    documents = [
        repository / "README.md",
        *(repository / "docs").glob("*.md"),
        *(repository / "configs").rglob("*.yaml"),
    ]
    commands = re.compile(r"(configs/[\w/.-]+\.yaml)((?:[^\n`]|\\\n)*data\.dataset=[^\n`]*)")
    seen = 0
    for document in documents:
        for recipe, rest in commands.findall(document.read_text(encoding="utf-8")):
            tree = read_yaml(repository / recipe)
            seen += 1
            assert "data.evaluation=" in rest or not tree["data"].get("evaluation"), f"{document}: {recipe} {rest}"
    assert seen
