"""Whether `koala finetune` teaches a student what it does not know: a look, as a LoRA and whole.

The look is an art set that the mini family was not trained on. After fine-tuning on the drawings of
most things, the model draws things that the fine-tuning has not shown, from the same noise as
before. The shift is how far the images' mean feature (EfficientNet-Lite0) goes towards that of the
real drawings of those things, as in `benchmarks.lora_carry`.

`python -m benchmarks.finetune --model koala-mini --out runs/look` writes `finetune.json` and
`finetune.png`. Needs the extras `evaluate` and `lora`.
"""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from benchmarks.lora_carry import SHOWN, Training, draw, evenly, measure, prepare, train
from koala.checkpoints.resolve import resolve_model
from koala.data.illustrations.images import ImageSet
from koala.evaluation.features import EffLite0, at_size, extract
from koala.evaluation.report import hardware
from koala.generation import load
from koala.lora.training import FILE
from koala.utils.contact_sheet import contact_sheet

RECIPES = ("lora", "full")
RATES = {"lora": 5e-4, "full": 1e-4}


def fine_tuned(
    model: str, training: Training, extractor: nn.Module, things: int, seeds: int, out: Path
) -> tuple[dict, Image.Image]:
    """What each recipe does to the model (figures by recipe), and a sheet of it."""
    data = prepare(training, resolve_model(model), out / "data")
    real = ImageSet(data)
    held_out = evenly(real.select("test-concept"), things)
    prompts = [real.rows[i]["short"] for i in held_out]
    before = draw(load(model), prompts, seeds, seed=0)
    drawings = [at_size(real.image(i), before[0].size) for i in held_out]
    target, without = extract(extractor, drawings), extract(extractor, before)
    shown = {"before": before[::seeds]}
    figures = {}
    for recipe in RECIPES:
        own = Training(**{**asdict(training), "learning_rate": RATES[recipe]})
        result, losses = train(own, model, data, out / recipe, recipe)
        pipeline = load(model if recipe == "lora" else result)
        if recipe == "lora":
            pipeline.add_lora(result / FILE)
        after = draw(pipeline, prompts, seeds, seed=0)
        shift = asdict(measure(without, extract(extractor, after), target))
        tail = max(1, len(losses) // 10)
        figures[recipe] = {
            **shift,
            "share_of_the_way": shift["shift"] / shift["distance"],
            "learning_rate": own.learning_rate,
            "loss_first_tenth": sum(losses[:tail]) / tail,
            "loss_last_tenth": sum(losses[-tail:]) / tail,
        }
        shown[recipe] = after[::seeds]
    rows, captions = [], []
    for what, images in {**shown, "drawn": drawings}.items():
        rows += evenly(images, SHOWN)
        captions += [f"{what}: {prompt}" for prompt in evenly(prompts, SHOWN)]
    return figures, contact_sheet(rows, captions, columns=min(SHOWN, len(prompts)), scale=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="koala-mini", help="name or folder of the model")
    parser.add_argument("--style", default=Training.style, help="art set (default openmoji)")
    parser.add_argument("--samples", type=int, default=8_000, help="seen by each recipe")
    parser.add_argument("--things", type=int, default=96, help="held-out things drawn (at most)")
    parser.add_argument("--seeds", type=int, default=2, help="images of each thing")
    parser.add_argument("--out", type=Path, required=True, help="folder")
    o = parser.parse_args()
    start = time.perf_counter()
    training = Training(style=o.style, samples=o.samples)
    figures, sheet = fine_tuned(o.model, training, EffLite0(), o.things, o.seeds, o.out)
    record = {
        "command": f"python -m benchmarks.finetune --model {Path(o.model).name} "
        f"--style {o.style} --samples {o.samples} --things {o.things} --seeds {o.seeds}",
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
        "training": {k: v for k, v in asdict(training).items() if k != "learning_rate"},
        "things": o.things,
        **figures,
        "seconds": round(time.perf_counter() - start),
    }
    (o.out / "finetune.json").write_text(json.dumps(record, indent=1) + "\n")
    sheet.save(o.out / "finetune.png", optimize=True)
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
