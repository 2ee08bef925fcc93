"""What runs a model on a processor: PyTorch, or OpenVINO where it was measured to be faster.

Which one wins depends on the processor, the model and its size, so nobody should believe anything:
`choose` times one evaluation of each, once, and remembers the verdict for this machine, these
versions and this architecture in the cache folder. "auto" chooses among those that give the same
picture within 1e-4, "fastest" also among those that round to bfloat16 or to 8 bits.

Apple's MPS takes PyTorch's path like any other device; nobody has tried it here.
"""

import json
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor

import koala
from koala.architectures.config import pooled_width
from koala.errors import UserError
from koala.generation.decode import Decode, full
from koala.generation.denoise import Condition, Predict, evaluate, predictor
from koala.generation.runtime import openvino
from koala.generation.runtime.compile import (
    ROWS,
    compile_blocks,
    fuse_projections,
    graphed,
    in_fixed_batches,
    one_by_one,
)
from koala.generation.runtime.openvino import Calibration, Sample
from koala.text_conditioning import time_ids
from koala.utils.asset_packages import cache_folder
from koala.utils.atomic import new_file
from koala.utils.device import cpu_name, free_bytes, has_bf16

if TYPE_CHECKING:
    from koala.generation.pipeline import Pipeline

EXACT = ("torch", "openvino")
ROUNDED = ("torch-bf16", "openvino-bf16", "openvino-int8")
BACKENDS = (*EXACT, *ROUNDED, "auto", "fastest")
CALIBRATION = ("a fox, noto style", "two green apples on a light blue background")
_RUNS = 5  # timed evaluations of each; the middle one counts
_MARGIN = 1.1  # another back end must be this much faster, or PyTorch stays
_CONVERTING = 4.5  # times a U-Net's bytes that OpenVINO takes to convert it
_COST = "; it rounds: docs/speed.md has what that costs"


@dataclass(frozen=True)
class Backend:
    """What runs the two networks that cost time, and why it was chosen."""

    name: str  # of EXACT or ROUNDED
    why: str  # for a person to read
    predict: Predict
    decode: Decode


def choose(
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    asked: str | None = None,
    samples: Calibration | None = None,
) -> Backend:
    """The back end asked for; "auto" and "fastest" measure which it is, unless that is known.

    None takes what an earlier "auto" found out and never measures: a request that did not ask
    for it does not wait for a conversion. Without `samples` nothing is quantised to 8 bits.
    UserError for a back end that is unknown, not installed or not for this device or dtype, or
    too large for this machine; "auto" and "fastest" leave it out then.
    """
    if asked is not None and asked not in BACKENDS:
        raise UserError(f"back end {asked!r}: allowed are {', '.join(BACKENDS)}")
    if asked in (*EXACT, *ROUNDED):
        if reason := _lacking(asked, unet, samples):
            raise UserError(f"back end {asked!r}: {reason}")
        return _made(asked, "as asked", unet, vae, samples)
    among = (*EXACT, *ROUNDED) if asked == "fastest" else EXACT
    fitting = [one for one in among if one == "torch" or not _lacking(one, unet, samples)]
    if fitting == ["torch"]:
        return _made("torch", "the only one that fits", unet, vae)
    file = _verdict_file(unet, fitting)
    if file.is_file():
        seconds = json.loads(file.read_text())["seconds"]
    elif asked is not None:
        seconds = _measured(unet, fitting, samples)
        with new_file(file) as part:
            key = _key(unet, fitting)
            part.write_text(json.dumps({"seconds": seconds, "key": key}, indent=1) + "\n")
    else:
        return _made("torch", "none was measured: --backend auto measures", unet, vae)
    best = min(seconds, key=lambda one: seconds[one] * (1 if one == "torch" else _MARGIN))
    figures = ", ".join(f"{one} {1e3 * value:.1f} ms" for one, value in seconds.items())
    return _made(best, f"one evaluation: {figures}", unet, vae, samples)


def _lacking(backend: str, unet: UNet2DConditionModel, samples: Calibration | None) -> str | None:
    """Why a back end cannot run the U-Net here; None if it can."""
    engine, _, precision = backend.partition("-")
    dtype = str(unet.dtype).removeprefix("torch.")
    if backend == "torch":
        return None
    if unet.device.type != "cpu":
        return f"it is for the processor, this model is on {unet.device}"
    if unet.dtype != torch.float32 and not (backend == "openvino" and dtype == "bfloat16"):
        return f"it takes a model in float32 (openvino: or bfloat16), this one is in {dtype}"
    if precision == "bf16" and not has_bf16():
        return "this processor has no bfloat16; choose openvino or torch"
    needed = {"torch": (), "openvino": ("openvino",)}[engine]
    needed += ("nncf",) if precision == "int8" else ()
    if missing := [one for one in needed if find_spec(one) is None]:
        return f"{' and '.join(missing)} not installed: pip install 'koala-diffusion[openvino]'"
    if precision == "int8" and samples is None:
        return "it needs samples of the model's work"
    size = sum(p.numel() * p.element_size() for p in unet.parameters())
    free, wanted = free_bytes(unet.device), _CONVERTING * size
    if engine == "openvino" and wanted > free:
        return f"converting takes about {wanted / 2**30:.1f} GiB, {free / 2**30:.1f} are free"
    return None


