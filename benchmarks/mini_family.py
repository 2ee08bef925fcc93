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
    "sdxl-mini-64": "teacher, first part, at 64 pixels",
    "sdxl-mini-128": "teacher, second part, at 128 pixels",
    "sdxl-mini": "teacher, to its end",
    "koala-mini": "student: L_task + L_outKD + L_featKD",
    "koala-mini-sa": "the same in fewer samples",
    "koala-mini-task": "control: L_task alone",
    "koala-mini-task-out": "control: L_task + L_outKD",
    "tiny-mini": "tiny autoencoder",
    "mini-decoder": "the VAE's decoder, further, at 128 pixels",
}
SHOWN = ("pixel", "perceptual", "latent", "text", "word", "task", "out", "feat")
THREADS = {"mini-decoder": 2}  # all others: one
CONTROLS = ("koala-mini-sa", "koala-mini-task", "koala-mini-task-out")


def main() -> None:
    lines = [
        "# The runs behind the bundled model",
        "",
        "Made with the recipes of `koala/recipes/mini.py` and the commands of",
        "`docs/mini-family.md` on 2 cores of an AMD EPYC (AVX-512), one thread a run, Python 3.11,",
        "torch 2.13.0 (CPU), diffusers 0.42.1, transformers 5.23.0. The second core had other work",
        "too, so the rates of decoder and text are lower bounds. Losses are means of the last line",
        "of `stats.jsonl`. This table is made by `python -m benchmarks.mini_family`.",
        "",
        "How the runs were started: VAE and decoder by the command of `mini-base`, the text side",
        "beside them by the same function in a process of its own, and the teacher while the",
        "decoder still was trained (its latents depend on the encoder alone); the decoder was put",
        "into every model afterwards. The decoder's number of samples in the recipe was changed",
        "while VAE and text were trained (the recipe in their run.json was written anew), and once",
        "more, from 64,000 to 44,000, after 26,400 of its own. The mixture of its pictures came",
        "into the recipe after the text side had begun. Their own settings are those they began",
        "with.",
        "",
        "The teacher and the students came later, with the VAE and the text side as they were",
        "bundled (fp16). `sdxl-mini-64` began in two processes and went on in one, and its number",
        "of samples was changed from 160,000 to 80,000 meanwhile. `sdxl-mini-128` ran under the",
        "name of `sdxl-mini`. From `sdxl-mini` on, U-Nets were trained with `hardware.cpu_bf16`.",
        "The machine had other work beside them, so rates are lower bounds.",
        "`mini-decoder` came last, from the bundled VAE, and was put under the finished U-Nets,",
        "whose latents are the same; `tiny-mini` learnt from the decoder before it. It took two",
        "threads, so each of its seconds counts twice.",
        "",
        "| run | samples | batch | seconds | samples/s | last losses |",
        "|---|---|---|---|---|---|",
    ]
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
        total += 0 if name in CONTROLS else THREADS.get(name, 1) * last["seconds"]
    lines += ["", f"All that the bundled model took: {total / 3600:.1f} hours of one core.", ""]
    (FOLDER / "README.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
