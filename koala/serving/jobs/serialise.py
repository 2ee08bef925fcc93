"""Jobs and pictures as clients see them: plain values for JSON."""

from collections.abc import Mapping
from typing import Any

from koala.serving.jobs.gallery import Picture
from koala.serving.jobs.table import Job

PRIORITIES = ("interactive", "batch")  # by their numbers in an `Order`


def picture(found: Picture) -> dict[str, Any]:
    """A picture of the gallery."""
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
    job: Job, pictures: Mapping[int, Picture], started: float | None, done: int, position: int
) -> dict[str, Any]:
    """A job that waits or is drawn; `done` counts steps."""
    status = "queued" if started is None else "running"
    return {**_job(job, pictures, done), "status": status, "position": position, "started": started}


def ended_job(job: Job, pictures: Mapping[int, Picture]) -> dict[str, Any]:
    """A job that is done, failed or cancelled."""
    done = sum(job.steps for place in job.ended.values() if place is not None)
    error = None if job.status != "failed" else {"message": job.message, "code": job.code}
    return {**_job(job, pictures, done), "status": job.status, "error": error}


def _job(job: Job, pictures: Mapping[int, Picture], done: int) -> dict[str, Any]:
    return {
        "id": job.id,
        "object": "job",
        "status": "queued",
        "position": 0,
        "progress": {"done": done, "total": job.number * job.steps},
        "pictures": [{**picture(one), "index": place} for place, one in pictures.items()],
        "error": None,
        "created": job.created,
        "started": job.started,
        "finished": job.finished,
        "order": _order(job.request),
    }


def _order(request: Mapping[str, Any]) -> dict[str, Any]:
    """What was asked for, as `POST /v1/jobs` takes it, without the bytes of pictures."""
    return {
        **{name: value for name, value in request.items() if name not in ("loras", "number")},
        "n": request["number"],
        "lora": [{"name": name, "scale": scale} for name, scale in request["loras"]],
        "priority": PRIORITIES[request["priority"]],
    }
