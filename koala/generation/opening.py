"""Opens a model by the lightest way that draws what is asked for. Importing this loads no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from koala.checkpoints.bundled import DEFAULT
from koala.checkpoints.resolve import name_of, resolve_model
from koala.errors import UserError
from koala.generation import form
from koala.generation.validation import default_backend

if TYPE_CHECKING:
    import torch

    from koala.generation.light import LightPipeline
    from koala.generation.pipeline import Pipeline

# What a form cannot do, by `loader.load`'s arguments: it is for PyTorch.
_TORCH_ONLY = (
    "dtype", "lora", "compile", "graphs", "vram", "weights", "decode", "tiny_vae", "from_image",
)  # fmt: skip


def load(
    model: str | Path = DEFAULT,
    device: torch.device | str | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    lora: Mapping[str | Path, float] | None = None,
    backend: str | None = None,
    compile: bool = False,
    graphs: bool = False,
    vram: float | str | None = None,
    weights: str | None = None,
    decode: str | None = None,
    tiny_vae: str | Path | None = None,
    size: tuple[int, int] | str | None = None,
    images: int = 1,
    from_image: bool = False,
    say: Callable[[str], object] = lambda line: None,
) -> Any:
    """Loads a model, ready to draw.

    model: a bundled name, a pipeline folder, a single file, a Hub id, or the folder of an OpenVINO
        form, which draws without PyTorch and has neither weights nor LoRAs.
    device: "cpu", "cuda", "cuda:1" or "mps"; by default the best there is.
    dtype: "fp32", "fp16", "bf16" or torch's, of U-Net and text encoders; by default float32 on
        the CPU, else float16. The VAE has it too, but on the CPU and where its config asks for
        `force_upcast` it is float32.
    lora: LoRA files and their scales, -100 to 100. They lie beside the weights, where
        `Pipeline.scale_lora` and `remove_lora` reach them; with any of the arguments from
        `backend` to `tiny_vae` they are merged into the weights, which costs no time per step.

    How PyTorch or OpenVINO runs it, all on one device:

    backend: by default $KOALA_BACKEND, else the fastest exact one, if finding out which it is
        takes no longer than two seconds (`koala.generation.runtime.backends.choose`). "torch",
        "openvino", "torch-bf16", "openvino-bf16", "openvino-int8"; "auto" and "fastest" measure
        the exact ones, or all, once per machine; "remembered" takes what was measured. All but
        "torch" draw with a copy of the U-Net's weights as they are now. While a LoRA is added to
        the pipeline later, or a request has one, PyTorch draws.
    compile: fuse the U-Net's projections and compile the blocks of U-Net and VAE.
    graphs: replay the U-Net from CUDA graphs. CUDA only.

    Or a memory plan (`koala.generation.memory.plan`), kept as `Pipeline.plan`:

    vram: GiB that the model may take, or "free": nine tenths of what is free now (the default if
        one of the next three is given).
    weights: "fp32", "fp16", "bf16" to compute in, or "int8", "fp8", "int4" to store U-Net and text
        encoders in; by default the largest that fits.
    decode: "full", "tiled" (by rows) or "tiny" (a tiny autoencoder); by default what fits. "full"
        and "tiny", without `vram` and `weights`, leave the backend on a CPU free, as by default.
    tiny_vae: folder or Hub id of the tiny autoencoder; by default the model's own.
    size, images, from_image: what the plan must hold: the images' size as in
        `Pipeline.requests`, how many will be asked for at once, and whether they start from
        others. Without a plan they are not used.

    say: called with a line for each LoRA, a backend that was chosen, and a plan
        that was given up because memory ran out.

    Raises UserError for a model that is not found or damaged, a device that is not there, a value
    that is not allowed, arguments that exclude each other, a backend that is not installed, and
    a budget that nothing fits into.
    """
    options: dict[str, Any] = {
        "dtype": dtype,
        "lora": lora,
        "backend": backend,
        "compile": compile,
        "graphs": graphs,
        "vram": vram,
        "weights": weights,
        "decode": decode,
        "tiny_vae": tiny_vae,
        "size": size,
        "images": images,
        "from_image": from_image,
        "say": say,
    }
    if form.is_form(model) or find_spec("torch") is None:
        return open_model(model, device, **options)
    from koala.generation.loader import load as load_with_torch

    return load_with_torch(model, device, **options)


def open_model(
    model: str | Path = DEFAULT,
    device: Any = None,
    *,
    of_requests: Sequence[str] = (),
    **options: Any,
) -> Pipeline | LightPipeline:
    """The model's form, if it has one that serves these arguments of `load`; else as `load`.

    of_requests: names of what requests will bring that a form cannot serve, such as "lora_dir".
    UserError as from `load`; for arguments that a form's folder cannot serve; and where PyTorch is
    needed and not installed.
    """
    demanded = [*(name for name in _TORCH_ONLY if options.get(name)), *of_requests]
    if device not in (None, "cpu"):
        demanded.insert(0, "device")
    if form.is_form(model):
        return _of_folder(Path(model).expanduser(), demanded, options.get("backend"))
    backend = options.get("backend")
    # On a machine with a GPU the model is drawn there, unless the processor is asked for.
    if not demanded and (device == "cpu" or backend in form.BACKENDS or not _has_gpu()):
        if backend in (None, "remembered"):
            backend = default_backend() or "remembered"
        place = form.found(resolve_model(model), backend)
        if place is not None and find_spec("openvino") and find_spec("tokenizers"):
            from koala.generation.light import LightPipeline

            pipeline = LightPipeline(place, name_of(model))
            options.get("say", str)(f"backend {pipeline.form.backend} (from the cache)")
            return pipeline
    if find_spec("torch") is None:
        raise UserError(
            f"{model} needs PyTorch, which is not installed: pip install torch, or write the "
            "model's OpenVINO form where it is: koala export MODEL --to openvino --out DIR"
        )
    from koala.generation.loader import load as load_with_torch

    return load_with_torch(model, device, **options)


def _of_folder(folder: Path, demanded: list[str], backend: str | None) -> LightPipeline:
    from koala.generation.light import LightPipeline

    own = form.Form.read(folder).backend
    if backend not in (None, own, *form.REMEMBERED):
        demanded = ["backend", *demanded]
    if demanded:
        named = ", ".join("--" + name.replace("_", "-") for name in demanded)
        raise UserError(
            f"{folder} is an OpenVINO form, which runs as {own} on the CPU: leave out {named}, or "
            "name the model that it was made of"
        )
    return LightPipeline(folder)


def _has_gpu() -> bool:
    """Whether the system has what PyTorch would take first, told without PyTorch."""
    import platform

    apple = platform.system() == "Darwin" and platform.machine() == "arm64"
    return apple or Path("/dev/nvidiactl").exists() or Path("/dev/kfd").exists()
