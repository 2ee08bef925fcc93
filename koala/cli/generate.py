"""`koala generate`."""

import argparse
import os
import sys
from dataclasses import asdict
from pathlib import Path

from koala.checkpoints.bundled import DEFAULT
from koala.checkpoints.resolve import resolve_model
from koala.checkpoints.sampling import USUAL
from koala.checkpoints.validate import is_quantised
from koala.checkpoints.words import read_words
from koala.cli.command import Command, Parser, assembled, listed, number, say, show, whole
from koala.errors import UserError
from koala.evaluation.prompts import texts_in
from koala.generation.samplers import SAMPLERS, Sampler
from koala.generation.validation import (
    BACKENDS,
    DECODERS,
    MASK_BLUR,
    MASK_FILLS,
    MOST_CONTROL,
    MOST_IP_SCALE,
    STRENGTH,
    WEIGHTS,
)
from koala.utils.collection import kept
from koala.utils.threads import sleep_while_waiting


def _arguments(p: Parser) -> None:
    p.add_argument("prompt", nargs="*", help="what to draw; several prompts draw several images")
    p.add_argument(
        "--prompts", type=Path, metavar="FILE", help="a text with a prompt a line, or a table"
    )
    p.add_argument(
        "--out", type=Path, default=Path("pictures"), metavar="PATH",
        help="a folder, where files are numbered (default pictures), or a file such as fox.png; "
        "several images then become fox-1.png, fox-2.png and so on; no file is ever replaced",
    )  # fmt: skip
    p.add_argument("-n", "--number", type=whole, default=1, help="images per prompt (default 1)")
    p.add_argument("--seed", type=whole, help="seed of the first image (default: random)")
    p.add_argument("--size", metavar="WIDTHxHEIGHT", help="in pixels (default: the model's own)")
    p.add_argument(
        "--workflow", action="store_true", help="put a workflow for ComfyUI into each PNG"
    )
    p.add_json("paths and settings")
    p.add_argument(
        "--list-words", action="store_true",
        help="list the things, looks, colours and backgrounds that a mini model knows",
    )  # fmt: skip

    model = p.add_argument_group("model")
    model.add_argument(
        "--model", default=DEFAULT,
        help=f"bundled name, folder, single file or Hub id (default {DEFAULT})",
    )  # fmt: skip
    model.add_argument(
        "--lora", action="append", default=[], metavar="FILE[:SCALE]",
        help="a LoRA for the model, or for SDXL, its teacher; repeat for several",
    )  # fmt: skip

    model.add_argument(
        "--lora-dir", type=Path, metavar="DIR",
        help="LoRAs that prompts may name: 'a fox <lora:NAME:0.8>'",
    )  # fmt: skip
    model.add_argument(
        "--embedding", action="append", default=[], metavar="FILE",
        help="a textual inversion of SDXL, named in the prompt by the file's name; repeat for "
        "several",
    )  # fmt: skip
    p.add_parts("--model")

    sampling = p.add_argument_group("sampling")
    usual = "the model's own, else"
    sampling.add_argument(
        "--steps", type=whole, help=f"denoising steps (default: {usual} {USUAL.steps})"
    )
    sampling.add_argument(
        "--guidance", type=number,
        help=f"guidance scale, CFG; up to 1 there is none (default: {usual} {USUAL.guidance:g})",
    )  # fmt: skip
    sampling.add_argument(
        "--guidance-until", type=number, default=1.0, metavar="SHARE",
        help="switch guidance off after this share of the steps (default 1.0: never)",
    )  # fmt: skip
    sampling.add_argument(
        "--guidance-rescale", type=number, default=0.0, metavar="SHARE",
        help="how much of the contrast that guidance adds is taken back, 0 to 1; 0.7 is usual for "
        "models with zero terminal SNR (default 0)",
    )  # fmt: skip
    sampling.add_argument(
        "--negative-prompt", "--negative", default="", metavar="TEXT", help="what to keep away from"
    )
    sampling.add_argument(
        "--scheduler",
        help=f"{listed(SAMPLERS)} (default: {usual} {USUAL.scheduler}); each but lcm also with "
        f"other steps: {listed(f'-{name}' for name in Sampler.spacings)}, as in dpm++2m-karras",
    )  # fmt: skip
    sampling.add_argument(
        "--strict", action="store_true",
        help="draw each image bit for bit as if it were drawn alone",
    )  # fmt: skip

    start = p.add_argument_group("starting from an image")
    start.add_argument("--image", type=Path, metavar="FILE", help="the image to start from")
    start.add_argument(
        "--strength", type=number,
        help=f"how much of it to redraw, above 0 and up to 1 (default {STRENGTH:g})",
    )  # fmt: skip
    start.add_argument(
        "--mask", type=Path, metavar="FILE",
        help="an image of the same size: redraw only where it is light or transparent; the rest "
        "comes back pixel for pixel",
    )  # fmt: skip
    start.add_argument(
        "--mask-blur", type=whole, metavar="PIXELS",
        help=f"blend into the rest over so many pixels (default {MASK_BLUR})",
    )  # fmt: skip

    start.add_argument(
        "--mask-fill", metavar="FILL",
        help=f"what the redrawn part starts from: {listed(MASK_FILLS)} (default original)",
    )  # fmt: skip

    control = p.add_argument_group("following an image")
    control.add_argument(
        "--control", metavar="CONTROLNET",
        help="a ControlNet for the model, or for SDXL, its teacher: a folder, a Hub id or a single "
        "file",
    )  # fmt: skip
    control.add_argument(
        "--control-image", type=Path, metavar="FILE",
        help="the edges, depths or whatever else the ControlNet reads",
    )  # fmt: skip
    control.add_argument(
        "--control-scale", type=number, metavar="SCALE",
        help=f"how strong it is, 0 to {MOST_CONTROL} (default 1)",
    )  # fmt: skip

    like = p.add_argument_group("an image as a prompt")
    like.add_argument(
        "--ip-adapter", metavar="FILE[:SCALE]",
        help="a plain IP-Adapter for the model, or for SDXL, its teacher; how strong it is, 0 to "
        f"{MOST_IP_SCALE} (default 1)",
    )  # fmt: skip
    like.add_argument(
        "--ip-image", type=Path, metavar="FILE",
        help="the image that says, with the prompt, what to draw; its middle square is read",
    )  # fmt: skip
    like.add_argument(
        "--image-encoder", type=Path, metavar="FOLDER",
        help="the CLIP image encoder that the adapter was trained with (default: the folder "
        "image_encoder beside the adapter)",
    )  # fmt: skip

    runtime = p.add_argument_group("speed")
    runtime.add_argument("--device", help="cpu, cuda, cuda:1 or mps (default: the best available)")
    runtime.add_argument(
        "--backend",
        help=f"{listed(BACKENDS)}. auto times torch and openvino once and remembers the faster, "
        "fastest also tries those that round, remembered never times; default: $KOALA_BACKEND, "
        "else auto for a small model and remembered for others",
    )  # fmt: skip
    runtime.add_argument("--compile", action="store_true", help="use torch.compile, cached on disk")
    runtime.add_argument("--graphs", action="store_true", help="replay steps from CUDA graphs")

    memory = p.add_argument_group("memory")
    memory.add_argument(
        "--vram", metavar="GIB", help="stay within this many GiB, or within what is free ('free')"
    )
    memory.add_argument("--weights", help=f"{listed(WEIGHTS)} (default: as the memory plan says)")
    memory.add_argument("--decode", help=f"{listed(DECODERS)} (default: as the memory plan says)")
    memory.add_argument(
        "--tiny-vae", metavar="MODEL", help="folder or Hub id of the tiny decoder (default: the "
        "model's own)",
    )  # fmt: skip


