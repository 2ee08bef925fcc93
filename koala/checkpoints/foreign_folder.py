"""Names what a folder is that holds no SDXL pipeline, and says what to give instead."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

UNET_CLASS = "UNet2DConditionModel"
_ALONE = {  # class or model type in config.json -> what such a folder is
    UNET_CLASS: "a U-Net alone: add --base MODEL with the SDXL model that it was made from",
    "AutoencoderKL": "a VAE alone, which the option --vae takes",
    "AutoencoderTiny": "a tiny autoencoder, which `koala generate --tiny-vae` takes",
    "ControlNetModel": "a ControlNet, which is applied to a model with `koala generate --control`",
    "clip_text_model": "a text encoder alone",
    "clip": "a CLIP model, a text and an image encoder",
    "clip_vision_model": "an image encoder, which `koala generate --image-encoder` takes",
}
_FILES = (  # a file that tells what a folder is
    ("adapter_config.json", "an adapter of PEFT: give its .safetensors file, a LoRA's with --lora"),
    ("pytorch_lora_weights.safetensors", "a LoRA's folder: give its file with --lora"),
    ("run.json", "a training's folder"),
    ("latents.json", "data of koala prepare: give a model"),
    ("scheduler_config.json", "a scheduler alone"),
    ("tokenizer_config.json", "a tokenizer alone"),
)
_EXPORTED = (  # a file that tells which runtime a folder was written for
    ("form.json", "a model for OpenVINO by koala export, from which generate and serve draw"),
    ("unet/openvino_model.xml", "a model for OpenVINO, which koala does not read"),
    ("unet/model.onnx", "a model for ONNX Runtime, which koala does not read"),
)
_PICKLES = (".ckpt", ".pt", ".pth", ".bin")
_SHOWN = 4  # names
_LONGEST_REF = 256  # bytes: a commit's name


def folder_kind(folder: Path, config: Mapping[str, Any]) -> str:
    """What a folder without model_index.json is; "" if that is not known.

    config: the content of its config.json, if it has one.
    """
    if (folder.parent / "model_index.json").is_file():
        return f"the {folder.name} of a model: give the folder {folder.parent}"
    if kind := str(config.get("_class_name") or config.get("model_type") or ""):
        return _ALONE.get(kind, f"a {kind}, which koala does not read")
    if snapshot := _of_cache(folder):
        return f"the Hub's cache of a model: give {snapshot}"
    models = [
        *folder.glob("*/model_index.json"),
        *folder.glob("snapshots/*/model_index.json"),
        *folder.glob("models--*/snapshots/*/model_index.json"),
    ]
    if models:
        return f"a folder of models: give {_some(sorted(file.parent for file in models))}"
    for name, what in _FILES:
        if (folder / name).is_file():
            return what
    files = sorted(path for path in folder.iterdir() if path.is_file())
    if weights := [path for path in files if path.suffix == ".safetensors"]:
        return f"a folder of files: give {_some(weights)}"
    if pickles := [path.name for path in files if path.suffix in _PICKLES]:
        return (
            f"a folder of pickles ({pickles[0]}), which can run code when opened, so koala never "
            "opens them: download the model's .safetensors"
        )
    return "" if any(folder.iterdir()) else "an empty folder"


def exported_kind(folder: Path) -> str:
    """What a folder is that was written for another runtime; "" for every other one."""
    kinds = (what for name, what in _EXPORTED if (folder / name).is_file())
    return next((f"{what}: give the model that it was made of" for what in kinds), "")


def _of_cache(folder: Path) -> Path | None:
    """The version of a model that the Hub's cache calls the main one."""
    main = folder / "refs" / "main"
    if not main.is_file() or main.stat().st_size > _LONGEST_REF:
        return None
    snapshot = folder / "snapshots" / main.read_text(errors="replace").strip()
    return snapshot if (snapshot / "model_index.json").is_file() else None


def _some(paths: Iterable[Path]) -> str:
    names = [str(path) for path in paths]
    more = f" or one of {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return " or ".join(names[:_SHOWN]) + more


def foreign_unet(config: Mapping[str, Any]) -> str:
    """What a U-Net of another model than SDXL is, by its config; "" if it may do."""
    if config.get("time_cond_proj_dim"):
        return (
            "a latent consistency model's U-Net (LCM), which takes the guidance as an input "
            "(time_cond_proj_dim): use its base model with the LCM-LoRA (--lora)"
        )
    widths, context = config.get("block_out_channels"), config.get("cross_attention_dim")
    if context == 1280 and isinstance(widths, list) and widths[:1] == [384]:
        return "the SDXL refiner's U-Net: give the base model"
    if config.get("encoder_hid_dim_type") == "text_proj":
        return "a U-Net that projects its text embeddings (Kolors), SDXL's does not"
    family = {768: "SD 1.5's", 1024: "SD 2's"}.get(context if isinstance(context, int) else 0)
    if family and not config.get("addition_embed_type"):
        return f"{family} U-Net: it has no addition embedding (pooled text and size), SDXL's has"
    return ""
