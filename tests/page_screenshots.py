"""Screenshots of the server's page for the docs: three widths, light and dark.

`python tests/page_screenshots.py` draws a small gallery with the bundled model and writes
docs/page/WIDTH-SCHEME.png, and the viewer, grid and form in parts.
"""

import json
import tempfile
import time
from pathlib import Path
from urllib.request import Request, urlopen

from PIL import Image

from toy_browser import Page, serving

OUT = Path(__file__).parents[1] / "docs" / "page"
WIDTHS = {390: 844, 768: 1024, 1280: 860}
PROMPTS = (
    "a fox, noto style", "an owl, flat fluent style", "a strawberry, noto style",
    "a whale, flat twemoji style", "a rocket, 3d fluent style", "a sunflower, noto style",
    "a frog, flat twemoji style", "a cactus, noto style", "a penguin, noto style",
    "two red apples on a light blue background, noto style",
)  # fmt: skip


def posted(url: str, **fields: object) -> dict:
    body = json.dumps(fields).encode()
    asked = Request(f"{url}/v1/jobs", body, {"Content-Type": "application/json"})
    with urlopen(asked) as answer:
        return dict(json.load(answer))


def filled(url: str) -> None:
    """Draws the gallery."""
    ids = [posted(url, prompt=text, seed=seed)["id"] for seed, text in enumerate(PROMPTS, 7)]
    for id in ids:
        while json.load(urlopen(f"{url}/v1/jobs/{id}"))["status"] in ("queued", "running"):
            time.sleep(0.5)


def shot(page: Page, name: str) -> None:
    """Writes what is seen, in few colours, so that the repository stays small."""
    time.sleep(1)  # transitions and images
    file = OUT / f"{name}.png"
    page.driver.save_screenshot(str(file))
    with Image.open(file) as image:
        small = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    small.save(file, optimize=True)


def take(url: str) -> None:
    page = Page(Path(tempfile.mkdtemp()))
    try:
        for width, height in WIDTHS.items():
            for scheme in ("light", "dark"):
                feature = {"name": "prefers-color-scheme", "value": scheme}
                page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
                page.open(url, (width, height))
                page.ready()
                page.set("prompt", "a penguin, noto style")
                page.js("document.getElementById('more').open = true")
                page.set("seed", 5)
                page.set("number", 4)
                page.js("document.getElementById('more').open = arguments[0]", width > 960)
                page.click("#draw")
                page.job("done")
                page.js("document.activeElement.blur(); scrollTo(0, 0);"
                        "document.getElementById('form').scrollTop = 0")  # fmt: skip
                if width < 600:
                    page.js("document.getElementById('jobs').scrollIntoView()")
                shot(page, f"{width}-{scheme}")
        page.click("#thumbnails button")
        shot(page, "viewer")
    finally:
        page.driver.quit()


def main() -> None:
    OUT.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as place, serving(Path(place)) as url:
        filled(url)
        take(url)


if __name__ == "__main__":
    main()
