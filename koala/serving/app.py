"""The application: what answers which path, and what all answers have in common."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, Response

from koala import __version__
from koala.serving import errors
from koala.serving.api import a1111, openai, page
from koala.serving.api import jobs as jobs_api
from koala.serving.jobs.database import Store
from koala.serving.jobs.delivery import Keeper
from koala.serving.jobs.gallery import Gallery
from koala.serving.jobs.jobs import Jobs
from koala.serving.jobs.table import Table
from koala.serving.keys import Keys
from koala.serving.security import Guard
from koala.serving.service import Service
from koala.serving.settings import Options

DAY = 24 * 3600.0  # seconds

router = APIRouter()


def create_app(service: Service, store: Store, options: Options) -> FastAPI:
    """Every interface of one service. `app.state` has `service`, `gallery`, `jobs` and `options`.

    Jobs are worked on from the app's startup to its shutdown, or until `jobs.close`.
    """
    app = FastAPI(
        title="koala", version=__version__, docs_url=None, redoc_url=None, lifespan=_lifespan
    )
    app.state.service, app.state.options = service, options
    gallery = Gallery(store, options.gallery_bytes, options.gallery_days * DAY)
    jobs = Jobs(service, Table(store, most_seconds=options.gallery_days * DAY), gallery)
    app.state.gallery, app.state.jobs = gallery, jobs
    app.state.keeper = Keeper(gallery)
    app.state.a1111 = a1111.Desk()
    files = page.router(service.pipeline.name, service.native)
    for routes in (router, openai.router, jobs_api.router, a1111.router, files):
        app.include_router(routes)
    errors.install(app, service.metrics.failed)
    keys = Keys.read(options.api_key_file) if options.api_key_file else None
    app.add_middleware(Guard, options=options, keys=keys, note=service.metrics.failed)
    return app


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    jobs: Jobs = app.state.jobs
    await asyncio.to_thread(jobs.start)
    try:
        yield
    finally:
        await asyncio.to_thread(jobs.close)
        await asyncio.to_thread(app.state.keeper.close)


@router.get("/health", summary="Whether the server is alive", responses={503: {}})
async def health(request: Request) -> JSONResponse:
    alive = request.app.state.service.alive
    return JSONResponse({"status": "alive" if alive else "dead"}, 200 if alive else 503)


@router.get("/ready", summary="Whether requests are taken", responses={503: {}})
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


@router.get("/metrics", summary="For Prometheus", response_class=Response)
async def metrics(request: Request) -> Response:
    service: Service = request.app.state.service
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")
