"""Backends on a CPU: PyTorch, or OpenVINO if it was measured to be faster.

Which is faster depends on the CPU, the model and its size. So `choose` times one evaluation of
each, once, and keeps the result for this machine, these versions and this architecture in the
cache folder. What was timed while other programs had the cores is timed again the next time.
"auto" chooses among the backends that give the same image within 1e-4, "fastest" also among those
that round to bfloat16 or to 8 bits. Unasked it does what "auto" does where that takes at most two
seconds: a small model, or one that is converted already.
"""

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from koala.architectures.config import pooled_width
from koala.checkpoints.load import build_unet
from koala.errors import UserError
from koala.generation import validation
from koala.generation.decode import Autoencoder, whole
from koala.generation.denoise import Condition, Predict
from koala.generation.pixels import Decode
from koala.generation.runtime import openvino
from koala.generation.runtime.fixed_batches import in_fixed_batches, one_by_one
from koala.generation.runtime.openvino import Calibration
from koala.generation.runtime.openvino_graph import unsupported, unsupported_decoder
from koala.generation.runtime.pytorch import predictor
from koala.generation.validation import EXACT, ROUNDED
from koala.text_conditioning import time_ids
from koala.utils.asset_packages import cache_folder
from koala.utils.atomic import new_file
from koala.utils.device import cpu_name, device_and_dtype, free_bytes, has_bf16
from koala.utils.extras import absent
from koala.utils.networks import UNet2DConditionModel

_RUNS = 5  # timed evaluations of each; the least counts
_ENOUGH = 0.5  # seconds after which one is timed no further
_OWN = 0.8  # processor seconds in a second: with less, other programs had the cores
_TIMED = 2  # counts changes of how it is timed: former results are not taken
_MARGIN = 1.1  # another backend must be this much faster than PyTorch
_CONVERTING = 4.5  # memory that OpenVINO's conversion takes, in sizes of the U-Net
SMALL = 20_000_000  # parameters of a U-Net that is converted unasked


@dataclass(frozen=True)
class Backend:
    """What runs U-Net and VAE, and why it was chosen."""

    name: str  # of EXACT or ROUNDED
    why: str  # for a person to read
    predict: Predict
    decode: Decode
    by_verdict: bool = False  # whoever names no backend on this machine gets it


def choose(
    unet: UNet2DConditionModel,
    vae: Autoencoder,
    asked: str | None = None,
    samples: Calibration | None = None,
) -> Backend:
    """The backend asked for; "auto" and "fastest" measure which it is, unless that is known.

    None is $KOALA_BACKEND. Where that is not set it is "auto" for a small model, or one that is
    converted already, and "torch" for others: who did not ask does not wait for a conversion.
    "remembered" is None without the measurement. Without `samples` nothing is quantised to 8 bits.
    UserError for a backend that is unknown, not installed, not for this device or dtype, or too
    large for this machine; "auto", "fastest" and None leave such a one out.
    """
    validation.runtime(asked, False, False)
    why = "as asked"
    if asked in (None, "remembered") and device_and_dtype(unet)[0].type == "cpu":
        named = validation.default_backend()
        asked, why = named or asked, "as $KOALA_BACKEND says"
    if asked in (*EXACT, *ROUNDED):
        if reason := _lacking(asked, unet, vae, samples):
            raise UserError(f"backend {asked!r}: {reason}")
        return _made(asked, why, unet, vae, samples)
    among = (*EXACT, *ROUNDED) if asked == "fastest" else EXACT
    fitting = [one for one in among if not _lacking(one, unet, vae, samples)]
    if fitting == ["torch"]:
        return _made("torch", f"openvino: {_lacking('openvino', unet, vae, None)}", unet, vae)
    file = _record_file(unet, fitting)
    unasked = asked in (None, "remembered")
    if unasked and not (_is_small(unet) or (file.is_file() and openvino.is_converted(unet))):
        return _made(
            "torch", "--backend auto converts the model, once, and may be faster", unet, vae
        )
    verdict = json.loads(file.read_text("utf-8")) if file.is_file() else None
    if verdict is None and asked == "remembered":
        return _made("torch", "none was measured: --backend auto measures", unet, vae)
    if verdict is None or (verdict["busy"] and asked != "remembered"):
        try:
            verdict = _measured(unet, fitting, samples)
            with new_file(file) as part:
                told = verdict | {"key": _key(unet, fitting)}
                part.write_text(json.dumps(told, indent=1) + "\n", "utf-8")
        except OSError as error:
            if not unasked:
                raise
            return _made("torch", f"the cache cannot be written: {error}", unet, vae)
    seconds = verdict["seconds"]
    best = min(seconds, key=lambda one: seconds[one] * (1 if one == "torch" else _MARGIN))
    figures = ", ".join(f"{one} {1e3 * value:.1f} ms" for one, value in seconds.items())
    beside = ", beside other work" if verdict["busy"] else ""
    made = _made(best, f"one evaluation: {figures}{beside}", unet, vae, samples)
    return replace(made, by_verdict=asked != "fastest")


def _is_small(unet: UNet2DConditionModel) -> bool:
    return sum(p.numel() for p in unet.parameters()) <= SMALL


