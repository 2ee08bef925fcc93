"""The FastAPI application: routes, error handlers and middleware."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, Response

from koala import __version__
from koala.serving import errors
from koala.serving.api import a1111, a1111_lists, a1111_tools, openai, openai_responses, page
from koala.serving.api import jobs as jobs_api
from koala.serving.jobs.database import Database
from koala.serving.jobs.gallery import Gallery
from koala.serving.jobs.gallery_writer import GalleryWriter
from koala.serving.jobs.jobs import Jobs
from koala.serving.jobs.table import JobTable
from koala.serving.keys import ApiKeys
from koala.serving.links import Links
from koala.serving.security import SecurityMiddleware
from koala.serving.service import Service
from koala.serving.settings import Options, signing
from koala.serving.upload_thread import UploadThread

DAY = 24 * 3600.0  # seconds

router = APIRouter()


def create_app(service: Service, database: Database, options: Options) -> FastAPI:
    """All APIs of one service. `app.state` has `service`, `gallery`, `jobs` and `options`.

    Jobs run from the app's startup to its shutdown, or until `jobs.close`.
    """
    app = FastAPI(
        title="koala", version=__version__, docs_url=None, redoc_url=None, lifespan=_lifespan
    )
    app.state.service, app.state.options = service, options
    gallery = Gallery(
        database, options.gallery_bytes, options.gallery_days * DAY, sign=signing(options)
    )
    jobs = Jobs(service, JobTable(database, most_seconds=options.gallery_days * DAY), gallery)
    app.state.gallery, app.state.jobs = gallery, jobs
    app.state.gallery_writer = GalleryWriter(gallery)
    app.state.upload_thread, app.state.links = UploadThread(), Links()
    app.state.a1111 = a1111.ActiveRequests()
    page_routes = page.router(service.pipeline.known, service.fit, service.most_pixels)
    ours = (router, openai.router, openai_responses.router, jobs_api.router, page_routes)
    for each in (*ours, a1111.queue_router):
        app.include_router(each)
    for each in (a1111.router, a1111_lists.router, a1111_tools.router):
        app.include_router(each, prefix="/sdapi/v1", tags=["AUTOMATIC1111"])
    errors.install(app, service.metrics.failed)
    keys = ApiKeys.read(options.api_key_file) if options.api_key_file else None
    app.add_middleware(
        SecurityMiddleware, options=options, keys=keys, on_error=service.metrics.failed
    )
    return app


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    jobs: Jobs = app.state.jobs
    await asyncio.to_thread(jobs.start)
    try:
        yield
    finally:
        await asyncio.to_thread(jobs.close)
        await asyncio.to_thread(app.state.upload_thread.close)
        await asyncio.to_thread(app.state.gallery_writer.close)


@router.get("/health", summary="Liveness", responses={503: {}})
async def health(request: Request) -> JSONResponse:
    alive = request.app.state.service.alive
    return JSONResponse({"status": "alive" if alive else "dead"}, 200 if alive else 503)


@router.get("/ready", summary="Readiness", responses={503: {}})
async def ready(request: Request) -> JSONResponse:
    service: Service = request.app.state.service
    state = (
        "draining"
        if service.draining
        else "ready"
        if service.ready and service.alive
        else "starting"
    )
    return JSONResponse({"status": state}, 200 if state == "ready" else 503)


@router.get("/metrics", summary="Prometheus metrics", response_class=Response)
async def metrics(request: Request) -> Response:
    service: Service = request.app.state.service
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")
