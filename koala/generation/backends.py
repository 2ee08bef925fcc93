"""What runs a model on a processor: PyTorch, or OpenVINO where it was measured to be faster.

Which one wins depends on the processor, the model and its size, so nobody should believe anything:
`choose` times one step of each, once, and remembers the verdict for this machine, these versions
and this architecture in the cache folder. Both give the same picture within 1e-4 in fp32.

Apple's MPS takes PyTorch's path like any other device; nobody has tried it here.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor

from koala.conditioning import time_ids
from koala.errors import UserError
from koala.generation import openvino, speed
from koala.generation.decode import Decode, full
from koala.generation.denoise import Condition, Predict, predictor
from koala.output import new_file
from koala.packages import cache_folder
from koala.processor import has_bf16, name

if TYPE_CHECKING:
    from koala.generation.pipeline import Pipeline

BACKENDS = ("torch", "openvino", "auto")
_RUNS = 5  # timed evaluations of each; the middle one counts
_MARGIN = 1.1  # another back end must be this much faster, or PyTorch stays


@dataclass(frozen=True)
class Backend:
    """What runs the two networks that cost time, and why it was chosen."""

    name: str  # "torch" or "openvino"
    why: str  # for a person to read
    predict: Predict
    decode: Decode


def choose(unet: UNet2DConditionModel, vae: AutoencoderKL, asked: str | None = None) -> Backend:
    """The back end asked for; "auto" measures which is faster, unless that is known already.

    None takes what an earlier "auto" found out and never measures: a request that did not ask
    for it does not wait for a conversion. UserError for a back end that is unknown, not installed
    or not for this device or dtype; "auto" takes PyTorch then.
    """
    if asked is not None and asked not in BACKENDS:
        raise UserError(f"back end {asked!r}: allowed are {', '.join(BACKENDS)}")
    fits = unet.device.type == "cpu" and unet.dtype in (torch.float32, torch.bfloat16)
    if asked == "openvino" and not fits:
        raise UserError(
            f"back end 'openvino' runs on the processor in float32 or bfloat16; this model is on "
            f"{unet.device} in {str(unet.dtype).removeprefix('torch.')}"
        )
    if asked in ("torch", "openvino"):
        return _made(asked, "as asked", unet, vae)
    if not (fits and openvino.installed()):
        return _made("torch", "the only one that fits", unet, vae)
    file = _verdict_file(unet)
    if file.is_file():
        seconds = json.loads(file.read_text())["seconds"]
    elif asked == "auto":
        seconds = _measured(unet)
        with new_file(file) as part:
            part.write_text(json.dumps({"seconds": seconds, "key": _key(unet)}, indent=1) + "\n")
    else:
        return _made("torch", "none was measured: --backend auto measures", unet, vae)
    faster = seconds["openvino"] * _MARGIN < seconds["torch"]
    figures = ", ".join(f"{name} {1e3 * value:.1f} ms" for name, value in seconds.items())
    return _made("openvino" if faster else "torch", f"one evaluation: {figures}", unet, vae)


def _made(backend: str, why: str, unet: UNet2DConditionModel, vae: AutoencoderKL) -> Backend:
    if backend == "torch":
        return Backend(backend, why, predictor(unet), full(vae))
    precision = {torch.float32: "fp32", torch.bfloat16: "bf16"}
    return Backend(
        backend,
        why,
        openvino.predictor(unet, precision[unet.dtype]),
        openvino.decoder(vae, precision[vae.dtype]),
    )


# --- the measurement ------------------------------------------------------------------------


def _measured(unet: UNet2DConditionModel) -> dict[str, float]:
    """Seconds of one evaluation of two rows at the model's native size, by back end."""
    precision = "bf16" if unet.dtype == torch.bfloat16 else "fp32"
    made: dict[str, Callable[[], Predict]] = {
        "torch": lambda: predictor(unet),
        "openvino": lambda: openvino.predictor(unet, precision),
    }
    return {name: seconds_of(make(), unet) for name, make in made.items()}


