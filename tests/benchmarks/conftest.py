"""What several benchmarks are tried on."""

from pathlib import Path

import pytest

from toy_family import untrained_teacher


@pytest.fixture(scope="session")
def teacher(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "model"
    untrained_teacher(folder)
    return folder
