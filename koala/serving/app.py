"""The application: what answers which path, and what all answers have in common."""

from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, Response

from koala import __version__
from koala.serving import answers, openai
from koala.serving.gallery import Gallery
from koala.serving.security import Guard, Keys
from koala.serving.service import Service
from koala.serving.settings import Options
from koala.serving.store import Store

DAY = 24 * 3600.0  # seconds

router = APIRouter()


def create_app(service: Service, store: Store, options: Options) -> FastAPI:
    """Every interface of one service. `app.state` has `service`, `gallery` and `options`."""
    app = FastAPI(title="koala", version=__version__, docs_url=None, redoc_url=None)
    app.state.service, app.state.options = service, options
    app.state.gallery = Gallery(store, options.gallery_bytes, options.gallery_days * DAY)
    for routes in (router, openai.router):
        app.include_router(routes)
    answers.install(app, service.metrics.failed)
    keys = Keys.read(options.api_key_file) if options.api_key_file else None
    app.add_middleware(Guard, options=options, keys=keys, note=service.metrics.failed)
    return app


@router.get("/health", summary="Whether the process is alive")
async def health() -> dict[str, Any]:
    return {"status": "alive"}


@router.get("/ready", summary="Whether requests are taken", responses={503: {}})
async def ready(request: Request) -> JSONResponse:
    service: Service = request.app.state.service
    state = "draining" if service.draining else "ready" if service.ready else "starting"
    return JSONResponse({"status": state}, 200 if state == "ready" else 503)


@router.get("/metrics", summary="For Prometheus", response_class=Response)
async def metrics(request: Request) -> Response:
    service: Service = request.app.state.service
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")
