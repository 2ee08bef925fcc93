"""What bf16 brings to a training on a processor: gradients of the mini teacher, in three ways.

`OMP_NUM_THREADS=1 python -m benchmarks.training_precision`

float32; PyTorch's autocast as it is; and ours, which keeps attention and group norm in float32
(`koala.distillation.precision`). In processor seconds, in turns, the least of each.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from benchmarks.record import keep
from koala.architectures.config import unet_config
from koala.architectures.table import get
from koala.distillation.precision import computing
from koala.utils.device import hardware

BATCH, ROUNDS = 32, 6
CPU = torch.device("cpu")
WAYS: dict[str, Callable[[], AbstractContextManager]] = {
    "float32": nullcontext,
    "autocast": partial(torch.autocast, "cpu", torch.bfloat16),
    "ours": partial(computing, CPU, torch.bfloat16),
}


def main() -> None:
    architecture = get("sdxl-mini")
    unet = UNet2DConditionModel(**unet_config(architecture))
    unet.to(memory_format=torch.channels_last)
    side, words = architecture.sample, 32
    noisy = torch.randn(BATCH, 4, side, side).to(memory_format=torch.channels_last)
    text = torch.randn(BATCH, words, unet.config.cross_attention_dim)
    pooled = unet.config.projection_class_embeddings_input_dim
    added = {
        "text_embeds": torch.randn(BATCH, pooled - 6 * unet.config.addition_time_embed_dim),
        "time_ids": torch.randn(BATCH, 6),
    }
    least = dict.fromkeys(WAYS, float("inf"))
    for _ in range(ROUNDS):
        for name, way in WAYS.items():
            start = time.process_time()
            with way():
                drawn = unet(
                    noisy, torch.randint(0, 1000, (BATCH,)), text, added_cond_kwargs=added
                ).sample
            (drawn.float() - noisy).square().mean().backward()
            unet.zero_grad()
            least[name] = min(least[name], time.process_time() - start)
    figures = {
        "command": "OMP_NUM_THREADS=1 python -m benchmarks.training_precision",
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
        "model": "sdxl-mini",
        "batch": BATCH,
        "samples a processor second": {n: round(BATCH / s, 1) for n, s in least.items()},
    }
    keep(Path("benchmarks/training_precision.json"), figures)


if __name__ == "__main__":
    main()
