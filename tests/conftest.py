"""What every test may ask for: the repository, the reference material that may lie beside it, a real S3 server."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.balance import Groups, longest_first
from tests.gateway import CREDENTIALS, PACKAGES, Gateway, missing, start_gateway

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Groups | None:
    """Share the tests between cores by tests/balance.py when it is asked for by `--dist loadgroup`."""
    return Groups(config, log) if config.getvalue("dist") == "loadgroup" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest tests first where they run on several cores."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        items[:] = longest_first(items)


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder `shared` beside the repository: absent on a user's machine, where the test is skipped."""
    path = REPOSITORY.parent / "shared"
    if not path.is_dir():
        message = f"{path} is absent: it holds the real data and public schemas that this test reads"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return path


@pytest.fixture(scope="session")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A running S3 server: Ceph's gateway. Where it is not installed the test is skipped, in CI it fails."""
    if names := missing():
        message = f"{', '.join(names)} missing; as root: apt-get install --no-install-recommends {PACKAGES}"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(message)
    started = start_gateway(tmp_path_factory.mktemp("ceph"))
    yield started
    started.stop()


@pytest.fixture
def bucket(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> str:
    """s3:// address of an empty bucket, with endpoint and credentials in the environment."""
    for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": gateway.endpoint}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    return f"s3://{gateway.make_bucket()}"
