"""A single file that koala wrote, as ComfyUI's own code detects and saves it.

    git clone https://github.com/comfyanonymous/ComfyUI
    pip install einops torchsde scipy psutil sentencepiece
    python -m benchmarks.random_sdxl SDXL
    PYTHONPATH=.:tests python -m benchmarks.comfyui --comfyui ComfyUI --commit HASH --folder SDXL

A full-size SDXL with random weights that predicts v with zero terminal SNR goes from a folder to a
single file. ComfyUI detects it, without loading weights: the architecture, what it predicts, its
noise levels, its latents' scale, and whether its tensors are those of ComfyUI's own networks. Then
the file goes back to a folder, and every bit is compared. Of SDXL and KOALA's other files only the
names, shapes and marks are shown to ComfyUI. The result goes to `comfyui.json` beside this file. It
takes 14 GB beside the folder, which is changed. torchvision and torchaudio, which ComfyUI imports
for other models, are not needed.
"""

import argparse
import json
import sys
import tempfile
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import torch
from safetensors.torch import load_file

from benchmarks.full_size import check_round_trip, digests
from benchmarks.random_sdxl import SCHEDULER as SDXL
from benchmarks.record import keep
from koala.checkpoints.convert import convert
from koala.checkpoints.inspect import inspect
from koala.checkpoints.pipeline_files import SCHEDULER
from koala.checkpoints.prediction import EPSILON, VELOCITY, Prediction
from koala.checkpoints.tensors import read_metadata
from koala.generation.schedule import trailing
from koala.utils.device import hardware
from published import published

UNUSED = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional",
          "torchaudio", "torchaudio.transforms", "torchaudio.functional")  # fmt: skip
PREDICTIONS = (Prediction(VELOCITY, True), Prediction(VELOCITY), Prediction(EPSILON))


def imported(checkout: Path) -> types.SimpleNamespace:
    """ComfyUI's modules from a checkout, on the CPU."""
    for name in UNUSED:
        stand_in = MagicMock(__path__=[], __spec__=ModuleSpec(name, None))
        sys.modules.setdefault(name, stand_in)
    sys.path.insert(0, str(checkout))
    own, sys.argv = sys.argv, [sys.argv[0], "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.model_base
    import comfy.model_detection
    import comfyui_version

    sys.argv = own
    return types.SimpleNamespace(
        detection=comfy.model_detection, base=comfy.model_base, version=comfyui_version.__version__
    )


def set_prediction(folder: Path, prediction: Prediction) -> dict[str, Any]:
    """Writes it into the folder's scheduler, whose config is returned."""
    file = folder / SCHEDULER
    config: dict[str, Any] = json.loads(file.read_text()) | prediction.config
    file.write_text(json.dumps(config))
    return config


def detected(
    comfy: types.SimpleNamespace, tensors: dict[str, torch.Tensor], metadata: dict[str, str],
    schedule: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """What ComfyUI takes a file with these tensors for; their values are not looked at."""
    prefix = comfy.detection.unet_prefix_from_state_dict(tensors)
    found = comfy.detection.model_config_from_unet(tensors, prefix, metadata=metadata)
    kind = found.model_type(tensors, prefix)
    levels = comfy.base.model_sampling(found, kind).sigmas.double().numpy()
    ours = np.sort(trailing(schedule, 1000).sigmas[:-1].astype(np.float64))
    network = found.get_model(tensors, prefix, device="meta").diffusion_model.state_dict()
    own = {n.removeprefix(prefix): t.shape for n, t in tensors.items() if n.startswith(prefix)}
    text = found.process_clip_state_dict(dict(tensors))
    saved = {
        **found.process_unet_state_dict_for_saving({n: tensors[prefix + n] for n in network}),
        **found.process_clip_state_dict_for_saving(text),
        **found.process_vae_state_dict_for_saving(
            {n.removeprefix(vae): t for vae in found.vae_key_prefix
             for n, t in tensors.items() if n.startswith(vae)}
        ),
    }  # fmt: skip
    return {
        "class": type(found).__name__,
        "predicts": kind.name,
        "zero_terminal_snr": bool(found.sampling_settings.get("zsnr", False)),
        "latent_scale": found.latent_format.scale_factor,
        "greatest_noise_level": float(levels[-1]),
        "furthest_level_from_ours": float(np.abs(levels / ours - 1).max()),
        "unet_tensors": len(own),
        "unet_tensors_as_comfyuis": own == {n: t.shape for n, t in network.items()},
        "names_that_comfyui_saves_besides": sorted(saved.keys() - tensors.keys()),
        "names_that_comfyui_does_not_save": sorted(tensors.keys() - saved.keys()),
    }


def there_and_back(
    comfy: types.SimpleNamespace, folder: Path, prediction: Prediction, scratch: Path
) -> dict[str, Any]:
    """Folder, single file, ComfyUI's detection, and the folder again."""
    schedule = set_prediction(folder, prediction)
    file, back = scratch / "model.safetensors", scratch / "back"
    convert(folder, "single-file", file)
    mapped = load_file(file)  # into memory, not read
    found = {
        "koala": inspect(file).prediction,
        **detected(comfy, mapped, read_metadata(file), schedule),
    }
    convert(file, "diffusers", back)
    found["back_in_a_folder"] = inspect(back).prediction
    found["equal_tensors"] = check_round_trip(digests(folder), digests(back))
    return found


def empty(name: str, prediction: Prediction) -> dict[str, torch.Tensor]:
    """The tensors of a single file by names and shapes, without values of their own."""
    zero = torch.zeros((), dtype=torch.float16)
    marks = {mark: torch.zeros(0) for mark in prediction.marks}
    return {n: zero.expand(shape) for n, shape in published(name).items()} | marks


def main() -> None:
    """Tries every model and prediction, and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--comfyui", type=Path, required=True, help="a checkout of its repository")
    parser.add_argument("--commit", required=True, help="of the checkout, for the record")
    parser.add_argument("--folder", type=Path, required=True, help="a full-size SDXL")
    options = parser.parse_args()
    comfy, rows = imported(options.comfyui.resolve()), []
    with torch.no_grad():
        for name in ("sdxl", "koala-700m", "koala-1b"):
            for prediction in PREDICTIONS:
                found = detected(
                    comfy, empty(name, prediction), prediction.metadata, SDXL | prediction.config
                )
                rows.append({"model": name, "koala": str(prediction), **found})
                print(json.dumps(rows[-1]), flush=True)
        with tempfile.TemporaryDirectory(dir=options.folder.parent) as scratch:
            whole = there_and_back(comfy, options.folder, PREDICTIONS[0], Path(scratch))
    record = {
        "command": "python -m benchmarks.comfyui --comfyui ComfyUI --folder SDXL",
        "comfyui": comfy.version, "commit": options.commit, "hardware": hardware(),
        "full_size_there_and_back": whole, "by_names_and_shapes": rows,
    }  # fmt: skip
    keep(Path(__file__).with_suffix(".json"), record)


if __name__ == "__main__":
    main()
