"""The replica of a scaled-out server, and the router that picks one for each image.

A replica is an engine in its own process, with its own GPU if there are GPUs. Images arrive one by
one, and each is answered with a stream of updates. A replica keeps no state: the sender retries if
it dies.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from koala.generation import Engine, Pass, Progress, Request
from koala.serving.settings import Options

BETWEEN_PREVIEWS = 0.25  # seconds, for each image
BETWEEN_UPDATES = 0.05  # seconds, for each image


@dataclass(frozen=True)
class ReplicaUpdate:
    """Progress of one image. The last update has an image or an error."""

    done: int = 0  # steps
    preview: Image.Image | None = None
    passes: tuple[Pass, ...] = ()  # all of the replica's since the last update
    image: Image.Image | None = None
    error: BaseException | None = None


class Replica:
    """One engine, with the options of `koala serve` and their batch size."""

    def __init__(self, options: Options) -> None:
        from koala.serving.run import loaded
        from koala.serving.warmup import warm_up

        pipeline, options = loaded(options, print)
        batch = warm_up(pipeline, options.limits.max_batch, pipeline.batch_sizes)
        native = pipeline.known.native
        self._passes: list[Pass] = []
        self._engine = Engine(
            pipeline, max_batch=batch, max_pixels=batch * native**2, on_pass=self._passes.append
        ).start()

    async def ready(self) -> bool:
        """Returns True once the replica can take images."""
        return True

    def check_health(self) -> None:
        """Raises if the engine has died."""
        assert self._engine.working, "the engine's thread has ended"

    async def draw(
        self, request: Request, size: str, seconds: float | None
    ) -> AsyncGenerator[ReplicaUpdate, None]:
        """Generates an image within `seconds`, and yields its updates; closing cancels it."""
        loop, updates = asyncio.get_running_loop(), asyncio.Queue[ReplicaUpdate | None]()
        previewed = 0.0

        def send(update: ReplicaUpdate | None) -> None:
            loop.call_soon_threadsafe(updates.put_nowait, update)

        def on_step(progress: Progress) -> None:
            nonlocal previewed
            preview, now = None, time.monotonic()
            if now - previewed >= BETWEEN_PREVIEWS:
                previewed, preview = now, progress.preview()
            send(ReplicaUpdate(progress.done, preview))

        deadline = None if seconds is None else time.monotonic() + seconds
        ticket = self._engine.submit(request, on_step, lambda: send(ReplicaUpdate()), deadline)
        ticket.add_done_callback(lambda _: send(None))
        done, sent = 0, 0.0
        try:
            while (update := await updates.get()) is not None:
                done, now = update.done, time.monotonic()
                if done and not update.preview and now - sent < BETWEEN_UPDATES:
                    continue  # the next update includes it
                sent = now
                yield replace(update, passes=self._take_passes())
            error = ticket.exception()
            image = None if error else ticket.result()
            yield ReplicaUpdate(done, passes=self._take_passes(), image=image, error=error)
        finally:
            ticket.cancel()

    def _take_passes(self) -> tuple[Pass, ...]:
        passes = tuple(self._passes)
        del self._passes[: len(passes)]
        return passes


class SizeRouter(RequestRouter):
    """Routes an image to the least loaded replica, where images of one size share passes.

    An image of a size that a replica is running joins its passes; another size needs passes of
    its own and counts as `penalty` more images.
    """

    # Ray passes on the keywords of its configuration, which are `penalty` alone.
    def initialize_state(self, penalty: int) -> None:  # type: ignore[override]
        self._penalty = penalty
        self._running: dict[str, tuple[ReplicaID, str]] = {}  # request -> (replica, size)

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """The replicas, best first, one in each rank."""
        size = _size(pending_request)
        by_id = {each.replica_id: each for each in candidate_replicas}
        best = rank_replicas(list(by_id), list(self._running.values()), size, self._penalty)
        return [[by_id[id]] for id in best]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        if size := _size(pending_request):
            id = pending_request.metadata.internal_request_id
            self._running[id] = (replica_id, size)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        self._running.pop(internal_request_id, None)


def rank_replicas(
    replicas: Sequence[Any], running: Sequence[tuple[Any, str]], size: str | None, penalty: int
) -> list[Any]:
    """The replicas, best first for an image size. running: (replica, size) of other images."""
    load = Counter(replica for replica, _ in running)
    same_size = {replica for replica, other in running if other == size}
    return sorted(replicas, key=lambda one: load[one] + (0 if one in same_size else penalty))


def _size(pending: PendingRequest | None) -> str | None:
    return None if pending is None else pending.kwargs.get("size")
