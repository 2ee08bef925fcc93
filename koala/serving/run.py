"""`koala serve`: loads the model, answers, warms up, and drains when it is told to stop.

The port is bound and the keys are read before the model is loaded, so that a mistake shows at once.
The server answers as soon as the model is loaded, and is ready when it has warmed up.
"""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

from koala.errors import Failure, UserError
from koala.generation.form import is_form
from koala.serving.jobs.database import Database
from koala.serving.settings import Options, check
from koala.utils.extras import require

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

    from koala.generation.drawing import Drawing
    from koala.serving.content_filter import ContentFilter
    from koala.serving.service import Service

CONNECTIONS_END = 5  # seconds for answers to end after the last image is done


def serve(options: Options, say: Callable[[str], None]) -> None:
    """Serves until SIGTERM or SIGINT; a second signal cancels what is running.

    say: called with lines for a person. UserError for options that the server cannot start with.
    """
    require("koala serve", "serve", "fastapi", "prometheus_client", "uvicorn")
    check(options)
    import uvicorn

    if not options.on_loopback and options.api_key_file is None:
        say(
            f"warning: everybody who reaches {options.host} can use this server: "
            "give --api-key-file"
        )
    with _bound(options) as listening, contextlib.closing(Database(options.data)) as database:
        # After all checks: these load torch.
        from koala.serving.app import create_app
        from koala.serving.service import Service

        pipeline, options = loaded(options, say)
        sizes = pipeline.batch_sizes
        service = Service(
            pipeline, options.limits, options.lora_dir, sizes=sizes,
            embeddings=options.embedding_dir, fit=options.fit,
            content_filter=content_filter(options),
        )  # fmt: skip
        app = create_app(service, database, options)
        try:
            closed = app.state.jobs.close
            server = uvicorn.Server(http_config(app, options))
            asyncio.run(_until_signalled(server, service, closed, listening, options, say))
        finally:
            service.close()


def content_filter(options: Options) -> "ContentFilter | None":
    """The content filter, if one is asked for."""
    from koala.serving.content_filter import ContentFilter

    return None if options.content_filter is None else ContentFilter(options.content_filter)


def http_config(app: "FastAPI", options: Options) -> "uvicorn.Config":
    """How uvicorn is to serve the app: bounded connections, a log that no client can fill."""
    import uvicorn

    from koala.serving.connections import BACKLOG, bounded, most_connections

    return uvicorn.Config(
        app, log_level="error", access_log=False, server_header=False, ws="none", backlog=BACKLOG,
        http=bounded(most_connections()), timeout_graceful_shutdown=CONNECTIONS_END,
        proxy_headers=bool(options.trusted_proxies),
        forwarded_allow_ips=list(options.trusted_proxies),
    )  # fmt: skip


def loaded(options: Options, say: Callable[[str], None]) -> "tuple[Drawing, Options]":
    """The model as asked for, and the options with limits that its memory plan can hold.

    The folder of an OpenVINO form, and any model where PyTorch is not installed, is served without
    PyTorch: requests that start from an image are refused.
    """
    from koala.generation import load
    from koala.generation.runtime.fixed_batches import one_by_one

    limits = options.limits
    side = None if limits.size is None else int(limits.size**0.5) // 8 * 8
    pipeline = load(
        options.model,
        options.device,
        backend=options.backend,
        compile=options.compile,
        graphs=options.graphs,
        vram=options.vram,
        size=None if side is None else (side, side),
        images=limits.max_batch or 8,
        from_image=not is_form(options.model) and find_spec("torch") is not None,
        say=say,
    )
    if (plan := pipeline.plan) is not None:
        for line in plan.table().splitlines():
            say(line)
        size = limits.size or plan.size[0] * plan.size[1]
        limits = replace(limits, max_batch=plan.images, size=size)
    # Several at once take their memory several times, and are hardly faster.
    pipeline.decode = one_by_one(pipeline.decode)
    return pipeline, replace(options, limits=limits)


@contextlib.contextmanager
def _bound(options: Options) -> Iterator[socket.socket]:
    """A socket that is bound to the address and does not listen yet. UserError if it cannot be."""
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    with socket.socket(family) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((options.host, options.port))
        except (OSError, OverflowError) as error:
            raise UserError(
                f"cannot listen at port {options.port} of {options.host} ({error}): name another "
                "with --port or --host"
            ) from None
        yield listening


async def _until_signalled(
    server: "uvicorn.Server", service: "Service", closed: Callable[[], None],
    listening: socket.socket, options: Options, say: Callable[[str], None],
) -> None:  # fmt: skip
    """Answers, warms up, and after a signal drains and ends.

    closed: called then, to end the listeners of jobs.
    """
    signalled = asyncio.Event()

    def on_signal() -> None:
        if signalled.is_set():
            service.cancel()
        signalled.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    # The server's own handlers would end the process by the signal, not with status 0.
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign,assignment]
    serving = asyncio.create_task(server.serve([listening]))
    warming = asyncio.create_task(asyncio.to_thread(service.start))
    stopping = asyncio.create_task(signalled.wait())
    await asyncio.wait({serving, warming, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if warming.done() and not warming.exception() and not signalled.is_set():
        host, port = listening.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        say(f"{service.pipeline.name} is ready on http://{shown}:{port}")
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if signalled.is_set():
        say("stopping: no new requests; running ones are finished")
        if not await asyncio.to_thread(service.drain, options.limits.drain):
            say("requests that did not finish in time were cancelled")
        await asyncio.to_thread(closed)
    server.should_exit = True
    await serving
    if not server.started:
        raise Failure("the server did not start; its log says why")
    if not signalled.is_set() or warming.done():
        await warming