@torch.inference_mode()
def seconds_of(predict: Predict, unet: UNet2DConditionModel, runs: int = _RUNS) -> float:
    """Seconds of one evaluation (the middle of `runs`), two rows at the U-Net's native size."""
    asked = example(unet)
    predict(*asked)  # warm: what is compiled or packed once is not timed
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        predict(*asked)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def example(
    unet: UNet2DConditionModel, rows: int = 2, side: int | None = None, tokens: int = 77
) -> tuple[Tensor, Tensor, Condition]:
    """Random arguments of a `Predict`: latents of `side` (default: the native one)."""
    config, draw = unet.config, torch.Generator().manual_seed(0)
    side = side or config.sample_size
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    pixels = [(8 * side, 8 * side)] * rows
    condition = Condition(
        torch.randn(rows, tokens, config.cross_attention_dim, generator=draw),
        torch.randn(rows, pooled, generator=draw),
        time_ids(pixels, [(0, 0)] * rows, pixels),
    )
    x = torch.randn(rows, config.in_channels, side, side, generator=draw)
    return x, torch.linspace(999, 1, rows), condition.to(unet.device, unet.dtype)


def _key(unet: UNet2DConditionModel) -> dict[str, object]:
    """All that a verdict depends on. Weights are not among it."""
    return {
        "processor": name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "openvino": version("openvino"),
        "dtype": str(unet.dtype),
        "unet": openvino.settings_of(unet),
    }


def _verdict_file(unet: UNet2DConditionModel) -> Path:
    return cache_folder().parent / "backends" / f"{openvino.digest([_key(unet)])}.json"


def torch_dtype(name: str) -> torch.dtype:
    """fp32, fp16 or bf16 as PyTorch's; UserError for any other name."""
    dtypes = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    if name not in dtypes:
        raise UserError(f"dtype {name!r}: allowed are {', '.join(dtypes)}")
    return dtypes[name]


def check_dtype(dtype: torch.dtype, device: torch.device) -> None:
    """UserError for a dtype that the device lacks, or only emulates."""
    named = str(dtype).removeprefix("torch.")
    if device.type == "cpu" and dtype == torch.float16:
        raise UserError(f"dtype {named}: no processor computes in it; choose fp32, or bf16")
    if device.type == "cpu" and dtype == torch.bfloat16 and not has_bf16():
        raise UserError(f"dtype {named}: this processor has none; choose fp32")
    if (
        device.type == "cuda"
        and dtype == torch.bfloat16
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        raise UserError(
            f"dtype {named}: {torch.cuda.get_device_name(device)} has none; choose fp16"
        )


# --- a whole pipeline -----------------------------------------------------------------------


def equip(
    pipeline: "Pipeline",
    backend: str | None = None,
    compiled: bool = False,
    graphs: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Gives a loaded pipeline what runs its networks: what `koala generate` does.

    `compiled` fuses the U-Net's projections and compiles the blocks of U-Net and VAE, `graphs`
    replays evaluations from CUDA graphs; both are PyTorch's. `say` is told what was chosen and
    why. To be called when every LoRA has been merged. UserError for what does not go together.
    """
    if (compiled or graphs) and backend not in (None, "torch"):
        asked = "--compile" if compiled else "--graphs"
        raise UserError(f"{asked} is PyTorch's: it does not go with --backend {backend}")
    if not (compiled or graphs):
        chosen = choose(pipeline.unet, pipeline.vae, backend)
        if chosen.name != "torch":  # which a pipeline has from the beginning
            pipeline.predict, pipeline.decode = chosen.predict, chosen.decode
        if backend is not None or chosen.name != "torch":
            say(f"back end {chosen.name} ({chosen.why})")
        return
    if compiled:
        speed.fuse_projections(pipeline.unet)
        blocks = speed.compile_blocks(pipeline.unet) + speed.compile_blocks(pipeline.vae.decoder)
        say(f"{blocks} blocks are compiled at each size's first picture, unless in the cache")
    pipeline.predict = predictor(pipeline.unet)
    if graphs:
        pipeline.predict = speed.graphed(pipeline.predict, pipeline.unet.device)
