"""What `koala generate --vram` plans for SDXL and KOALA at 1024 x 1024 on a GPU, in fp16.

`python -m benchmarks.memory_plans` prints the tables of docs/draw-any-sdxl.md. Nothing in it is
measured: weights are counted from the architectures, and the work by running it on meta tensors.
"""

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.random_sdxl import BIG_G, CLIP, CLIP_L, VAE
from koala.architectures.config import unet_config
from koala.architectures.table import get
from koala.errors import UserError
from koala.generation.memory.plan import GIB, LADDER, Mode, Planner

MODELS = {"sdxl": "SDXL and its fine-tunes", "koala-1b": "KOALA-1B", "koala-700m": "KOALA-700M"}
SIZE = (1024, 1024)
BUDGETS = (8, 6, 4, 3)  # GiB
INT4 = (("int4", "resident", "tiled"), ("int4", "model offload", "tiled"))
CHOICES = (*LADDER[:3], (None, "model offload", "tiled"), *LADDER[3:], *INT4)


def folder_of(name: str, place: Path) -> Path:
    """A model folder of configs alone, with the tiny decoder's, which is TAESD's."""
    configs = {
        "unet": unet_config(get(name)),
        "vae": {**VAE, "force_upcast": False},  # another VAE runs in bf16, of the same size
        "text_encoder": CLIP | CLIP_L,
        "text_encoder_2": CLIP | BIG_G,
        "vae_tiny": {"_class_name": "AutoencoderTiny"},
    }
    for part, config in configs.items():
        (place / name / part).mkdir(parents=True)
        (place / name / part / "config.json").write_text(json.dumps(config))
    return place / name


def main() -> None:
    device = torch.device("cuda")
    with tempfile.TemporaryDirectory() as place:
        planners = {name: Planner(folder_of(name, Path(place)), device, SIZE) for name in MODELS}
        print(f"| weights, placement, decoder | {' | '.join(MODELS.values())} |")
        print("|---|" + "---:|" * len(MODELS))
        for quantised, where, decode in CHOICES:
            mode = Mode("fp16", "fp16", quantised, where, decode)
            peaks = [f"{planner.plan(mode).peak / GIB:.2f}" for planner in planners.values()]
            print(f"| {mode.weights}, {where}, {decode} | {' | '.join(peaks)} |")
        print(f"\n| `--vram` | {' | '.join(MODELS.values())} |\n|---|" + "---|" * len(MODELS))
        for budget in BUDGETS:
            chosen = [_chosen(planner, budget) for planner in planners.values()]
            print(f"| {budget} | {' | '.join(chosen)} |")


def _chosen(planner: Planner, budget: int) -> str:
    try:
        plan = replace(planner.choose(budget * GIB), budget=None)
    except UserError:
        return "does not fit"
    mode = plan.mode
    return f"{mode.weights}, {mode.place}, {mode.decode}: {plan.peak / GIB:.2f}"


if __name__ == "__main__":
    main()
