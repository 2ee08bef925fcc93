"""A real server on loopback, with a toy model, for the tests of `koala.serving`."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from koala.generation import Pipeline
from koala.serving.app import create_app
from koala.serving.jobs.database import Database
from koala.serving.run import content_filter, http_config
from koala.serving.service import Service
from koala.serving.settings import Limits, Options

DRAW = "/v1/images/generations"
ASKED = {"prompt": "a", "size": "16x16", "steps": 1}


@dataclass
class Running:
    """A server that answers."""

    url: str
    service: Service
    app: object


@contextmanager
def running(
    pipeline: Pipeline, data: Path, limits: Limits | None = None, **told: object
) -> Iterator[Running]:
    """Serves a loaded pipeline until the block ends. `told`: further fields of `Options`."""
    limits = limits or Limits(max_batch=8)
    options = Options(data=data, limits=limits, **{"fit": False, **told})
    service = Service(
        pipeline, limits, options.lora_dir, embeddings=options.embedding_dir, fit=options.fit,
        content_filter=content_filter(options),
    )  # fmt: skip
    service.start()
    database = Database(data)
    app = create_app(service, database, options)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(http_config(app, options))
        thread = threading.Thread(
            target=lambda: asyncio.run(server.serve([listening])), daemon=True
        )
        thread.start()
        try:
            yield Running(f"http://127.0.0.1:{listening.getsockname()[1]}", service, app)
        finally:
            service.close()
            server.should_exit = True
            thread.join(30)
            database.close()


@contextmanager
def gated(pipeline: Pipeline) -> Iterator[threading.Event]:
    """A gate before each step of the pipeline until the block ends; it begins open (set)."""
    plain, gate = pipeline.predict, threading.Event()

    def predict(x, timesteps, condition):
        assert gate.wait(60)
        return plain(x, timesteps, condition)

    gate.set()
    pipeline.predict = predict
    try:
        yield gate
    finally:
        gate.set()
        pipeline.predict = plain
