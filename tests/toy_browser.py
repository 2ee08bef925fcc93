"""A real Chromium on the page of a real server, for the tests of `koala.serving.api.page`."""

import base64
import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select, WebDriverWait

from koala.generation import Settings
from koala.generation.png import write_png

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_chromium = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no chromium here: apt-get install chromium chromium-driver"
)
DESKTOP, PHONE = (1280, 860), (390, 844)
PATIENCE = 120  # seconds: machines differ


@contextmanager
def serving(data: Path, *options: str) -> Iterator[str]:
    """`koala serve` with the bundled model on a free port; its address, once it is ready."""
    command = [sys.executable, "-m", "koala", "serve", "--port", "0", "--data", str(data)]
    process = subprocess.Popen(
        [*command, *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if found := re.search(r"ready on (http://\S+)", line):
                yield found[1]
                return
        raise AssertionError("".join(said))
    finally:
        process.terminate()
        process.communicate(timeout=PATIENCE)


class Page:
    """The page in a browser. Elements go by their ids."""

    def __init__(self, downloads: Path) -> None:
        assert CHROMIUM and DRIVER
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
            options.add_argument(argument)
        options.add_experimental_option(
            "prefs", {"download.default_directory": str(downloads), "download.prompt": False}
        )
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options, Service(DRIVER))
        self.driver.set_script_timeout(PATIENCE)

    def open(self, url: str, size: tuple[int, int] = DESKTOP) -> None:
        """The page as somebody sees it who was never here."""
        width, height = size
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.get(f"{url}/page/presets.json")
        self.js("localStorage.clear(); sessionStorage.clear()")
        self.driver.get(url)

    def ready(self) -> None:
        self.wait("document.documentElement.dataset.ready")

    def js(self, script: str, *values: object) -> object:
        return self.driver.execute_script(script, *values)

    def later(self, script: str, *values: object) -> object:
        """The result of a script that may await."""
        result = self.driver.execute_async_script(
            "const done = arguments[arguments.length - 1], values = [...arguments].slice(0, -1);"
            f"(async () => {{ {script} }})().then(x => done([x]), e => done(String(e)));",
            *values,
        )
        assert isinstance(result, list), result
        return result[0]

    def wait(self, expression: str, *values: object) -> object:
        """The first value of a script's expression that is true."""
        script = f"return {expression}"
        return WebDriverWait(self.driver, PATIENCE, 0.05).until(
            lambda driver: driver.execute_script(script, *values), expression
        )

    def waited(self, test: Callable[[], object]) -> None:
        """Returns once a test of what the browser did is true."""
        WebDriverWait(self.driver, PATIENCE, 0.05).until(lambda _: test())

    def find(self, selector: str) -> WebElement:
        return self.driver.find_element("css selector", selector)

    def click(self, selector: str) -> None:
        """Clicks where a person would, once it is in sight."""
        element = self.find(selector)
        self.js("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", element)
        element.click()

    def set(self, id: str, value: object) -> None:
        """Types a value into a field, or chooses it."""
        element = self.find(f"#{id}")
        if element.tag_name == "select":
            Select(element).select_by_value(str(value))
            return
        element.clear()
        element.send_keys(str(value))

    def values(self, *ids: str) -> list[str]:
        return [str(self.js("return document.getElementById(arguments[0]).value", i)) for i in ids]

    def job(self, status: str) -> str:
        """The id of the one job on the page, once it has the status."""
        return str(self.wait(f"document.querySelector('.job.{status}')?.dataset.job"))

    def complaints(self) -> list[str]:
        """What the browser has against the page: errors and breaches of its policy."""
        log = self.driver.get_log("browser")  # type: ignore[no-untyped-call]
        return [entry["message"] for entry in log if entry["level"] == "SEVERE"]


def png(settings: Settings | None = None, size: tuple[int, int] = (64, 64)) -> bytes:
    """A picture of two halves, red and blue, with the settings in it."""
    image = Image.new("RGB", size, "red")
    image.paste("blue", (size[0] // 2, 0, *size))
    file = io.BytesIO()
    if settings:
        write_png(image, settings, file)
    else:
        image.save(file, "PNG")
    return file.getvalue()


def drop(page: Page, content: bytes, name: str, on: str = "body") -> None:
    """Lets a file fall on an element, as a drag from a desktop does."""
    page.js(
        """const [text, name, on] = arguments;
        const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0));
        const dataTransfer = new DataTransfer();
        dataTransfer.items.add(new File([bytes], name, {type: "image/png"}));
        for (const kind of ["dragenter", "dragover", "drop"])
          document.querySelector(on).dispatchEvent(
            new DragEvent(kind, {dataTransfer, bubbles: true, cancelable: true}));""",
        base64.b64encode(content).decode(), name, on,
    )  # fmt: skip


def read(page: Page, content: bytes) -> dict | None:
    """What the page's own reader finds in a PNG."""
    found = page.later(
        """const {readSettings} = await import("/page/metadata.js");
        const bytes = Uint8Array.from(atob(values[0]), c => c.charCodeAt(0));
        return await readSettings(bytes.buffer);""",
        base64.b64encode(content).decode(),
    )
    return found if found is None else dict(found)


def api(page: Page, path: str) -> dict:
    return page.later("return await (await fetch(values[0])).json()", path)


def png_with(key: str, text: str, packed: bool = False) -> bytes:
    info, file = PngImagePlugin.PngInfo(), io.BytesIO()
    info.add_itxt(key, text, zip=packed)
    Image.new("RGB", (8, 8)).save(file, "PNG", pnginfo=info)
    return file.getvalue()


def begin_long(page: Page) -> str:
    """A job that takes its time, once it is being drawn; its id."""
    page.set("prompt", "a whale, noto style")
    page.set("steps", 200)
    page.set("number", 8)
    page.click("#draw")
    return str(page.wait("document.querySelector('.job progress')?.value > 0 && "
                         "document.querySelector('.job').dataset.job"))  # fmt: skip


def cancel(page: Page, job: str) -> None:
    page.click(f'[data-job="{job}"] button.small')
    page.wait("document.querySelector(arguments[0]) === null", f'[data-job="{job}"]')
    assert api(page, f"/v1/jobs/{job}")["status"] == "cancelled"