def _list_words(o: argparse.Namespace) -> None:
    if o.prompt or o.prompts:
        given = f"the prompt {o.prompt[0]!r}" if o.prompt else f"--prompts {o.prompts}"
        raise UserError(f"--list-words draws nothing: leave out {given}, or it")
    words = read_words(resolve_model(o.model), o.model)
    show(o, asdict(words), words.text())


def _refuse_file(prompt: str) -> None:
    """UserError for a prompt that is a file's name: it would be drawn as words."""
    path = Path(prompt)
    if path.suffix and "\n" not in prompt and os.path.isfile(path):
        text = path.suffix == ".txt"
        what = f"draw its lines by --prompts {prompt}" if text else "say what to draw"
        raise UserError(f"the prompt {prompt!r} is a file here, and prompts are words: {what}")


def _run(o: argparse.Namespace) -> None:
    if o.list_words:
        _list_words(o)
        return
    for prompt in o.prompt:
        _refuse_file(prompt)
    from koala.generation import control, validation

    every = [*o.prompt, *(texts_in(o.prompts) if o.prompts else ())]
    if not every:
        raise UserError("no prompt: say what to draw, koala generate 'an owl, noto style'")
    from koala.generation.image_files import frames_note
    from koala.generation.png import check_writable
    from koala.generation.prompt_loras import shared_loras
    from koala.generation.request_checks import check_values, checked
    from koala.generation.workflow import workflow
    from koala.utils.device import check_device

    runtime = {
        # With any backend named LoRAs are merged, so that they cost no time per step.
        "backend": o.backend or ("remembered" if o.lora else None),
        "compile": o.compile, "graphs": o.graphs,
        "vram": o.vram, "weights": o.weights, "decode": o.decode, "tiny_vae": o.tiny_vae,
    }  # fmt: skip
    planned = validation.runtime(**runtime)
    beside = {"--control": o.control, "--ip-adapter": o.ip_adapter}
    plain = [option for option, given in beside.items() if given is not None]
    for option in plain:
        control.check_runtime(option, o.backend, o.compile, o.graphs, planned)
        runtime["backend"] = "torch"
    ip_adapter, ip_scale = validation.ip_adapter(o.ip_adapter)
    check_device(o.device)
    check_writable(o.out, len(every) * o.number)
    prompts, shared = shared_loras(every, o.lora_dir)
    loras = validation.loras(o.lora)
    loras.update(shared.items())
    asked = {
        "negative_prompt": o.negative_prompt, "steps": o.steps, "guidance": o.guidance,
        "guidance_until": o.guidance_until, "guidance_rescale": o.guidance_rescale,
        "scheduler": o.scheduler, "size": o.size, "number": o.number, "seed": o.seed,
        "image": o.image, "strength": o.strength, "mask": o.mask, "mask_blur": o.mask_blur,
        "mask_fill": o.mask_fill,
        "lora_dir": o.lora_dir, "embedding": o.embedding, "control": o.control,
        "control_image": o.control_image, "control_scale": o.control_scale,
        "ip_adapter": ip_adapter, "ip_image": o.ip_image, "ip_scale": ip_scale,
        "image_encoder": o.image_encoder,
    }  # fmt: skip
    check_values(prompts, lora=loras, **asked)  # before the model is assembled or fetched
    model = assembled(o, o.model)
    found = checked(model, prompts, lora=loras, **asked)
    settings = found.settings
    for given in filter(None, dict.fromkeys((o.image, o.mask, o.control_image, o.ip_image))):
        if note := frames_note(given):
            say(note)
    for option in plain:
        quantised = is_quantised(resolve_model(model))
        control.check_runtime(option, o.backend, o.compile, o.graphs, quantised)
    if found.control is not None:
        say(found.control.net.line())
    if found.image_prompt is not None:
        say(found.image_prompt.adapter.line())

    for one in {each.prompt: each for each in settings}.values() if o.workflow else ():
        workflow(one)  # refuses what it cannot say

    sleep_while_waiting()
    with kept():  # all is checked: now torch may load
        from koala.generation import save
        from koala.generation.opening import open_model
        from koala.utils.progress import progress

        named = ("embedding", "lora_dir", "control", "ip_adapter")
        pipeline = open_model(
            model, o.device, lora=loras, **runtime, size=(settings[0].width, settings[0].height),
            images=len(settings), from_image=o.image is not None, say=say,
            of_requests=[name for name in named if getattr(o, name)],
        )  # fmt: skip
    of_the_model = {Path(file).expanduser() for file in loras}
    for path, fit in found.fits.items():
        if path not in of_the_model:  # of some prompts alone: opening the model says it of its own
            say(fit.line())
    for note in dict.fromkeys(note for one in settings for note in pipeline.known.notes(one)):
        say(note)
    if pipeline.plan is not None:
        print(pipeline.plan.table(), file=sys.stderr)
    requests = pipeline.requests(prompts, **asked)
    with progress("drawing", pipeline.steps(requests), "steps") as advance:
        result = pipeline.draw(requests, strict=o.strict, on_step=lambda *_: advance(1))
    made = list(zip(save(result, o.out, comfyui=o.workflow), result.settings, strict=True))
    show(
        o,
        [{"path": str(path), **asdict(settings)} for path, settings in made],
        "\n".join(f"{path}  seed {settings.seed}" for path, settings in made),
    )
    pipeline.keep_form()


GENERATE = Command(
    "generate",
    "draw images from prompts",
    (
        'koala generate "a fox, noto style" --out fox.png',
        'koala generate "a fox, noto style" "an owl, noto style" -n 4 --seed 7 --out drawn',
        'koala generate "a fox, noto style" --model koala-mini --steps 20 --scheduler dpm++2m '
        "--negative-prompt blue",
        'koala generate "an owl, noto style" --image fox.png --strength 0.8 --out owl.png',
        'koala generate "a lighthouse" --model my-koala --control canny-sdxl --control-image '
        "edges.png",
        'koala generate "in the snow" --model my-koala --ip-adapter '
        "ip-adapter_sdxl.safetensors:0.6 --ip-image fox.png",
    ),
    _arguments,
    _run,
)
