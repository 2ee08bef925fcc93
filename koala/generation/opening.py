"""Opens a model by the lightest way that draws what is asked for. Importing this loads no torch."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from koala.checkpoints.resolve import resolve_model
from koala.errors import UserError
from koala.generation import form
from koala.generation.validation import default_backend

if TYPE_CHECKING:
    from koala.generation.light import LightPipeline
    from koala.generation.pipeline import Pipeline

# What a form cannot do, by `loader.load`'s arguments: it is for PyTorch.
_TORCH_ONLY = (
    "dtype", "lora", "compile", "graphs", "vram", "weights", "decode", "tiny_vae", "from_image",
)  # fmt: skip


def load(model: str | Path = "koala-mini", device: Any = None, **options: Any) -> Any:
    """`koala.generation.loader.load`, and the folder of an OpenVINO form.

    A form draws without PyTorch and has neither weights nor LoRAs. So does any model that has a
    form in the cache where PyTorch is not installed.
    """
    if form.is_form(model) or find_spec("torch") is None:
        return open_model(model, device, **options)
    from koala.generation.loader import load as load_with_torch

    return load_with_torch(model, device, **options)


def open_model(
    model: str | Path = "koala-mini", device: Any = None, **options: Any
) -> Pipeline | LightPipeline:
    """The model's form, if it has one that serves these arguments of `load`; else as `load`.

    UserError as from `load`; for arguments that a form's folder cannot serve; and where PyTorch is
    needed and not installed.
    """
    demanded = [name for name in _TORCH_ONLY if options.get(name)]
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

            name = Path(model).resolve().name if Path(model).exists() else str(model)
            pipeline = LightPipeline(place, name)
            options.get("say", str)(f"backend {pipeline.form.backend} (from the cache)")
            return pipeline
    if find_spec("torch") is None:
        raise UserError(
            f"{model} needs PyTorch, which is not installed: pip install torch, or write the "
            "model's OpenVINO form where it is: koala convert MODEL --to openvino --out DIR"
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
