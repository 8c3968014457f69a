"""What every test may ask for: the repository, and the reference material that may lie beside it."""

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


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
