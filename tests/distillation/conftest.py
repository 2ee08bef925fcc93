"""What the trainings' tests begin from."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def base(toy_koala: Path) -> Path:
    return toy_koala
