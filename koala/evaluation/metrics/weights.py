"""The weights that metrics compute with: by Hub id or from a local folder or file.

Importing this loads no torch. No file is ever run as code: pickled ones are read by torch with
`weights_only`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from koala.checkpoints.resolve import hub_folder
from koala.errors import UserError

_SMALL = ("*.json", "*.txt", "*.model")


@dataclass(frozen=True)
class Weights:
    """Weights of one model.

    hub: the Hub id; None where the authors publish them elsewhere, at `at`. file: the one file
    that is needed; "" for a folder in the format of transformers.
    """

    hub: str | None
    file: str = ""
    at: str = ""

    @property
    def place(self) -> str:
        """Where they are published."""
        if self.hub is None:
            return self.at
        return f"https://huggingface.co/{self.hub}" + (f", {self.file}" if self.file else "")


WEIGHTS: dict[str, Weights] = {
    "hpsv2.1": Weights("xswu/HPSv2", "HPS_v2.1_compressed.pt"),
    "pickscore": Weights("yuvalkirstain/PickScore_v1"),
    "imagereward": Weights("THUDM/ImageReward", "ImageReward.pt"),
    "bert-vocabulary": Weights("google-bert/bert-base-uncased", "vocab.txt"),
    "clip-vit-large-patch14": Weights("openai/clip-vit-large-patch14"),
    "clip-vit-large-patch14-336": Weights("openai/clip-vit-large-patch14-336"),
    "clip-vit-base-patch32": Weights("openai/clip-vit-base-patch32"),
    "aesthetic": Weights(
        None, "sac+logos+ava1-l14-linearMSE.pth",
        "https://github.com/christophschuhmann/improved-aesthetic-predictor",
    ),
    "inception": Weights(
        None, "weights-inception-2015-12-05-6726825d.pth",
        "https://github.com/toshas/torch-fidelity/releases/tag/v0.2.0",
    ),
    "dinov2": Weights("facebook/dinov2-large"),
    "blip-vqa": Weights("Salesforce/blip-vqa-capfilt-large"),
    "owlv2": Weights("google/owlv2-base-patch16-ensemble"),
    "mask2former": Weights("facebook/mask2former-swin-small-coco-instance"),
    "vlm": Weights("Qwen/Qwen3-VL-8B-Instruct"),
}  # fmt: skip


def find(names: Sequence[str], given: Mapping[str, str]) -> dict[str, Path]:
    """The local path of each: the one given, else that in the Hub's cache, else downloaded.

    given: name -> a folder, a file or another Hub id. UserError for what cannot be had.
    """
    return {name: _find(name, given.get(name)) for name in dict.fromkeys(names)}


def _find(name: str, given: str | None) -> Path:
    weights = WEIGHTS[name]
    if given is not None:
        path = Path(given).expanduser()
        if path.exists():
            return _checked(name, path)
        if weights.hub is None or path.is_absolute() or given.count("/") != 1:
            raise UserError(f"--weights {name}={given}: there is no such file or folder")
    hub = given or weights.hub
    if hub is None:
        raise UserError(
            f"the weights {name} are missing: download {weights.file} from {weights.at} and give "
            f"--weights {name}=PATH"
        )
    files = (weights.file,) if weights.file else (*_SMALL, "*.safetensors")
    try:
        return _checked(name, _cached(hub, files) or hub_folder(hub, files))
    except UserError:
        raise UserError(
            f"the weights {name} are missing: they are {weights.place}; download them where there "
            f"is a network and give --weights {name}=PATH"
        ) from None


def _cached(hub: str, files: Sequence[str]) -> Path | None:
    """The repository in the local cache; None if it is not there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    with contextlib.suppress(HfHubHTTPError, OSError, ValueError):
        return Path(snapshot_download(hub, allow_patterns=[*files], local_files_only=True))
    return None


def _checked(name: str, path: Path) -> Path:
    """The file, or the folder. UserError if it lacks what is needed."""
    weights = WEIGHTS[name]
    if weights.file:
        file = path / weights.file if path.is_dir() else path
        if not file.is_file():
            raise UserError(f"the weights {name}: {path} has no {weights.file}")
        return file
    if not (path / "config.json").is_file():
        raise UserError(
            f"the weights {name}: {path} is no folder in the format of transformers "
            f"(config.json is missing); see {weights.place}"
        )
    return path
