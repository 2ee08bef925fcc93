"""The record of the runs that made the bundled model, as a table.

`python -m benchmarks.mini_family` reads `run.json` and `stats.jsonl` of every run below
`benchmarks/mini_family` and writes the table into `README.md` there.
"""

import json
from pathlib import Path

FOLDER = Path(__file__).parent / "mini_family"
RUNS = {  # folder -> what it made
    "vae": "VAE",
    "decoder": "its decoder, trained further",
    "text": "text encoders",
    "mini-decoder": "the VAE's decoder, trained further at 128 pixels",
    "mini-vae": "the VAE, trained further at 128 pixels",
    "former-64": "teacher on the earlier latents, at 64 pixels",
    "former-128": "the same, at 128 pixels",
    "former-mirrored": "the same, half of the emoji mirrored",
    "sdxl-mini-128": "teacher on the latents of mini-vae",
    "sdxl-mini-between": "the same, trained a little further",
    "sdxl-mini": "teacher, last part",
    "koala-mini-first": "student: L_task + L_outKD + L_featKD",
    "koala-mini": "the same, last part, with more icons",
    "koala-mini-further-64": "koala-mini trained further by L_task on the new images, at 64 pixels",
    "koala-mini-further": "the same, at 128 pixels",
    "koala-mini-further-again": "the same, last part",
    "sdxl-mini-grown": "the teacher, grown from the result and trained further by L_task",
    "koala-mini-guided-first": "the student distilled from its own guided prediction",
    "koala-mini-guided": "the same, in four steps by progressive distillation",
    "koala-mini-sa": "koala-mini-first in fewer samples",
    "koala-mini-task": "control: L_task alone",
    "koala-mini-task-out": "control: L_task + L_outKD",
    "tiny-mini": "tiny autoencoder",
}
SHOWN = ("pixel", "perceptual", "latent", "text", "word", "task", "out", "feat", "progressive")
TWO_CORES = (
    "mini-decoder", "mini-vae", "former-128", "former-mirrored", "sdxl-mini-128", "sdxl-mini",
    "koala-mini-first", "koala-mini", "koala-mini-further-64", "koala-mini-further",
    "koala-mini-further-again", "sdxl-mini-grown", "koala-mini-guided-first", "koala-mini-guided",
)  # fmt: skip
CONTROLS = ("koala-mini-sa", "koala-mini-task", "koala-mini-task-out")


HEAD = """# The runs behind the bundled model

This folder keeps `run.json` and `stats.jsonl` of each run. The commands are those of
`docs/mini-family.md`, on 2 cores of an AMD EPYC (AVX-512), Python 3.11, torch 2.13.0 (CPU),
diffusers 0.42.1, transformers 5.23.0. The machine did other work at the same time, so the rates are
lower bounds. Losses are means of the last line of `stats.jsonl`. `python -m benchmarks.mini_family`
makes this page.

The runs differ from the recipes of `koala/recipes/mini.py` as follows:

- The U-Nets before `koala-mini-further-64` are of version 0.1.0, whose image set has some 300
  things. It now has 581, with new captions and another mixture, and the teacher's recipes ask for
  more samples.
- `koala-mini-further-64` is `sdxl-mini-64`, and `koala-mini-further` and its continuation are
  `sdxl-mini`, each with `--set architecture=koala-mini` (the first also with `further=true` and
  emoji 32, painted 1, icon 4, scene 1 for a mixture), from the koala-mini of 0.1.0. The first was
  stopped at 459,712 samples, and its average was taken. The rate of the other two falls to zero,
  from 1.2e-3 and from 1e-3. So the bundled koala-mini is trained by L_task alone since 0.1.0. The
  bundled teacher, `sdxl-mini-grown`, is the recipe `sdxl-mini` from it, not the other way round.
- VAE and text encoders came first, by `mini-base`, in separate processes. The decoder's number of
  samples was changed while they trained (the recipe in their run.json was rewritten), and again,
  from 64,000 to 44,000, after 26,400 of its own. The mixture of images was added to the recipe
  after the text encoders had started.
- `mini-decoder` was a recipe of its own, for the decoder alone. `mini-vae` started from its result
  and has replaced it.
- The teacher's first three parts trained on the latents of the VAE before `mini-vae`: 51,200
  samples at 64 pixels in batches of 32 at 2e-3; 128,000 at 128 pixels in batches of 64 at a
  constant 1.25e-3; and a part on mirrored images (`koala prepare --mirror`) in batches of 32 at
  8e-4, stopped at 191,488 of 256,000. `sdxl-mini-128` continued from there on the new latents, not
  from `sdxl-mini-64`. Between it and `sdxl-mini` came 15,360 samples at 5e-4.
- `koala-mini-first` was called koala-mini when it ran. `koala-mini` continued from it before
  `--student` existed; OUT/start, which that option makes, was put there by hand.
- `koala-mini-guided-first` is `koala-mini-guided` with `cut=none` and koala-mini for both
  `--teacher` and `--student`. `koala-mini-guided` is `koala-mini-lightning` from there, in
  16,384 samples.
- U-Nets, `mini-vae` and `tiny-mini` were trained with `cpu_bf16`.

| run | samples | batch | seconds | samples/s | last losses |
|---|---|---|---|---|---|
"""


def main() -> None:
    lines = HEAD.splitlines()
    total = 0.0
    for name, what in RUNS.items():
        settings = json.loads((FOLDER / name / "run.json").read_text())
        last = json.loads((FOLDER / name / "stats.jsonl").read_text().splitlines()[-1])
        losses = ", ".join(f"{key} {last[key]:.3f}" for key in SHOWN if key in last)
        rate = last["samples"] / last["seconds"]
        lines.append(
            f"| {name}: {what} | {last['samples']:,} | {settings['batch']} | "
            f"{last['seconds']:,.0f} | {rate:.0f} | {losses} |"
        )
        total += 0 if name in CONTROLS else (1 + (name in TWO_CORES)) * last["seconds"]
    lines += ["", f"The bundled models took {total / 3600:.1f} hours of one core in all.", ""]
    (FOLDER / "README.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
