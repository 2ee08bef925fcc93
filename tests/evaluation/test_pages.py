"""The pages: whole in themselves, and the blind one in a real browser."""

import json
import re
from time import sleep

import pytest
from PIL import Image

from koala.cli import main
from koala.evaluation.pages import address, blind_page, side_by_side
from toy_browser import CHROMIUM, DRIVER, Page

RED, BLUE = (address(Image.new("RGB", (16, 16), colour)) for colour in ("red", "blue"))
LINES = [(f"prompt {i} <b> </script>", [RED, BLUE]) for i in range(12)]
NAMES = ["the <red>", "blue"]


def test_two_folders_are_compared_without_a_model(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["koala/__main__.py", "evaluate"])
    for name, colour in (("a", "red"), ("b", "blue")):
        (tmp_path / name).mkdir()
        for i in range(3):
            Image.new("RGB", (16, 16), colour).save(tmp_path / name / f"{i:05d}.png")
    (tmp_path / "p.txt").write_text("a fox\nan owl\na <cat>\n")
    given = ["--prompts", str(tmp_path / "p.txt"), "--out", str(tmp_path / "out"), "--page"]
    folders = [f"{name}={tmp_path / name}" for name in "ab"]
    assert main(["evaluate", "--compare", *folders, *given]) == 0
    told = capsys.readouterr()
    assert "blind.html" in told.err and told.out == ""  # nothing was measured
    assert json.loads((tmp_path / "out" / "report.json").read_text())["command"] == "koala evaluate"
    made = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert made == [
        "blind.html",
        "drawn",
        "report.json",
        "report.md",
        "sheet.png",
        "side-by-side.html",
    ]
    for name in ("blind.html", "side-by-side.html"):
        text = (tmp_path / "out" / name).read_text()
        assert not re.findall(r"""(?:src|href)=["']?(?!data:)[a-z/.]+""", text), (
            "nothing is fetched"
        )
    told = (tmp_path / "out" / "side-by-side.html").read_text()
    assert told.count("<img") == 6 and "a &lt;cat&gt;" in told
    for wrong, says in (
        (["evaluate", folders[0], *given], "--page is of two models"),
        (["evaluate", *given[:-1]], "give models to measure"),
        (["evaluate", "x", "--compare", *folders, *given], "give models to measure"),
    ):
        assert main(wrong) == 2
        assert says in capsys.readouterr().err


def test_pictures_are_kept_without_loss_where_they_are_small():
    import base64
    import io

    noise = Image.effect_noise((40, 30), 90).convert("RGB")
    stored = base64.b64decode(address(noise).partition(",")[2])
    assert Image.open(io.BytesIO(stored)).convert("RGB").tobytes() == noise.tobytes()
    assert side_by_side(NAMES, LINES).count(RED) == 12


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    if not (CHROMIUM and DRIVER):
        pytest.skip("needs chromium and chromium-driver")
    folder = tmp_path_factory.mktemp("page")
    (folder / "blind.html").write_text(blind_page(NAMES, LINES), encoding="utf-8")
    browser = Page(folder)
    browser.driver.get(f"file://{folder}/blind.html")
    yield browser
    browser.driver.quit()


def wilson(page: Page, wins: float, votes: int) -> list[float]:
    return json.loads(str(page.js(f"return JSON.stringify(wilson({wins}, {votes}))")))


def test_wilsons_interval_is_the_published_one(page):
    """Of 81 wins in 263: 0.2553 to 0.3662 (Newcombe 1998, table I)."""
    assert wilson(page, 81, 263) == pytest.approx([0.2553, 0.3662], abs=1e-4)
    assert wilson(page, 10, 10)[1] == pytest.approx(1)


def key(page: Page, name: str) -> None:
    page.js(
        "dispatchEvent(new KeyboardEvent('keydown', {key: arguments[0], cancelable: true}))", name
    )


def shown(page: Page) -> tuple[int, str]:
    """How far it is, and what is on the left."""
    left = page.js("return document.querySelector('#left img').src")
    return int(str(page.js("return document.documentElement.dataset.pair"))), str(left)


def test_wins_are_counted_by_keyboard_and_names_come_last(page):
    """Somebody who always prefers red, with one tie and one mistake taken back."""
    assert "blue" not in page.find("main").text
    sides = []
    for i in range(12):
        at, left = shown(page)
        assert at == i
        sides.append(left == RED)
        if i == 3:
            key(page, "ArrowRight" if left == RED else "ArrowLeft")
            key(page, "Backspace")
            assert shown(page) == (3, left)
        key(page, "ArrowDown" if i == 5 else "ArrowLeft" if left == RED else "ArrowRight")
        if i == 7:
            sleep(1)  # the browser writes what is stored a moment later
            page.driver.refresh()  # what was chosen is kept
    assert 0 < sum(sides) < 12, "sides are random"
    rate = [float(x) for x in str(page.js("return document.documentElement.dataset.rate")).split()]
    assert rate == pytest.approx([11.5 / 12, *wilson(page, 11.5, 12)])
    says = page.find("#says").text
    assert "the <red> wins 95.8 % of 12 pairs" in says and "the <red> is better." in says
    cells = [cell.text for cell in page.driver.find_elements("css selector", "#table td")]
    assert cells == ["the <red>", "11", "blue", "0", "as good as the other", "1"]
    assert page.complaints() == []


def test_prompts_come_in_random_order_and_one_may_begin_anew(page):
    order = json.loads(str(page.js("return JSON.stringify(state.order)")))
    assert sorted(order) == list(range(12)) and order != list(range(12))
    page.click("#again")
    assert shown(page)[0] == 0
    page.click("#stop")
    assert page.find("#says").text == "Nothing was chosen yet."
    page.click("#more")
    page.click("#left")
    assert shown(page)[0] == 1
