"""`koala serve --replicas`: the same server over many engines, by Ray Serve.

Ray Serve keeps the replicas alive, adds some while pictures queue, and takes them away again. The
front is one process: it checks, queues and keeps all jobs and pictures, as `koala serve` does, and
answers the same requests. If it dies it is started again and goes on with the jobs on its disk.
"""

import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

from koala.errors import UserError
from koala.serving.settings import Options, Scale, check

try:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody is called
    os.environ.setdefault("RAY_worker_niceness", "0")  # drawing is what the machine is for
    import ray
    from ray import serve as ray_serve
    from ray.exceptions import RayError, RayTaskError
    from ray.serve.config import AutoscalingConfig, RequestRouterConfig
except ImportError:
    raise UserError(
        "koala serve --replicas needs more packages: pip install 'koala-diffusion[ray]'"
    ) from None

from koala.generation import Pass, Request
from koala.serving.app import create_app
from koala.serving.jobs.database import Store
from koala.serving.meta_pipeline import outline
from koala.serving.ray.fleet import Fleet
from koala.serving.ray.replicas import Replica
from koala.serving.service import Service

APP, REPLICAS = "koala", "replicas"
BATCH = 8  # pictures of a pass, where the limits do not say
AHEAD = 2  # batches that a replica may have, so that it never waits for the next picture
UP, DOWN = 5.0, 120.0  # seconds that a queue must be long or short before replicas change
OBJECTS = 256 * 2**20  # bytes that Ray holds for pictures on their way


class Reached:
    """The replicas, as the front reaches them (`koala.serving.ray.fleet.Replicas`)."""

    def __init__(self, handle: Any, batch: int) -> None:
        self.handle, self.batch = handle.options(stream=True), batch

    @contextlib.asynccontextmanager
    async def draw(
        self, request: Request, size: str, seconds: float | None
    ) -> AsyncIterator[AsyncIterator[Any]]:
        coming = self.handle.draw.remote(request=request, size=size, seconds=seconds)
        try:
            yield coming
        finally:
            coming.cancel()

    def lost(self, error: BaseException) -> bool:
        return isinstance(error, RayError) and not isinstance(error, RayTaskError)

    def room(self) -> int:
        deployments = ray_serve.status().applications[APP].deployments
        return AHEAD * self.batch * deployments[REPLICAS].replica_states.get("RUNNING", 0)


class ScaledService(Service):
    """A service whose engine is a fleet."""

    def __init__(self, options: Options, handle: Any) -> None:
        super().__init__(outline(options.model), options.limits, options.lora_dir)
        assert options.limits.max_batch is not None
        self.handle, self.batch, self.replicas = handle, options.limits.max_batch, 1

    def start(self) -> None:
        """Ready as soon as one replica is."""
        self.handle.ready.remote().result()
        with self._idle:
            if self._draining:
                return
            reached = Reached(self.handle, self.batch)
            fleet = Fleet(reached, self._fairness.rank, self._note_pass, self._note_room).start()
            self._engine = fleet  # type: ignore[assignment]
        self.ready = True

    def _note_room(self, room: int) -> None:
        """So that jobs fill all replicas."""
        self.replicas = max(1, room // (AHEAD * self.batch))
        self.max_batch = self.replicas * self.batch

    def _note_pass(self, done: Pass) -> None:
        """A pass of one replica, beside which the others have theirs."""
        self._admission.pace.note(replace(done, seconds=done.seconds / self.replicas))
        self.metrics.passed(done, self.batch)


class Front:
    """What answers: one process, with the queue, the jobs and the gallery."""

    def __init__(self, options: Options, handle: Any) -> None:
        self.store = Store(options.data)
        self.service = ScaledService(options, handle)
        self.answering = create_app(self.service, self.store, options)
        threading.Thread(target=self.service.start, daemon=True).start()

    def __serve_build_asgi_app__(self) -> Any:
        return self.answering

    async def drain(self, seconds: float) -> bool:
        """Takes no more and finishes what is under way; whether all was done in this time."""
        done = await asyncio.to_thread(self.service.drain, seconds)
        await asyncio.to_thread(self.answering.state.jobs.close)
        return done


def application(options: Options, scale: Scale, gpus: bool) -> "ray_serve.Application":
    """The front and its replicas, for `ray.serve.run`; each replica has a GPU or a CPU."""
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
            request_router_class="koala.serving.ray.replicas.BySize",
            request_router_kwargs={"apart": max(1, batch // 2)},
        ),
        health_check_period_s=2, graceful_shutdown_timeout_s=options.limits.drain,
    )  # fmt: skip
    here = f"node:{ray.util.get_node_ip_address()}"  # where the data folder is
    front = ray_serve.deployment(
        ray_serve.ingress()(Front), name="front", max_ongoing_requests=4096,
        ray_actor_options={"num_cpus": 0, "resources": {here: 0.001}},
    )  # fmt: skip
    return front.bind(options, replicas.bind(options))


def serve(options: Options, scale: Scale, say: Callable[[str], None]) -> None:
    """Serves until SIGTERM or SIGINT; joins the cluster of $RAY_ADDRESS, or makes one here.

    UserError for what it cannot be started with.
    """
    check(options)
    told = threading.Event()
    started_here = "RAY_ADDRESS" not in os.environ
    if started_here:
        cpus = max(os.cpu_count() or 1, scale.most)
        ray.init(
            num_cpus=cpus, include_dashboard=False, object_store_memory=OBJECTS,
            logging_level="warning", log_to_driver=False,
        )  # fmt: skip
    else:
        ray.init(logging_level="warning", log_to_driver=False)
    for number in (signal.SIGINT, signal.SIGTERM):  # Ray has put its own in their place
        signal.signal(number, lambda *_: told.set())
    try:
        gpus = options.device != "cpu" and ray.cluster_resources().get("GPU", 0) > 0
        ray_serve.start(http_options={"host": options.host, "port": options.port})
        front = ray_serve.run(application(options, scale, gpus), name=APP, route_prefix="/")
        say(f"{options.model} is ready on http://{options.host}:{options.port}")
        told.wait()
        say("stopping: no new requests; what is under way is finished")
        if not front.drain.remote(options.limits.drain).result():
            say("what was not finished has been cancelled")
        ray_serve.delete(APP)
    finally:
        if started_here:
            ray_serve.shutdown()
        ray.shutdown()
