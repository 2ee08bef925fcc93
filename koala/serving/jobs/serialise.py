"""Jobs and images as JSON-able values."""

from collections.abc import Mapping
from typing import Any

from koala.serving.jobs.gallery import GalleryImage
from koala.serving.jobs.table import Job

PRIORITIES = ("interactive", "batch")  # by their number in `ImageRequest.priority`


def image(found: GalleryImage) -> dict[str, Any]:
    """An image of the gallery."""
    return {
        "id": found.id,
        "object": "picture",
        "url": f"/v1/gallery/{found.id}/image",
        "thumbnail": f"/v1/gallery/{found.id}/thumbnail",
        "created": found.created,
        "bytes": found.bytes,
        "settings": found.settings,
    }


def open_job(
    job: Job, images: Mapping[int, GalleryImage], started: float | None, done: int, position: int
) -> dict[str, Any]:
    """A queued or running job; `done` counts steps."""
    status = "queued" if started is None else "running"
    return {**_job(job, images, done), "status": status, "position": position, "started": started}


def ended_job(job: Job, images: Mapping[int, GalleryImage]) -> dict[str, Any]:
    """A job that is done, failed or cancelled."""
    done = sum(job.steps for index in job.ended.values() if index is not None)
    error = None if job.status != "failed" else {"message": job.message, "code": job.code}
    return {**_job(job, images, done), "status": job.status, "error": error}


def _job(job: Job, images: Mapping[int, GalleryImage], done: int) -> dict[str, Any]:
    return {
        "id": job.id,
        "object": "job",
        "status": "queued",
        "position": 0,
        "progress": {"done": done, "total": job.number * job.steps},
        "pictures": [{**image(one), "index": index} for index, one in images.items()],
        "error": None,
        "created": job.created,
        "started": job.started,
        "finished": job.finished,
        "request": _request(job.request),
    }


def _request(request: Mapping[str, Any]) -> dict[str, Any]:
    """The request in the fields of `POST /v1/jobs`, without images."""
    return {
        **{name: value for name, value in request.items() if name not in ("loras", "number")},
        "n": request["number"],
        "lora": [{"name": name, "scale": scale} for name, scale in request["loras"]],
        "priority": PRIORITIES[request["priority"]],
    }
