"""Whether `koala finetune` teaches a student what it does not know: a look, and a subject.

The looks are an emoji set that the mini family was not trained on, and clip art of many hands
(`benchmarks.clipart`), each taught as a LoRA and to the whole U-Net; measured on things that the
fine-tuning has not shown (`benchmarks.looks`). The subject is one drawing of that emoji set, on ten
images under a rare word (DreamBooth); measured by how far images of that word go towards other
images of the subject, and how far images of other things go there too. Each LoRA is loaded into
diffusers' pipeline as well, in both spellings, and its U-Net's output compared with ours.

`python -m benchmarks.finetune --svg SVG --out runs/look` writes `finetune.json` and a sheet of each
look and of the subject. Needs the extras `evaluate` and `lora`.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from torch import Tensor, nn

from benchmarks.clipart import prepare_clipart
from benchmarks.looks import (
    HeldOut,
    Training,
    draw,
    evenly,
    measure,
    prepare,
    save_sheet,
    sheet,
    train,
    write_record,
)
from koala.checkpoints.resolve import resolve_model
from koala.data.illustrations import art
from koala.data.illustrations.colours import BACKGROUNDS
from koala.data.prepare import prepare as prepare_folder
from koala.data.preprocess import Preparation
from koala.evaluation.features import EffLite0, extract
from koala.generation import load
from koala.lora.training import FILE
from koala.utils import markdown

RATES = {"lora": 5e-4, "full": 1e-4}
SET, CLIP_ART = "openmoji", "openclipart"
LOOKS = {SET: "OpenMoji", CLIP_ART: "clip art"}
SUBJECT, LABEL, WORD = "1f9f8", "teddy bear", "sks"  # an emoji, what it shows, the rare word
PICTURES, SEEDS, OTHERS = 10, 8, 8  # of the subject; drawn of its prompt; other things drawn


def look(
    model: str,
    training: Training,
    data: Path,
    held_out: HeldOut,
    extractor: nn.Module,
    seeds: int,
    out: Path,
) -> tuple[dict, dict[str, list[Image.Image]]]:
    """What each recipe makes of the look (figures by recipe), and images of it."""
    before = draw(load(model), held_out.prompts, seeds)
    figures, shown = {}, {"before": before[::seeds]}
    for recipe, rate in RATES.items():
        own = replace(training, learning_rate=rate)
        result, losses = train(own, model, data, out / recipe, recipe)
        pipeline = load(model if recipe == "lora" else str(result))
        if recipe == "lora":
            pipeline.add_lora(result / FILE)
        after = draw(pipeline, held_out.prompts, seeds)
        shift = held_out.shift(extractor, before, after)
        figures[recipe] = {
            **asdict(shift),
            "share_of_the_way": shift.shift / shift.distance,
            "learning_rate": rate,
            "losses": asdict(losses),
        }
        shown[recipe] = after[::seeds]
    figures["lora"]["diffusers"] = differences_from_diffusers(model, out / "lora" / "lora")
    return figures, shown


def subject(
    model: str, training: Training, others: Sequence[str], extractor: nn.Module, out: Path
) -> tuple[dict, dict[str, list[Image.Image]]]:
    """What DreamBooth makes of a subject, and images of it: the ten, before, and after."""
    caption = f"a {WORD} {LABEL}"
    images = subject_images(2 * PICTURES)
    folder = out / "subject" / f"1_{caption}"
    folder.mkdir(parents=True, exist_ok=True)
    for n, image in enumerate(images[:PICTURES]):
        image.save(folder / f"{n}.png")
    data = out / "subject-data"
    given = Preparation(size=images[0].width, held_out=0.0)
    prepare_folder(str(folder.parent), data, model, workers=1, preparation=given)
    result, losses = train(training, model, data, out / "dreambooth", "dreambooth")
    pipeline, target = load(model), extract(extractor, images[PICTURES:])
    before = [draw(pipeline, [caption], SEEDS), draw(pipeline, others, 1)]
    pipeline.add_lora(result / FILE)
    after = [draw(pipeline, [caption], SEEDS), draw(pipeline, others, 1)]
    shares = []
    for one, other in zip(before, after, strict=True):
        shift = measure(extract(extractor, one), extract(extractor, other), target)
        shares.append(shift.shift / shift.distance)
    figures = {
        "prompt": caption,
        "images": PICTURES,
        "samples": training.samples,
        "batch": training.batch,
        "learning_rate": training.learning_rate,
        "share_of_the_way": shares[0],
        "share_of_the_way_of_other_things": shares[1],
        "losses": asdict(losses),
        "diffusers": differences_from_diffusers(model, result),
    }
    shown = {
        "shown": images[:SEEDS],
        f"{caption}, before": before[0],
        f"{caption}, after": after[0],
        "others, before": before[1],
        "others, after": after[1],
    }
    return figures, shown


def subject_images(number: int) -> list[Image.Image]:
    """The subject's drawing, filling most of each image, on all backgrounds."""
    name = art.drawing_of(SET, SUBJECT, LABEL)
    assert name is not None, f"{SET} does not draw a {LABEL}"
    images, size = [], 128
    for n in range(number):
        side = 3 * size // 4 + 7 * n % (size // 4)
        canvas = Image.new("RGBA", (size, size), [*BACKGROUNDS.values()][n % len(BACKGROUNDS)])
        room = size - side
        place = (5 * n % (room + 1), 3 * n % (room + 1))
        canvas.alpha_composite(art.drawing(SET, name, side), place)
        images.append(canvas.convert("RGB"))
    return images


