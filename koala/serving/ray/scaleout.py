"""`koala serve --replicas`: one server over many engines, with Ray Serve.

Ray Serve keeps the replicas alive, adds some while images queue, and removes them again. The
front end is one process: it checks and queues requests and stores jobs and images, with the same
API as `koala serve`. If it dies, it is restarted and continues with the jobs on its disk.
"""

import asyncio
import contextlib
import logging
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import ray
from ray import serve as ray_serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.config import AutoscalingConfig, RequestRouterConfig

from koala.generation import Pass, Request
from koala.serving.app import create_app
from koala.serving.jobs.database import Database
from koala.serving.meta_pipeline import load_meta_pipeline
from koala.serving.ray.remote_engine import RemoteEngine
from koala.serving.ray.replicas import Replica
from koala.serving.run import content_filter
from koala.serving.service import Service
from koala.serving.settings import Options, Scale, check
from koala.utils.threads import available_cores

APP, REPLICAS = "koala", "replicas"
BATCH = 8  # default batch size in images
AHEAD = 2  # batches in a replica at once, so that it never idles
UP, DOWN = 5.0, 120.0  # seconds of load before replicas are added or removed
OBJECTS = 256 * 2**20  # bytes of Ray's object store


class RayReplicas:
    """The replicas, reached through Ray (`koala.serving.ray.remote_engine.Replicas`)."""

    def __init__(self, handle: Any, batch: int) -> None:
        self.handle, self.batch = handle.options(stream=True), batch

    @contextlib.asynccontextmanager
    async def draw(
        self, request: Request, size: str, seconds: float | None
    ) -> AsyncIterator[AsyncIterator[Any]]:
        updates = self.handle.draw.remote(request=request, size=size, seconds=seconds)
        try:
            yield updates
        finally:
            updates.cancel()

    def lost(self, error: BaseException) -> bool:
        return isinstance(error, RayError) and not isinstance(error, RayTaskError)

    def capacity(self) -> int:
        deployments = ray_serve.status().applications[APP].deployments
        states = deployments[REPLICAS].replica_states
        return AHEAD * self.batch * states.get("RUNNING", 0)  # type: ignore[call-overload]  # keys: an enum of str


class ScaledService(Service):
    """A service whose engine runs on replicas."""

    def __init__(self, options: Options, handle: Any) -> None:
        super().__init__(
            load_meta_pipeline(options.model), options.limits, options.lora_dir,
            embeddings=options.embedding_dir, fit=options.fit,
            content_filter=content_filter(options),
        )  # fmt: skip
        assert options.limits.max_batch is not None
        self.handle, self.batch, self.replicas = handle, options.limits.max_batch, 1

    def start(self) -> None:
        """Waits for the first replica, then sets `ready`."""
        self.handle.ready.remote().result()
        with self._idle:
            if self._draining:
                return
            reached = RayReplicas(self.handle, self.batch)
            remote_engine = RemoteEngine(
                reached, self._fair_queue.rank, self._on_pass, self._on_capacity
            ).start()
            self._engine = remote_engine  # type: ignore[assignment]  # has Engine's methods
        self.ready = True

    def _on_capacity(self, capacity: int) -> None:
        """Scales the batch size, so that jobs fill all replicas."""
        self.replicas = max(1, capacity // (AHEAD * self.batch))
        self.max_batch = self.replicas * self.batch

    def _on_pass(self, done: Pass) -> None:
        """Records a pass of one of the parallel replicas."""
        self._admission.throughput.update(replace(done, seconds=done.seconds / self.replicas))
        self.metrics.passed(done, self.batch)


class Frontend:
    """The front-end process, with the queue, the jobs and the gallery."""

    def __init__(self, options: Options, handle: Any) -> None:
        self.database = Database(options.data)
        self.service = ScaledService(options, handle)
        self.api = create_app(self.service, self.database, options)
        threading.Thread(target=self.service.start, daemon=True).start()

    def __serve_build_asgi_app__(self) -> Any:
        return self.api

    async def drain(self, seconds: float) -> bool:
        """Rejects new requests and finishes the running ones. Returns whether all finished."""
        done = await asyncio.to_thread(self.service.drain, seconds)
        await asyncio.to_thread(self.api.state.jobs.close)
        return done


def application(options: Options, scale: Scale, gpus: bool) -> "ray_serve.Application":
    """The front end and its replicas, for `ray.serve.run`; each replica gets a GPU or a CPU."""
    batch = options.limits.max_batch or BATCH
    options = replace(options, limits=replace(options.limits, max_batch=batch))
    number: dict[str, Any] = {"num_replicas": scale.least}
    if scale.most > scale.least:
        number = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=scale.least, max_replicas=scale.most, initial_replicas=scale.least,
                target_ongoing_requests=batch, upscale_delay_s=UP, downscale_delay_s=DOWN,
                metrics_interval_s=1.0, look_back_period_s=UP,
            )
        }  # fmt: skip
    replicas = ray_serve.deployment(
        Replica, name=REPLICAS, **number, max_ongoing_requests=AHEAD * batch,
        ray_actor_options={"num_gpus": 1, "num_cpus": 0} if gpus else {"num_cpus": 1},
        request_router_config=RequestRouterConfig(
            request_router_class="koala.serving.ray.replicas.SizeRouter",  # type: ignore[arg-type]  # Ray annotates its keywords as dict
            request_router_kwargs={"penalty": max(1, batch // 2)},
        ),
        health_check_period_s=2, graceful_shutdown_timeout_s=options.limits.drain,
    )  # fmt: skip
    here = f"node:{ray.util.get_node_ip_address()}"  # the node with the data folder
    front = ray_serve.deployment(
        ray_serve.ingress()(Frontend), name="front", max_ongoing_requests=4096,
        ray_actor_options={"num_cpus": 0, "resources": {here: 0.001}},
    )  # fmt: skip
    return front.bind(options, replicas.bind(options))  # type: ignore[attr-defined]  # annotated as a decorator


def serve(options: Options, scale: Scale, say: Callable[[str], None]) -> None:
    """Serves until SIGTERM or SIGINT, on the cluster at $RAY_ADDRESS or on a new local one.

    UserError for options it cannot start with.
    """
    check(options)
    stop = threading.Event()
    started_here = "RAY_ADDRESS" not in os.environ
    if started_here:
        cpus = max(available_cores(), scale.most)
        ray.init(
            num_cpus=cpus, include_dashboard=False, object_store_memory=OBJECTS,
            logging_level=logging.WARNING, log_to_driver=False,
        )  # fmt: skip
    else:
        ray.init(logging_level=logging.WARNING, log_to_driver=False)
    for number in (signal.SIGINT, signal.SIGTERM):  # replaces Ray's handlers
        signal.signal(number, lambda *_: stop.set())
    try:
        gpus = options.device != "cpu" and ray.cluster_resources().get("GPU", 0) > 0
        ray_serve.start(http_options={"host": options.host, "port": options.port})
        front = ray_serve.run(application(options, scale, gpus), name=APP, route_prefix="/")
        say(f"{options.model} is ready on http://{options.host}:{options.port}")
        stop.wait()
        say("stopping: no new requests; finishing the running ones")
        if not front.drain.remote(options.limits.drain).result():
            say("unfinished requests were cancelled")
        ray_serve.delete(APP)
    finally:
        if started_here:
            ray_serve.shutdown()
        ray.shutdown()
