"""Whether a LoRA that a teacher learnt does its work on the student: a look, carried and measured.

A LoRA for one art set that the mini family was not trained on is trained on the teacher
(`koala finetune lora`) and put on the student by weight inheritance. Both draw the same prompts,
things that the LoRA has not seen, from the same noise with and without it (`benchmarks.looks`). The
student's shift should be at least half of its teacher's.

`python -m benchmarks.lora_carry --teacher runs/sdxl-mini/model --student runs/koala-mini/model
--out runs/lora` writes `lora_carry.json`, `lora_carry.png` and the LoRA. Needs the extras
`evaluate` and `lora`.
"""

import argparse
import time
from dataclasses import asdict
from pathlib import Path

from PIL import Image
from torch import nn

from benchmarks.looks import HeldOut, Training, draw, prepare, train, write_record
from koala.checkpoints.resolve import resolve_model
from koala.evaluation.features import EffLite0
from koala.generation import load
from koala.lora.training import FILE


def compare(
    models: dict[str, str], lora: Path, held_out: HeldOut, extractor: nn.Module, seeds: int
) -> tuple[dict, Image.Image]:
    """What the LoRA does to every model (figures by name), and a sheet of it."""
    figures, shown = {}, {}
    for name, model in models.items():
        pipeline = load(model)
        before = draw(pipeline, held_out.prompts, seeds)
        report = pipeline.add_lora(lora)
        after = draw(pipeline, held_out.prompts, seeds)
        shift = held_out.shift(extractor, before, after)
        figures[name] = asdict(shift) | {"lora": asdict(report)}
        shown |= {f"{name} without": before[::seeds], f"{name} with": after[::seeds]}
    return figures, held_out.sheet(shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", required=True, help="name or folder of the teacher")
    parser.add_argument("--student", required=True, help="name or folder of its student")
    parser.add_argument("--style", default=Training.style, help="art set (default openmoji)")
    parser.add_argument("--samples", type=int, default=Training.samples, help="seen in training")
    parser.add_argument("--things", type=int, default=96, help="held-out things drawn (at most)")
    parser.add_argument("--seeds", type=int, default=2, help="images of each thing")
    parser.add_argument("--out", type=Path, required=True, help="folder")
    o = parser.parse_args()
    start = time.perf_counter()
    training = Training(style=o.style, samples=o.samples)
    data = prepare(training, resolve_model(o.teacher), o.out / "data")
    lora, losses = train(training, o.teacher, data, o.out / "run")
    models = {"teacher": o.teacher, "student": o.student}
    held_out = HeldOut.of(data, o.things)
    figures, pictures = compare(models, lora / FILE, held_out, EffLite0(), o.seeds)
    record = {
        "command": f"python -m benchmarks.lora_carry --style {o.style} --samples {o.samples} "
        f"--things {o.things} --seeds {o.seeds}",
        "training": asdict(training),
        "losses": asdict(losses),
        "student_shift_over_teacher_shift": figures["student"]["shift"]
        / figures["teacher"]["shift"],
        **figures,
        "seconds": round(time.perf_counter() - start),
    }
    write_record(record, pictures, o.out, "lora_carry")


if __name__ == "__main__":
    main()
