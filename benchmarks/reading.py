"""Memory and time of reading SDXL files as other programs write them, at full size.

`python -m benchmarks.reading [--scratch DIR] [--toy]` makes a random SDXL in fp16 (`random_sdxl`),
rewrites it in each way below DIR (up to 40 GB), reads each with `koala convert --to diffusers` in
a process of its own, and writes `reading.json` beside this file. `--toy` does so with koala-mini,
checks that the script works, and writes nothing.
"""

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from benchmarks.full_size import MEMORY_BOUND, measure, remove
from benchmarks.random_sdxl import write_random_sdxl
from koala.checkpoints.bundled import BUNDLED
from koala.checkpoints.convert import convert
from koala.checkpoints.ldm_keys import PREFIXES
from koala.checkpoints.tensors import read_metadata
from koala.checkpoints.validate import WEIGHTS
from koala.lora.names import base_of, shapes, spellings
from koala.utils.device import hardware

RANK = 64  # of the LoRA on every attention layer of the U-Net, about Lightning's size
SPELLING = "kohya, original names"
Tensors = dict[str, torch.Tensor]


def fp8(tensors: Tensors) -> Tensors:
    """The U-Net's matrices and kernels in 8 bits, each with its scale, as ComfyUI writes them."""
    found: Tensors = {"scaled_fp8": torch.zeros(0)}
    for name, tensor in tensors.items():
        if name.startswith(PREFIXES["unet"]) and tensor.ndim > 1:
            scale = (tensor.abs().max().float() / 448).clamp(min=1e-12)
            found[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
            found[f"{name.removesuffix('.weight')}.scale_weight"] = scale
        else:
            found[name] = tensor
    return found


def other_prefixes(tensors: Tensors) -> Tensors:
    """VAE and first text encoder under the names of another writer."""
    names = {"vae": "vae.", "text_encoder": "text_encoders.clip_l.transformer."}
    found = {}
    for name, tensor in tensors.items():
        own = next((c for c in names if name.startswith(PREFIXES[c])), None)
        found[name.replace(PREFIXES[own], names[own]) if own else name] = tensor
    return found


def unet_alone(tensors: Tensors) -> Tensors:
    """As SDXL-Lightning's and DMD2's U-Nets."""
    return {n: t for n, t in tensors.items() if n.startswith(PREFIXES["unet"])}


REWRITTEN: dict[str, Callable[[Tensors], Tensors]] = {
    "fp8, scaled": fp8,
    "other prefixes": other_prefixes,
    "U-Net alone, --base": unet_alone,
}


def rewrite(single: Path, file: Path, change: Callable[[Tensors], Tensors]) -> None:
    """Writes the single file `single` with other tensors, and its metadata."""
    with safe_open(single, "pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    save_file(change(tensors), file, read_metadata(single))


def lora(folder: Path, file: Path) -> None:
    """A LoRA on every linear layer of the U-Net's transformer blocks."""
    base, tensors = base_of(folder), {}
    sizes = shapes(base)
    for target, stem in spellings(base)[SPELLING].items():
        shape = sizes[target]
        if len(shape) == 2 and "transformer_blocks" in target.path:
            tensors[f"{stem}.lora_down.weight"] = torch.randn(RANK, shape[1]).half() / 100
            tensors[f"{stem}.lora_up.weight"] = torch.randn(shape[0], RANK).half() / 100
    save_file(tensors, file)


def variants(folder: Path, out: Path) -> Path:
    """The folder with only fp16 variants of its weights, as links."""
    for path in (p for p in folder.rglob("*") if p.is_file()):
        place = out / path.relative_to(folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        if path.stem in WEIGHTS.values() and path.suffix == ".safetensors":
            place = place.with_suffix(".fp16.safetensors")
        place.symlink_to(path.resolve())
    return out


def measure_all(folder: Path, scratch: Path, repeats: int) -> list[dict]:
    """Every way of reading, measured: the plain file first."""
    single, out = scratch / "single.safetensors", scratch / "out"
    convert(folder, "single-file", single)
    file, rank = scratch / "file.safetensors", scratch / "lora.safetensors"
    found = []

    def add(way: str, model: Path, *options: str) -> None:
        arguments = ["convert", str(model), "--to", "diffusers", *options]
        shutil.rmtree(scratch / "cache" / "models", ignore_errors=True)  # parts are cached there
        found.append({"way": way, **asdict(measure(arguments, out, repeats))})
        remove(out)

    add("plain single file", single)
    for way, change in REWRITTEN.items():
        rewrite(single, file, change)
        add(way, file, *(["--base", str(folder)] if "--base" in way else []))
        file.unlink()
    add("fp16 variants", variants(folder, scratch / "variants"))
    add("another VAE, --vae", single, "--vae", str(folder))
    lora(folder, rank)
    add(f"LoRA of rank {RANK}, --teacher-lora", single, "--teacher-lora", f"{rank}:0.5")
    return found


def main() -> None:
    """Measures and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--scratch", type=Path, help="a folder with 40 GB of room")
    parser.add_argument("--toy", action="store_true", help="try it with koala-mini; writes nothing")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.scratch) as name:
        scratch = Path(name)
        os.environ["KOALA_CACHE"] = str(scratch / "cache")
        folder = BUNDLED / "koala-mini"
        if not options.toy:
            folder = scratch / "sdxl"
            write_random_sdxl(folder)
        rows = measure_all(folder, scratch, repeats=1)
    record = {
        "command": "python -m benchmarks.reading", "hardware": hardware(),
        "memory_bound_mib": MEMORY_BOUND, "rows": rows,
    }  # fmt: skip
    print(json.dumps(record, indent=1))
    if not options.toy:
        Path(__file__).with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
