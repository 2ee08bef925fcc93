"""What `koala serve` does: load, answer, warm up, and leave in good order when told to."""

from typing import TYPE_CHECKING

from koala.serving.settings import Options

if TYPE_CHECKING:
    from fastapi import FastAPI


def serve(options: Options) -> None:
    """Serves until it is told to stop. UserError for what it cannot be started with."""
    import uvicorn

    from koala.generation import load
    from koala.serving.app import create_app
    from koala.serving.service import Service
    from koala.serving.store import Store

    pipeline = load(options.model, options.device)
    service = Service(pipeline, options.limits, options.lora_dir)
    service.start()
    app: FastAPI = create_app(service, Store(options.data), options)
    uvicorn.run(app, host=options.host, port=options.port, access_log=False)
