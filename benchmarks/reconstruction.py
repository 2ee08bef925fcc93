"""What a VAE leaves of pictures: the judge's retrieval on held-out pictures, encoded and decoded.

No U-Net can draw better than that. The judge is trained on real pictures as in `koala evaluate`.

`python -m benchmarks.reconstruction --pictures data [--model koala-mini]` adds its finding to
`reconstruction.json` beside this file.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

import torch

from koala.data.encoding import to_pixels
from koala.data.pictures import PictureSet
from koala.evaluation.features import EffLite0, extract
from koala.evaluation.report import choose, yardstick_of
from koala.formats import load_vae, resolve_model
from koala.mini.vae import to_images
from koala.processor import hardware
from koala.sentence import SentenceEncoder

PROMPTS = 200
BATCH = 32


@torch.inference_mode()
def reconstructions(pictures: PictureSet, indices: list[int], model: str) -> list:
    """The pictures of `indices` through the VAE of `model`: encoded to the mean, and decoded."""
    vae = load_vae(resolve_model(model), torch.float32).eval()
    images = []
    for start in range(0, len(indices), BATCH):
        pixels = to_pixels([pictures.image(i) for i in indices[start : start + BATCH]])
        images += to_images(vae.decode(vae.encode(pixels).latent_dist.mode()).sample)
    return images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--model", default="koala-mini")
    options = parser.parse_args()
    pictures = PictureSet(options.pictures)
    chosen, reference, train = choose(pictures, PROMPTS)
    size = pictures.image(0).size
    extractor = EffLite0()
    yardstick = yardstick_of(
        pictures, chosen, reference, train, size, extractor, SentenceEncoder(), None
    )
    rebuilt = extract(extractor, reconstructions(pictures, chosen, options.model))
    found = {
        "size": list(size),
        "model": options.model,
        "real": yardstick.judge.retrieval(yardstick.own, yardstick.texts),
        "rebuilt": yardstick.judge.retrieval(rebuilt, yardstick.texts),
        "hardware": hardware(),
        "command": shlex.join(["python", "-m", "benchmarks.reconstruction", *sys.argv[1:]]),
    }
    out = Path(__file__).with_suffix(".json")
    known = json.loads(out.read_text()) if out.exists() else []
    key = (found["size"], found["model"])
    kept = [one for one in known if (one["size"], one["model"]) != key]
    out.write_text(json.dumps([*kept, found], indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
