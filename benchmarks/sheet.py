"""The README's sheet: prompts drawn once each with the bundled model, no draw chosen.

`python -m benchmarks.sheet [--model M] [--out docs/sheet.png]`
"""

import argparse
from pathlib import Path

from koala.generation import load
from koala.utils.contact_sheet import contact_sheet

SEED = 7  # of the first picture; each next one is one more
PROMPTS = (
    "a fox, noto style",
    "a red apple, flat twemoji style",
    "a rocket, 3d fluent style",
    "a strawberry, flat fluent style",
    "a tulip, flat twemoji style",
    "a car, flat twemoji style",
    "a whale, noto style",
    "a guitar, 3d fluent style",
    "a banana",
    "an owl, flat fluent style",
    "a tree, noto style",
    "a sailboat, flat twemoji style",
    "a bell pepper, 3d fluent style",
    "a penguin, noto style",
    "a carrot, 3d fluent style",
    "a train, noto style",
    "a blue fish, solid icon",
    "a green tree on a pale yellow background, solid icon",
    "a red rabbit, outline icon",
    "a purple guitar on a mint green background, solid icon",
    "an orange on a dark blue background, flat twemoji style",
    "two red apples on a light blue background, noto style",
    "three frogs on a mint green background, flat twemoji style",
    "four lemons on a pale pink background, 3d fluent style",
    "a dog to the left of a car on a white background, noto style",
    "a fish above a carrot on a light grey background, flat fluent style",
    "a scarlet rose",
    "a puppy, noto style",
    "a blue whale",
    "a feline, flat twemoji style",
    "a lorry, noto style",
    "a blossom, 3d fluent style",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="koala-mini")
    parser.add_argument("--out", type=Path, default=Path("docs/sheet.png"))
    options = parser.parse_args()
    drawn = load(options.model)(list(PROMPTS), seed=SEED)
    contact_sheet(drawn.images, list(PROMPTS), columns=8, scale=2).save(options.out, optimize=True)
    print(options.out)


if __name__ == "__main__":
    main()