def _lacking(
    backend: str, unet: UNet2DConditionModel, vae: Autoencoder, samples: Calibration | None
) -> str | None:
    """Why a backend cannot run the model here; None if it can."""
    engine, _, precision = backend.partition("-")
    dtype = str(unet.dtype).removeprefix("torch.")
    if backend == "torch":
        return None
    device, _ = device_and_dtype(unet)
    if device.type != "cpu":
        return f"it runs on the CPU, this model is on {device}"
    if unet.dtype != torch.float32 and not (backend == "openvino" and dtype == "bfloat16"):
        return f"it takes a model in float32 (openvino: or bfloat16), this one is in {dtype}"
    if precision == "bf16" and not has_bf16():
        return "this CPU has no bfloat16; choose openvino or torch"
    needed = {"torch": (), "openvino": ("openvino",)}[engine]
    needed += ("nncf",) if precision == "int8" else ()
    if lacking := absent("openvino", *needed):
        return lacking
    if precision == "int8" and samples is None:
        return "it needs samples of the U-Net's inputs"
    strange = unsupported(unet.config) or unsupported_decoder(vae.config)
    if engine == "openvino" and strange:
        return strange
    size = sum(p.numel() * p.element_size() for p in unet.parameters())
    free, wanted = free_bytes(device), _CONVERTING * size
    if engine == "openvino" and wanted > free:
        return f"conversion takes about {wanted / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
    return None


def _made(
    backend: str,
    why: str,
    unet: UNet2DConditionModel,
    vae: Autoencoder,
    samples: Calibration | None = None,
) -> Backend:
    predict = _predictor(backend, unet, samples)
    if not backend.startswith("openvino"):
        return Backend(backend, why, predict, whole(vae))
    half = vae.dtype == torch.bfloat16 or backend == "openvino-bf16"
    decode = openvino.decoder(vae, "bf16" if half else "fp32")
    # Compiled for one shape: requests that join and leave must not cause a new one.
    fixed = in_fixed_batches(predict)
    return Backend(backend, why, fixed, one_by_one(decode))


def _predictor(backend: str, unet: UNet2DConditionModel, samples: Calibration | None) -> Predict:
    """The backend's `Predict`; the U-Net is not changed."""
    engine, _, precision = backend.partition("-")
    if engine == "openvino":
        precision = precision or ("bf16" if unet.dtype == torch.bfloat16 else "fp32")
        by = samples if samples is not None and precision == "int8" else ()
        return openvino.predictor(unet, precision, by)
    return predictor(_in_bfloat16(unet) if precision == "bf16" else unet)


def _in_bfloat16(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A copy in bfloat16, made tensor by tensor. UserError if a LoRA lies beside the weights."""
    openvino.refuse_hooks(unet)
    with torch.device("meta"):
        copy = build_unet(unet.config)
    weights = {key: tensor.to(torch.bfloat16) for key, tensor in unet.state_dict().items()}
    copy.load_state_dict(weights, assign=True)
    return copy.eval().requires_grad_(False)


# --- the measurement ------------------------------------------------------------------------


def _measured(
    unet: UNet2DConditionModel, among: Iterable[str], samples: Calibration | None
) -> dict[str, Any]:
    """A verdict: `seconds` of one evaluation by backend, and whether the machine was `busy`."""
    each = {one: timed(_predictor(one, unet, samples), unet) for one in among}
    return {
        "seconds": {one: seconds for one, (seconds, _) in each.items()},
        "busy": any(busy for _, busy in each.values()),
    }


@torch.inference_mode()
def timed(predict: Predict, unet: UNet2DConditionModel) -> tuple[float, bool]:
    """Least seconds of an evaluation of two rows at the U-Net's native size; if others ran."""
    asked = example(unet)
    predict(*asked)  # warm-up: compiling and packing are not timed
    seconds: list[float] = []
    worked = time.process_time()
    while len(seconds) < _RUNS and sum(seconds) < _ENOUGH:
        start = time.perf_counter()
        predict(*asked)
        seconds.append(time.perf_counter() - start)
    return min(seconds), time.process_time() - worked < _OWN * sum(seconds)


def example(
    unet: UNet2DConditionModel,
    rows: int = 2,
    side: int | tuple[int, int] | None = None,
    tokens: int = 77,
) -> tuple[Tensor, Tensor, Condition]:
    """Random arguments of a `Predict`: latents of `side` or (height, width), by default native."""
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
    return x, torch.linspace(999, 1, rows), condition.to(*device_and_dtype(unet))


def _key(unet: UNet2DConditionModel, among: Iterable[str]) -> dict[str, object]:
    """All that a measurement depends on. The weights' values do not matter."""
    return {
        "timed": _TIMED,
        "among": list(among),
        "processor": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "openvino": version("openvino"),
        "dtype": str(unet.dtype),
        "unet": openvino.settings_of(unet),
    }


def _record_file(unet: UNet2DConditionModel, among: Iterable[str]) -> Path:
    return cache_folder() / "backends" / f"{openvino.digest([_key(unet, among)])}.json"
