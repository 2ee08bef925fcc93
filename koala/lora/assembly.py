"""A model put together from several: a U-Net's file and a base, another VAE, merged LoRAs.

The result is a model folder in koala's cache, made once, so that drawing, compressing, preparing,
distilling and converting take it alike. Weights are copied and merged tensor by tensor.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from koala.checkpoints import card_facts, model_card, sampling, single_file
from koala.checkpoints.pipeline_files import (
    SCHEDULER,
    Contents,
    as_file,
    from_folder,
    write_folder,
)
from koala.checkpoints.resolve import (
    check_name,
    models_cache,
    read_model,
    resolve_model,
    single_file_path,
)
from koala.checkpoints.tensors import Source, View, load_tensor
from koala.checkpoints.unet_folder import read_unet, unet_folder
from koala.checkpoints.vae_files import VaeFiles, read_vae
from koala.checkpoints.validate import parse_object
from koala.errors import UserError
from koala.lora.names import BaseModel, Target
from koala.lora.reading import Lora, read
from koala.utils.atomic import new_folder


def assembled(
    model: str | Path,
    base: str | Path | None = None,
    vae: str | Path | None = None,
    loras: Mapping[str | Path, float] | None = None,
) -> str | Path:
    """The folder of `model` with parts of others; `model` itself if none is given.

    base: the SDXL model that completes a file which holds only a U-Net, or lacks other parts.
    vae: a file, folder or Hub id with the VAE to take instead. loras: files and scales, merged into
    the weights in this order, as Lightning, Hyper-SD or DMD2 for a teacher. Raises `UserError` if
    a part is not found, does not fit, or would have no effect.
    """
    if base is None and vae is None and not loras:
        return model
    contents, read_loras = read_parts(model, base, vae, loras)
    given = [(Path(file).expanduser(), scale) for file, scale in (loras or {}).items()]
    parts = card_facts.Assembled(
        unet=model_card.name_of(model),
        base=None if base is None else model_card.name_of(base),
        vae=None if vae is None else model_card.name_of(vae),
        loras=[f"{file.stem}:{scale:g}" for file, scale in given],
    )
    folder = models_cache() / _key(contents, given) / parts.unet.rpartition("/")[2]
    folder.parent.mkdir(parents=True, exist_ok=True)
    from filelock import FileLock

    with FileLock(folder.parent / "lock"):  # the processes of one run want the same folder
        if not folder.is_dir():
            print(f"koala: putting {model} together in {folder}, once", file=sys.stderr)
            card = model_card.of_contents(contents.source, contents.metadata)
            card = replace(card, assembled=parts, title=parts.unet, ours=True)
            with new_folder(folder) as part:
                changes = _Changes(contents, read_loras)
                write_folder(part, contents.tensors, _files(contents, given), change=changes.get)
                model_card.write(card, part)
    return folder


def read_parts(
    model: str | Path,
    base: str | Path | None = None,
    vae: str | Path | None = None,
    loras: Mapping[str | Path, float] | None = None,
) -> tuple[Contents, list[tuple[Lora, float]]]:
    """The model that `assembled` makes, LoRAs excepted, and these; all without weights or torch."""
    contents = _contents(model, base, None if vae is None else read_vae(vae))
    target = _base_of(contents)
    read_loras = [(read(Path(f).expanduser(), target), scale) for f, scale in (loras or {}).items()]
    return contents, read_loras


def _contents(model: str | Path, base: str | Path | None, vae: VaeFiles | None) -> Contents:
    """The whole model, LoRAs excepted."""
    parts = {} if vae is None else {"vae": vae.tensors}
    if file := single_file_path(model):
        completing = None if base is None else read_model(base)
        contents = single_file.read(file, completing, parts)
    elif base is not None and (folder := unet_folder(model, fetch=True)):
        contents = read_unet(folder, read_model(base), parts)
    elif base is not None:
        check_name(str(model))
        raise UserError(
            f"--base {base} has no effect: {model} is a complete model; leave it out, or give the "
            "file or the folder with the U-Net alone"
        )
    else:
        contents = from_folder(resolve_model(model))
        contents = replace(contents, tensors={**contents.tensors, **parts})
    if vae is not None and vae.config is not None:
        if note := vae.note(contents.config("vae/config.json")):
            print(f"koala: {note}", file=sys.stderr)
        files = {**contents.files, "vae/config.json": vae.config}
        contents = replace(contents, files=files)
    return contents


def _base_of(contents: Contents) -> BaseModel:
    parts = ("unet", "text_encoder", "text_encoder_2")
    return BaseModel.from_configs(*(contents.config(f"{part}/config.json") for part in parts))


def _key(contents: Contents, loras: list[tuple[Path, float]]) -> str:
    """Names the result by the files that it is made from."""
    files = {part.file for of in contents.tensors.values() for v in of.values() for part in v.parts}
    states = [(str(file.resolve()), file.stat().st_mtime_ns) for file in sorted(files)]
    merged = [(str(file.resolve()), file.stat().st_mtime_ns, scale) for file, scale in loras]
    small = hashlib.sha256(b"".join(contents.files[path] for path in sorted(contents.files)))
    text = json.dumps([states, merged, small.hexdigest()])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _files(contents: Contents, loras: list[tuple[Path, float]]) -> dict[str, bytes]:
    """The small files; a few-step LoRA says how its model is drawn."""
    files = dict(contents.files)
    for file, _ in loras:
        if found := sampling.by_name(file.name):
            scheduler = parse_object(files[SCHEDULER], SCHEDULER)
            files[SCHEDULER] = as_file(scheduler | found.to_config())
    return files


class _Changes:
    """The tensors that LoRAs change, merged when each is written."""

    def __init__(self, contents: Contents, loras: list[tuple[Lora, float]]) -> None:
        self._loras = loras
        self._targets: dict[tuple[str, str], Target] = {}
        for lora, _ in loras:
            for target in lora.adapters:
                of, name = contents.tensors[target.part], f"{target.path}.weight"
                short = name.removeprefix("text_model.")  # transformers' since 5.6
                self._targets[target.part, name if name in of else short] = target

    def get(self, component: str, name: str, view: View, dtype: str) -> Source:
        """The tensor in safetensors' `dtype`: merged, as bytes, or as it was."""
        if (target := self._targets.get((component, name))) is None:
            return view
        import torch
        from torch import nn

        from koala.checkpoints.tensors import torch_dtype
        from koala.lora.adapters import Layer, merge

        weight = load_tensor(view, "F32")
        outer, inner, *kernel = weight.shape
        with torch.device("meta"):
            layer: Layer = (
                nn.Conv2d(inner, outer, tuple(kernel), bias=False)  # type: ignore[arg-type]
                if kernel
                else nn.Linear(inner, outer, bias=False)
            )
        layer.weight = nn.Parameter(weight, requires_grad=False)
        for lora, scale in self._loras:
            if target in lora.adapters:
                merge(
                    {target: layer}, replace(lora, adapters={target: lora.adapters[target]}), scale
                )
        merged = layer.weight.detach().to(torch_dtype(dtype)).contiguous()
        return merged.view(torch.uint8).numpy().tobytes()