@torch.no_grad()
def differences_from_diffusers(model: str, folder: Path) -> dict[str, float]:
    """The U-Net's output with each of a LoRA's files: diffusers' beside ours, relative to ours."""
    ours, found = load(model), {}
    ours.add_lora(folder / FILE)
    inputs = _inputs(ours.unet)
    expected = ours.unet(**inputs).sample
    for file in sorted(folder.glob("*.safetensors")):
        theirs = StableDiffusionXLPipeline.from_pretrained(resolve_model(model))
        theirs.load_lora_weights(folder, weight_name=file.name)
        difference = theirs.unet(**inputs).sample - expected
        found[file.name] = (difference.norm() / expected.norm()).item()
    return found


def _inputs(unet: nn.Module) -> dict[str, object]:
    """Of one evaluation of a U-Net, always the same."""
    generator, config = torch.Generator().manual_seed(0), unet.config
    ids = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    side = float(8 * config.sample_size)
    return {
        "sample": normal(1, config.in_channels, config.sample_size, config.sample_size),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": normal(1, 8, config.cross_attention_dim),
        "added_cond_kwargs": {
            "text_embeds": normal(1, ids),
            "time_ids": torch.tensor([[side, side, 0.0, 0.0, side, side]]),
        },
    }


def table(record: dict[str, Any]) -> str:
    """How far images went towards real ones, as Markdown, and how far diffusers is from ours."""
    samples, found = record["training"]["samples"], record["subject"]
    rows, differences = [], [*found["diffusers"].values()]
    for name, figures in record["looks"].items():
        for recipe, how in (("lora", "as a LoRA"), ("full", "the whole U-Net")):
            shift = figures[recipe]
            share = f"{shift['share_of_the_way']:.0%} ± {shift['error'] / shift['distance']:.0%}"
            of = f"{figures['things']} things not shown"
            rows.append([f"{LOOKS[name]}, {how}", f"{samples:,}", of, share])
        differences += figures["lora"]["diffusers"].values()
    for of, key in (("its prompt", ""), (f"{OTHERS} other things", "_of_other_things")):
        share = f"{found[f'share_of_the_way{key}']:.0%}"
        rows.append(["the subject, as a LoRA", f"{found['samples']:,}", of, share])
    return (
        markdown.table(["taught", "samples", "images of", "of the way"], rows)
        + "\n\nWith these LoRAs' files, diffusers' U-Net gives what ours gives to within "
        f"{max(differences):.0e} of its norm."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="koala-mini", help="name or folder of the model")
    parser.add_argument("--svg", type=Path, help="Open Clip Art's folder; default: no such look")
    parser.add_argument("--samples", type=int, default=2_400, help="seen by each recipe of a look")
    parser.add_argument("--subject-samples", type=int, default=2_400, help="seen of the subject")
    parser.add_argument("--things", type=int, default=40, help="held-out things drawn (at most)")
    parser.add_argument("--seeds", type=int, default=1, help="images of each thing")
    parser.add_argument("--out", type=Path, required=True, help="folder")
    o = parser.parse_args()
    extractor = EffLite0()
    training = Training(style=SET, samples=o.samples, batch=16)
    data = prepare(training, resolve_model(o.model), o.out / SET / "data")
    taught = {SET: (data, HeldOut.of(data, o.things))}
    if o.svg:
        taught[CLIP_ART] = prepare_clipart(o.svg, o.model, o.out / CLIP_ART, o.things)
    figures: dict[str, Any] = {}
    for name, (data, held_out) in taught.items():
        out = o.out / name
        figures[name], shown = look(o.model, training, data, held_out, extractor, o.seeds, out)
        figures[name]["things"] = len(held_out.prompts)
        save_sheet(held_out.sheet(shown), o.out / f"finetune-{name}.png")
    of_subject = replace(training, samples=o.subject_samples, batch=4)
    others = evenly(taught[SET][1].prompts, OTHERS)
    of_it, shown = subject(o.model, of_subject, others, extractor, o.out)
    record = {
        "command": f"python -m benchmarks.finetune --model {Path(o.model).name} --svg SVG "
        f"--samples {o.samples} --subject-samples {o.subject_samples} "
        f"--things {o.things} --seeds {o.seeds} --out OUT",
        "training": {
            k: v for k, v in asdict(training).items() if k not in ("learning_rate", "style")
        },
        "looks": figures,
        "subject": of_it,
    }
    write_record(record, sheet(shown, [""] * SEEDS), o.out, "finetune")


if __name__ == "__main__":
    main()