def _made(
    backend: str,
    why: str,
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    samples: Calibration | None = None,
) -> Backend:
    predict = _predictor(backend, unet, samples)
    if not backend.startswith("openvino"):
        return Backend(backend, why, predict, full(vae))
    half = vae.dtype == torch.bfloat16 or backend == "openvino-bf16"
    decode = openvino.decoder(vae, "bf16" if half else "fp32")
    # What is compiled is so for one shape: requests that join and leave shall meet no new one.
    fixed = in_fixed_batches(predict)
    return Backend(backend, why, fixed, one_by_one(decode))


def _predictor(backend: str, unet: UNet2DConditionModel, samples: Calibration | None) -> Predict:
    """What predicts; the U-Net stays as it is."""
    engine, _, precision = backend.partition("-")
    if engine == "openvino":
        precision = precision or ("bf16" if unet.dtype == torch.bfloat16 else "fp32")
        by = samples if samples is not None and precision == "int8" else ()
        return openvino.predictor(unet, precision, by)
    return predictor(_in_bfloat16(unet) if precision == "bf16" else unet)


def _in_bfloat16(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A copy in bfloat16, made tensor by tensor. UserError for one with a LoRA beside it."""
    openvino.refuse_hooks(unet)
    with torch.device("meta"):
        copy = UNet2DConditionModel.from_config(unet.config)
    weights = {key: tensor.to(torch.bfloat16) for key, tensor in unet.state_dict().items()}
    copy.load_state_dict(weights, assign=True)
    return copy.eval().requires_grad_(False)


# --- the measurement ------------------------------------------------------------------------


def _measured(
    unet: UNet2DConditionModel, among: Iterable[str], samples: Calibration | None
) -> dict[str, float]:
    """Seconds of one evaluation of two rows at the model's native size, by back end."""
    return {one: seconds_of(_predictor(one, unet, samples), unet) for one in among}


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
    unet: UNet2DConditionModel,
    rows: int = 2,
    side: int | tuple[int, int] | None = None,
    tokens: int = 77,
) -> tuple[Tensor, Tensor, Condition]:
    """Random arguments of a `Predict`: latents of `side` or (height, width), or the native size."""
    config, draw = unet.config, torch.Generator().manual_seed(0)
    side = side or config.sample_size
    h, w = side if isinstance(side, tuple) else (side, side)
    pooled = pooled_width(config)
    pixels = [(8 * h, 8 * w)] * rows
    condition = Condition(
        torch.randn(rows, tokens, config.cross_attention_dim, generator=draw),
        torch.randn(rows, pooled, generator=draw),
        time_ids(pixels, [(0, 0)] * rows, pixels),
    )
    x = torch.randn(rows, config.in_channels, h, w, generator=draw)
    return x, torch.linspace(999, 1, rows), condition.to(unet.device, unet.dtype)


def _key(unet: UNet2DConditionModel, among: Iterable[str]) -> dict[str, object]:
    """All that a verdict depends on. Weights are not among it."""
    return {
        "among": list(among),
        "processor": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "openvino": version("openvino"),
        "dtype": str(unet.dtype),
        "unet": openvino.settings_of(unet),
    }


def _verdict_file(unet: UNet2DConditionModel, among: Iterable[str]) -> Path:
    return cache_folder().parent / "backends" / f"{openvino.digest([_key(unet, among)])}.json"


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
        samples = Calibration(f"{CALIBRATION} {koala.__version__}", partial(_samples, pipeline))
        chosen = choose(pipeline.unet, pipeline.vae, backend, samples)
        if chosen.name != "torch":  # which a pipeline has from the beginning
            pipeline.predict, pipeline.decode = chosen.predict, chosen.decode
        if backend is not None or chosen.name != "torch":
            cost = _COST if chosen.name in ROUNDED else ""
            say(f"back end {chosen.name} ({chosen.why}){cost}")
        return
    if compiled:
        fuse_projections(pipeline.unet)
        blocks = compile_blocks(pipeline.unet) + compile_blocks(pipeline.vae.decoder)
        pipeline.decode = one_by_one(full(pipeline.vae))
        say(f"{blocks} blocks are compiled at each size's first picture, unless in the cache")
    pipeline.predict = predictor(pipeline.unet)
    if graphs:
        pipeline.predict = graphed(pipeline.predict, pipeline.unet.device)
    pipeline.predict = in_fixed_batches(pipeline.predict)


@torch.inference_mode()
def _samples(pipeline: "Pipeline") -> list[Sample]:
    """What the U-Net is asked while two pictures are drawn, which are not decoded."""
    samples: list[Sample] = []
    predict = openvino.recorded(predictor(pipeline.unet), samples)
    rows = [pipeline.begin(request) for request in pipeline.requests([*CALIBRATION], seed=0)]
    while not rows[0].finished:
        for row, epsilon in zip(rows, evaluate(predict, rows), strict=True):
            row.advance(epsilon)
    return samples


@torch.inference_mode()
def warm_up(pipeline: "Pipeline", sizes: Iterable[tuple[int, int]], pictures: int = 1) -> None:
    """Has everything compiled, captured or packed that pictures of these sizes will need.

    sizes: (width, height) in pixels. pictures: at most so many at a time. For prompts of one
    chunk, with guidance and without; longer ones have shapes of their own.
    """
    most = min(rows for rows in ROWS if rows >= min(2 * pictures, max(ROWS)))
    for width, height in sizes:
        side = (height // pipeline.factor, width // pipeline.factor)
        for rows in (rows for rows in ROWS if rows <= most):
            asked = example(pipeline.unet, rows, side, pipeline.conditioner.tokens)
            pipeline.predict(*asked)
        pipeline.decode(asked[0][:1].to(pipeline.device))
