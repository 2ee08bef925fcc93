"""The page of `koala serve` in a real Chromium, for the tests of what people do with it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from koala.lora.names import base_named
from toy_browser import Page, serving
from toy_lora import toy_lora


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    loras = tmp_path_factory.mktemp("loras")
    toy_lora(loras / "ink.safetensors", base_named("koala-mini"))
    data = tmp_path_factory.mktemp("gallery")
    with serving(data, "--max-batch", "4", "--lora-dir", str(loras)) as url:
        yield url


@pytest.fixture(scope="module")
def browser(downloads: Path) -> Iterator[Page]:
    page = Page(downloads)
    yield page
    page.driver.quit()


@pytest.fixture
def page(browser: Page, server: str) -> Iterator[Page]:
    """The page, just opened; nothing of it may go against its own policy or fail unseen."""
    browser.open(server)
    browser.ready()
    yield browser
    assert browser.complaints() == []
