"""Every test runs in the repository, where the recipes are; some against a checking server."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from launchers import watch
from tests.launchers.checking_server import CheckingServer


@pytest.fixture(autouse=True)
def _in_repository(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)


@pytest.fixture(scope="session")
def definitions(shared: Path) -> Path:
    """The public schemas of custom kinds."""
    return shared / "k8s-crd"


@pytest.fixture
def server(definitions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CheckingServer]:
    """An empty checking server that the kubeconfig names."""
    monkeypatch.setattr(watch, "ASK_S", 0.05)  # seconds between two questions
    started = CheckingServer(definitions)
    monkeypatch.setenv("KUBECONFIG", str(started.kubeconfig(tmp_path / "kubeconfig")))
    yield started
    started.stop()
