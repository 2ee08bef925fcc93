"""A real Chromium on the page of a real server, for the tests of `koala.serving.api.page`."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select, WebDriverWait

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
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
