"""What runs in each replica of a scaled-out server, and which replica gets which picture.

A replica is a step engine in a process of its own, with a GPU of its own where there are GPUs.
Pictures come one by one; what happens to each is told as a stream. Nothing is kept here: whoever
sent a picture sends it again if the replica dies.
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

BETWEEN_PREVIEWS = 0.25  # seconds, of one picture
BETWEEN_NEWS = 0.05  # seconds, of one picture


@dataclass(frozen=True)
class News:
    """What a replica tells of one picture. The last has an image or an error."""

    done: int = 0  # steps; the first news has none
    preview: Image.Image | None = None
    passes: tuple[Pass, ...] = ()  # of the whole replica, since it last told of any
    image: Image.Image | None = None
    error: BaseException | None = None


class Replica:
    """One engine. `options`: as for `koala serve`; the batch has the size they say."""

    def __init__(self, options: Options) -> None:
        from koala.serving.run import loaded
        from koala.serving.warmup import warm_up

        pipeline, options = loaded(options, print)
        batch = warm_up(pipeline, options.limits.max_batch, pipeline.batch_sizes)
        native = pipeline.unet.config.sample_size * pipeline.factor
        self._passes: list[Pass] = []
        self._engine = Engine(
            pipeline, max_batch=batch, max_pixels=batch * native**2, on_pass=self._passes.append
        ).start()

    async def ready(self) -> bool:
        """True, once it is."""
        return True

    def check_health(self) -> None:
        """Raises if nothing would be drawn any more."""
        assert self._engine.working, "the engine's thread has ended"

    async def draw(
        self, request: Request, size: str, seconds: float | None
    ) -> AsyncGenerator[News, None]:
        """Draws a picture of this size, for which there are so many seconds; ends it if told to."""
        loop, coming = asyncio.get_running_loop(), asyncio.Queue[News | None]()
        looked = 0.0

        def tell(news: News | None) -> None:
            loop.call_soon_threadsafe(coming.put_nowait, news)

        def on_step(progress: Progress) -> None:
            nonlocal looked
            preview, now = None, time.monotonic()
            if now - looked >= BETWEEN_PREVIEWS:
                looked, preview = now, progress.preview()
            tell(News(progress.done, preview))

        deadline = None if seconds is None else time.monotonic() + seconds
        ticket = self._engine.submit(request, on_step, lambda: tell(News()), deadline)
        ticket.add_done_callback(lambda _: tell(None))
        done, sent = 0, 0.0
        try:
            while (news := await coming.get()) is not None:
                done, now = news.done, time.monotonic()
                if done and not news.preview and now - sent < BETWEEN_NEWS:
                    continue  # the next says so, too
                sent = now
                yield replace(news, passes=self._passed())
            error = ticket.exception()
            image = None if error else ticket.result()
            yield News(done, passes=self._passed(), image=image, error=error)
        finally:
            ticket.cancel()

    def _passed(self) -> tuple[Pass, ...]:
        found = tuple(self._passes)
        del self._passes[: len(found)]
        return found


class BySize(RequestRouter):
    """Sends a picture to the replica with the least to do, where equal sizes share their steps.

    A picture of a size that a replica is drawing already joins a pass there; of any other size it
    asks for passes of its own, which counts as `apart` pictures more.
    """

    def initialize_state(self, apart: int) -> None:
        self._apart = apart
        self._under_way: dict[str, tuple[ReplicaID, str]] = {}  # by request: where, and its size

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """One rank a replica, the best first."""
        size = _size(pending_request)
        where = {each.replica_id: each for each in candidate_replicas}
        best = ranked(list(where), list(self._under_way.values()), size, self._apart)
        return [[where[id]] for id in best]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        if size := _size(pending_request):
            id = pending_request.metadata.internal_request_id
            self._under_way[id] = (replica_id, size)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        self._under_way.pop(internal_request_id, None)


def ranked(
    replicas: Sequence[Any], under_way: Sequence[tuple[Any, str]], size: str | None, apart: int
) -> list[Any]:
    """The replicas, best first for a picture of a size. under_way: (replica, size) of others."""
    load = Counter(replica for replica, _ in under_way)
    alike = {replica for replica, other in under_way if other == size}
    return sorted(replicas, key=lambda one: load[one] + (0 if one in alike else apart))


def _size(pending: PendingRequest | None) -> str | None:
    return None if pending is None else pending.kwargs.get("size")
