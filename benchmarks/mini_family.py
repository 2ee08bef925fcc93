"""The record of the runs that made the bundled model, as a table.

`python -m benchmarks.mini_family` reads `run.json` and `stats.jsonl` of every run below
`benchmarks/mini_family` and writes the table into `README.md` there.
"""

import json
from pathlib import Path

FOLDER = Path(__file__).parent / "mini_family"
RUNS = {  # folder -> what it made
    "vae": "VAE",
    "decoder": "its decoder, further",
    "text": "text side",
    "mini-decoder": "the VAE's decoder, further, at 128 pixels",
    "mini-vae": "the VAE, further, at 128 pixels",
    "former-64": "teacher on the former latents, at 64 pixels",
    "former-128": "the same, at 128 pixels",
    "former-mirrored": "the same, half of the emoji mirrored",
    "sdxl-mini-128": "teacher on the latents of mini-vae",
    "sdxl-mini-between": "the same, a little further",
    "sdxl-mini": "teacher, to its end",
    "koala-mini-first": "student: L_task + L_outKD + L_featKD",
    "koala-mini": "the same, to its end, with more icons",
    "koala-mini-sa": "the same in fewer samples",
    "koala-mini-task": "control: L_task alone",
    "koala-mini-task-out": "control: L_task + L_outKD",
    "tiny-mini": "tiny autoencoder",
}
SHOWN = ("pixel", "perceptual", "latent", "text", "word", "task", "out", "feat")
TWO_CORES = (
    "mini-decoder", "mini-vae", "former-128", "former-mirrored", "sdxl-mini-128", "sdxl-mini",
    "koala-mini-first", "koala-mini",
)  # fmt: skip
CONTROLS = ("koala-mini-sa", "koala-mini-task", "koala-mini-task-out")


HEAD = """# The runs behind the bundled model

Made by the commands of `docs/mini-family.md` on 2 cores of an AMD EPYC (AVX-512), Python 3.11,
torch 2.13.0 (CPU), diffusers 0.42.1, transformers 5.23.0. The machine had other work beside them,
so rates are lower bounds. Losses are means of the last line of `stats.jsonl`. This table is made by
`python -m benchmarks.mini_family`.

Where they differ from the recipes of `koala/recipes/mini.py`:

- VAE and text side came first, by `mini-base`, in processes of their own. The decoder's number of
  samples was changed while VAE and text were trained (the recipe in their run.json was written
  anew), and once more, from 64,000 to 44,000, after 26,400 of its own. The mixture of its pictures
  came into the recipe after the text side had begun.
- `mini-decoder` was a recipe of its own, for the decoder alone; `mini-vae` went on from what it
  made and has replaced it.
- The teacher's first three parts learnt on the latents of the VAE before `mini-vae`: 51,200 samples
  at 64 pixels in batches of 32 at 2e-3, 128,000 at 128 pixels in batches of 64 at 1.25e-3, not
  falling, and a part on mirrored pictures (`koala prepare --mirror`) in batches of 32 at 8e-4,
  which was stopped at 191,488 of 256,000. `sdxl-mini-128` went on from there, on the new latents,
  instead of from `sdxl-mini-64`; between it and `sdxl-mini` were 15,360 samples at 5e-4.
- `koala-mini-first` was called koala-mini when it ran; `koala-mini` went on from it before there
  was `--student`: what that makes, OUT/start, had been put there by hand. `tiny-mini` learnt from
  `koala-mini-first`, whose VAE is the same.
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
    lines += ["", f"All that the bundled model took: {total / 3600:.1f} hours of one core.", ""]
    (FOLDER / "README.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
