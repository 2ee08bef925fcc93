"""The README's sheet: 64 everyday prompts, drawn once each by the bundled model, no draw chosen.

`python -m benchmarks.sheet [--model M] [--prompts FILE] [--seed N] [--out docs/sheet.png]`
"""

import argparse
from pathlib import Path

from koala.checkpoints.bundled import DEFAULT
from koala.generation import load
from koala.utils.contact_sheet import contact_sheet

EVERYDAY = Path(__file__).with_name("everyday_prompts.txt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=DEFAULT)
    parser.add_argument("--prompts", type=Path, default=EVERYDAY, help="a text, one per line")
    parser.add_argument("--seed", type=int, default=7, help="of the first; each next is one more")
    parser.add_argument("--out", type=Path, default=Path("docs/sheet.png"))
    options = parser.parse_args()
    prompts = options.prompts.read_text().splitlines()
    drawn = load(options.model)(prompts, seed=options.seed)
    contact_sheet(drawn.images, prompts, columns=8, scale=1).save(options.out, optimize=True)
    print(options.out)


if __name__ == "__main__":
    main()
