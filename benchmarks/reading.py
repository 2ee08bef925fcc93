"""Memory and time of reading SDXL files as other programs write them, at full size.

    python -m benchmarks.random_sdxl SDXL
    python -m benchmarks.reading --folder SDXL

rewrites the random SDXL in each way beside its folder (14 GB), reads each with `koala convert --to
diffusers` in a process of its own, and writes `reading.json` beside this file. The plain file is
measured by `benchmarks.full_size`. `--toy` does so with koala-mini, checks that the script works,
and writes nothing.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from benchmarks.full_size import IDLE, MEMORY_BOUND, PEAK, remove, timed
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


REWRITTEN: dict[str, Callable[[Tensors], Tensors]] = {
    "fp8, scaled": fp8,
    "other prefixes": other_prefixes,
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


def measure_all(folder: Path, scratch: Path) -> list[dict]:
    """Every way of reading, measured. At most three models are there at once.

    What is put together from parts lies in the cache, beside the result.
    """
    single, out = scratch / "single.safetensors", scratch / "out"
    file, rank = scratch / "file.safetensors", scratch / "lora.safetensors"
    found = []

    def add(way: str, model: Path, *options: str) -> None:
        command = ["convert", str(model), "--to", "diffusers", *options, "--out", str(out)]
        printed, (seconds, processor) = timed([sys.executable, "-c", PEAK, *command], out)
        found.append(
            {"way": way, "peak_mib": round(int(printed.split()[-1]) / 1024, 1),
             "seconds": seconds, "processor_seconds": processor}
        )  # fmt: skip
        print(json.dumps(found[-1]), flush=True)
        remove(out)
        shutil.rmtree(scratch / "cache" / "models", ignore_errors=True)

    unet, vae = (folder / c / f"{WEIGHTS[c]}.safetensors" for c in ("unet", "vae"))
    add("U-Net alone, --base", unet, "--base", str(folder))
    lora(folder, rank)
    add(f"LoRA of rank {RANK}, --teacher-lora", folder, "--teacher-lora", f"{rank}:0.5")
    for way, change in REWRITTEN.items():
        convert(folder, "single-file", single)
        rewrite(single, file, change)
        single.unlink()
        add(way, file)
        file.unlink()
    add("another VAE, --vae", folder, "--vae", str(vae))
    add("fp16 variants", variants(folder, scratch / "variants"))
    return found


def main() -> None:
    """Measures and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--folder", type=Path, help="a full-size SDXL")
    parser.add_argument("--toy", action="store_true", help="try it with koala-mini; writes nothing")
    options = parser.parse_args()
    if options.toy == (options.folder is not None):
        parser.error("give --folder SDXL, or --toy")
    folder = options.folder or BUNDLED / "koala-mini"
    with tempfile.TemporaryDirectory(dir=folder.parent if options.folder else None) as name:
        os.environ["KOALA_CACHE"] = str(Path(name) / "cache" / "packages")
        rows = measure_all(folder, Path(name))
    idle = subprocess.run([sys.executable, "-c", IDLE], capture_output=True, text=True, check=True)
    bound = round(int(idle.stdout) / 1024 + MEMORY_BOUND, 1)
    record = {
        "command": "python -m benchmarks.reading --folder SDXL", "hardware": hardware(),
        "bound_mib": bound, "rows": rows,
    }  # fmt: skip
    print(json.dumps(record, indent=1))
    if not options.toy:
        Path(__file__).with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    if over := [row["way"] for row in rows if row["peak_mib"] > bound]:
        sys.exit(f"over the bound: {', '.join(over)}")


if __name__ == "__main__":
    main()
