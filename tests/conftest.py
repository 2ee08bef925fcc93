"""Fixtures shared by the tests: toy data packages and one toy pipeline of each kind."""

import atexit
import gc
import multiprocessing
import os
import shutil
import tempfile
from pathlib import Path

# One thread, here and in what is started: toys are too small to share, and threads that wait for
# each other made the suite several times as slow beside other work (docs/log.md). torch reads this
# when it is imported, for all threads of the process.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest

from koala.data.illustrations import art, concepts
from koala.utils.asset_packages import cache_folder
from toy import toy_pipeline
from toy_family import toy_mini_base
from toy_packages import toy_packages

gc.disable()  # until the tests are collected


def pytest_collection_finish() -> None:
    """What was imported by now stays to the end: Python's garbage collector need not traverse it.

    Doing so again and again took a fifth of the tests' time. New objects are traversed less often.
    """
    gc.freeze()
    gc.set_threshold(20_000)
    gc.enable()


# Servers and trainings in processes of their own are forked from one that has imported these: seven
# seconds once, not for each. A pytest has one such process, whoever needs it first.
multiprocessing.set_forkserver_preload(
    [
        "koala.serving.app",
        "koala.generation.loader",
        "koala.utils.networks",
        "koala.distillation.loop",
        "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl",
    ]
)

# Nothing here has to outlast a power cut, and to wait for a disk takes milliseconds a file. What is
# given must still be an open file.
os.fsync = lambda file: os.fstat(file if isinstance(file, int) else file.fileno())

# What draws here must not depend on what is measured: PyTorch, but in tests of the choice.
os.environ["KOALA_BACKEND"] = "torch"

# A cache of the tests' own but for the data packages.
PACKAGES = cache_folder() / "packages"
PACKAGES.mkdir(parents=True, exist_ok=True)
CACHE = Path(tempfile.mkdtemp(prefix="koala-tests-"))
(CACHE / "packages").symlink_to(PACKAGES)
os.environ["KOALA_CACHE"] = str(CACHE)
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)


@pytest.fixture(scope="session")
def toy_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_packages(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def packages(toy_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The toy packages, in the place of the real ones for one test."""
    monkeypatch.setenv("KOALA_CACHE", str(toy_cache))
    remembered = (art._iconify, art.by_code_point, concepts.concepts)
    for function in remembered:
        function.cache_clear()
    yield toy_cache
    for function in remembered:
        function.cache_clear()


@pytest.fixture(scope="session")
def toy_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_pipeline(tmp_path_factory.mktemp("toy") / "sdxl", architecture="sdxl")


@pytest.fixture(scope="session")
def toy_koala(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_pipeline(tmp_path_factory.mktemp("toy") / "koala", architecture="koala")


@pytest.fixture(scope="session")
def base_parts(toy_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A prepared folder of the mini family's, and its base pipeline."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KOALA_CACHE", str(toy_cache))
        return toy_mini_base(tmp_path_factory.mktemp("family"))
