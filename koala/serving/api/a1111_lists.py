"""/sdapi/v1: what there is, as AUTOMATIC1111's tools ask before they draw.

Lists of what this server does not have are empty, and calls that would reload something answer at
once: nothing here changes while it runs but the folders of LoRAs and embeddings, which are read at
each request.
"""

from typing import Any

from fastapi import APIRouter, Request

from koala import __version__
from koala.checkpoints.textual_inversion import embeddings_in
from koala.generation import samplers
from koala.generation.samplers import LABELS
from koala.serving.api.a1111_accepted import OPTIONS, ignored_options
from koala.serving.api.a1111_fields import OTHER_SCHEDULES, SCHEDULES
from koala.serving.json_bodies import JsonRoute
from koala.serving.sampler_names import ALIASES
from koala.serving.service import Service
from koala.utils.device import free_and_total_bytes, resident_bytes

router = APIRouter(route_class=JsonRoute)
NO_LISTS = ("extensions", "face-restorers", "hypernetworks", "latent-upscale-modes",
            "prompt-styles", "realesrgan-models", "script-info", "sd-modules",
            "sd-vae")  # fmt: skip
RELOADS = ("refresh-checkpoints", "refresh-embeddings", "refresh-loras", "refresh-vae",
           "reload-checkpoint")  # fmt: skip
UPSCALERS = ("None", "Lanczos", "Nearest")


@router.get("/sd-models", summary="The model")
async def models(request: Request) -> list[dict[str, Any]]:
    name = request.app.state.service.pipeline.name
    one = {"title": name, "model_name": name, "hash": None, "sha256": None}
    return [{**one, "filename": name, "config": None}]


@router.get("/samplers", summary="The samplers")
async def all_samplers() -> list[dict[str, Any]]:
    return [
        {"name": sampler.name, "aliases": [*ALIASES.get(name, ()), name], "options": {}}
        for name, sampler in samplers.SAMPLERS.items()
    ]


@router.get("/schedulers", summary="The schedules")
async def schedulers() -> list[dict[str, Any]]:
    return [
        {"name": name, "label": LABELS.get(spacing, "Automatic"),
         "aliases": [other for other, own in OTHER_SCHEDULES.items() if own == spacing],
         "default_rho": -1, "need_inner_model": False}
        for name, spacing in SCHEDULES.items()
    ]  # fmt: skip


@router.get("/upscalers", summary="What extra-single-image enlarges with")
async def upscalers() -> list[dict[str, Any]]:
    return [
        {"name": name, "model_name": None, "model_path": None, "model_url": None, "scale": 4}
        for name in UPSCALERS
    ]


@router.get("/loras", summary="The LoRAs a prompt may name")
def loras(request: Request) -> list[dict[str, Any]]:
    service: Service = request.app.state.service
    return [{"name": name, "alias": name, "path": name, "metadata": {}} for name in service.loras()]


@router.get("/embeddings", summary="The textual inversions a prompt may name")
def embeddings(request: Request) -> dict[str, Any]:
    found, others = embeddings_in(request.app.state.service.embedding_folder)
    unknown = {"step": None, "sd_checkpoint": None, "sd_checkpoint_name": None}
    return {
        "loaded": {
            one.name: {**unknown, "shape": sum(one.widths), "vectors": one.number} for one in found
        },
        "skipped": {name: {**unknown, "shape": None, "vectors": None} for name in others},
    }


@router.get("/scripts", summary="Always empty")
async def scripts() -> dict[str, Any]:
    return {"txt2img": [], "img2img": []}


async def nothing() -> list[Any]:
    return []


async def reloaded() -> None:
    return None


for _name in NO_LISTS:
    router.get(f"/{_name}", summary="Always empty")(nothing)
for _name in RELOADS:
    router.post(f"/{_name}", summary="Nothing to do")(reloaded)


@router.get("/options", summary="Options")
async def options(request: Request) -> dict[str, Any]:
    current = {name: values[0] for name, values in OPTIONS.items()}
    return {"sd_model_checkpoint": request.app.state.service.pipeline.name, **current}


@router.post("/options", summary="Confirm options; names those that have no effect")
async def set_options(body: dict[str, Any], request: Request) -> dict[str, Any] | None:
    ignored = ignored_options(body, request.app.state.service.pipeline.name)
    return {"ignored_options": ignored} if ignored else None


@router.get("/cmd-flags", summary="The server's options, as far as tools look at them")
async def flags(request: Request) -> dict[str, Any]:
    told = request.app.state.options
    return {"api": True, "port": told.port, "listen": not told.on_loopback, "ckpt": told.model,
            "version": f"koala {__version__}"}  # fmt: skip


@router.get("/memory", summary="Memory in bytes")
async def memory() -> dict[str, Any]:
    used = resident_bytes()
    if (memory := free_and_total_bytes()) is None:
        return {"ram": {"used": used}, "cuda": {"error": "no CUDA device"}}
    free, total = memory
    system = {"free": free, "used": total - free, "total": total}
    return {"ram": {"used": used}, "cuda": {"system": system}}
