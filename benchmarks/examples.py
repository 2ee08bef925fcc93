"""Every prompt that the pages, `--help`, `make demo` and the web page show, drawn with three seeds.

`python -m benchmarks.examples [--model M] [--out examples.png]`

A prompt that fails in two of the three must not be shown to a newcomer: look at the sheet. Prompts
that go to another model than the bundled one, or that start from an image, are left out.
"""

import argparse
import json
import re
from pathlib import Path

from koala.checkpoints.bundled import DEFAULT
from koala.cli import command_named
from koala.generation import load
from koala.generation.demo import EIGHT_PROMPTS
from koala.utils.contact_sheet import contact_sheet

ROOT = Path(__file__).parents[1]
SEEDS = (7, 8, 9)
_COMMAND = re.compile(r"koala generate ((?:\"[^\"]+\" )*\"[^\"]+\")(.*)")
_PYTHON = re.compile(r"(?:pipeline|load\(\"koala-mini\"\))\(\"([^\"]+)\"(.*)")
_ELSEWHERE = ("--model", "--image", "image=")


def prompts_shown() -> list[str]:
    """The prompts, each once, in the order of the pages."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    lines = [line for page in pages for line in page.read_text().splitlines()]
    lines += command_named("generate").examples
    found: list[str] = []
    for line in lines:
        for pattern in (_COMMAND, _PYTHON):
            for given, rest in pattern.findall(line):
                if not any(word in rest for word in _ELSEWHERE):
                    found += given.strip('"').split('" "')
    presets = json.loads((ROOT / "koala/serving/page/presets.json").read_text())
    return list(dict.fromkeys([*found, *EIGHT_PROMPTS, *presets["koala-mini"]["examples"]]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=DEFAULT)
    parser.add_argument("--out", type=Path, default=Path("examples.png"), help="new file")
    options = parser.parse_args()
    prompts, pipeline = prompts_shown(), load(options.model)
    drawn = [pipeline(prompt, seed=seed).images[0] for prompt in prompts for seed in SEEDS]
    labels = [prompt for prompt in prompts for _ in SEEDS]
    contact_sheet(drawn, labels, columns=4 * len(SEEDS), scale=1).save(options.out)
    print(options.out)


if __name__ == "__main__":
    main()
